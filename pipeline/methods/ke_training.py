"""The training of KE (arXiv 2104.08164, section 3.2), whose divergence has a margin."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.editing.hypernetworks.network import HyperNetwork
from pipeline.errors import InputError
from pipeline.methods.hyper_training import HyperTrainable, HyperTrainer, Weights
from pipeline.methods.trainable import Measured, Shapes, State, Trainer
from pipeline.requests import EditRequest
from pipeline.spec import JobSpec


class KnowledgeEditorTraining(HyperTrainable):
    """The divergence is held below a margin, by a multiplier that grows while it is not."""

    answers_only = True
    published: Mapping[str, Any] = {
        "batch_size": 1,
        "accumulate": 16,
        "learning_rate": 3e-4,
        "warm_up": 1000,
        "edit_weight": 1.0,
        "locality_weight": 1.0,
        "own_prompt_share": 0.0,
        "draw_targets": "none",
    }

    def __init__(self, spec: JobSpec) -> None:
        super().__init__(spec)
        self.smoothing = spec.method.ke.label_smoothing

    def pieces(
        self,
        requests: Sequence[EditRequest],
        others: Sequence[EditRequest],
        texts: Sequence[str],
        generator: random.Random,
    ) -> list[tuple[Any, ...]]:
        if self.train.batch_size != 1:
            raise InputError(
                "train.batch_size: ke makes one edit at a time; set it to 1 and give"
                " train.accumulate"
            )
        return super().pieces(requests, others, texts, generator)

    def trainer(self, shapes: Shapes, state: State | None) -> Trainer:
        return ConstrainedTrainer(self, self.network(shapes), state)

    def optimiser(self, network: HyperNetwork) -> torch.optim.Optimizer:
        assert self.train.learning_rate is not None
        rate = self.train.learning_rate
        return torch.optim.RMSprop(network.parameters(), lr=rate, centered=True)


# Where nine in ten edits succeed the margin becomes smaller.
_ENOUGH = 0.9


class ConstrainedTrainer(HyperTrainer):
    """Steps down the Lagrangian, and up in its multiplier; measures with a weight that stays."""

    def __init__(
        self, trainable: KnowledgeEditorTraining, network: HyperNetwork, state: State | None
    ) -> None:
        self.own = trainable.spec.method.ke
        self.multiplier, self.margin = trainable.weights.locality, self.own.margin
        super().__init__(trainable, network, state)
        if state is not None:
            self.multiplier, self.margin = float(state["multiplier"]), float(state["margin"])

    def shared(self) -> Any:
        counts = self.trainable.weights
        if self._learns:
            counts = Weights(counts.edit, self.multiplier)
        return {**super().shared(), "weights": counts}

    def end(self) -> Measured:
        measured = super().end()
        if self._learns:
            beyond = measured.measures["locality_loss"] - self.margin
            moved = self.multiplier + self.own.multiplier_learning_rate * beyond
            self.multiplier = max(0.0, moved)
        return measured

    def validated(self, measured: Measured) -> int:
        if measured.measures["success"] > _ENOUGH:
            smaller = self.margin * self.own.margin_factor
            self.margin = max(self.own.margin_floor, smaller)
        return super().validated(measured)

    def state(self) -> State:
        own = {"multiplier": self.multiplier, "margin": self.margin}
        tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in own.items()}
        return {**super().state(), **tensors}
