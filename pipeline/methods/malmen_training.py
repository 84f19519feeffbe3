"""The training of MALMEN (arXiv 2311.04661, section 3.3): a batch of edits in two passes."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.editing.gradients import Factors
from pipeline.editing.update import EditedWeights
from pipeline.errors import InputError
from pipeline.methods.hyper_training import (
    EDITS_OF_A_PIECE,
    EditLosses,
    HyperTrainable,
    HyperTrainer,
    cut,
    factors_of,
)
from pipeline.methods.module_training import ModuleTrainer
from pipeline.methods.trainable import Contribution, Learner, Measured, Shapes, State, Trainer
from pipeline.requests import EditRequest


class MalmenTraining(HyperTrainable):
    """A batch of edits is shared out over the workers, twice."""

    passes = 2
    answers_only = True
    published: Mapping[str, Any] = {
        "batch_size": 512,
        "accumulate": 1,
        "learning_rate": 1e-5,
        "warm_up": 0,
        "edit_weight": 1.0,
        "locality_weight": 1.0,
        "max_gradient_norm": 1.0,
        "own_prompt_share": 0.0,
        "draw_targets": "none",
    }

    def pieces(
        self,
        requests: Sequence[EditRequest],
        others: Sequence[EditRequest],
        texts: Sequence[str],
        generator: random.Random,
    ) -> list[tuple[Any, ...]]:
        if self.train.accumulate != 1:
            raise InputError(
                "train.accumulate: malmen makes one batch a step; give a larger train.batch_size"
            )
        examples = self.drawn(requests, others, texts, generator)
        return [tuple(part) for part in cut(examples, EDITS_OF_A_PIECE)]

    def learner(self, weights: EditedWeights, tokenizer: PreTrainedTokenizerBase) -> Learner:
        return PieceLearner(self, weights, tokenizer)

    def trainer(self, shapes: Shapes, state: State | None) -> Trainer:
        return MalmenTrainer(self, self.network(shapes), state)


class PieceLearner(Learner):
    """Takes factors in the first pass, the losses' gradients at the edited weights in the second.

    Args: as of `Trainable.learner`.
    """

    def __init__(
        self,
        trainable: HyperTrainable,
        weights: EditedWeights,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.trainable, self.weights, self.tokenizer = trainable, weights, tokenizer

    def contribute(
        self, items: Sequence[Any], number: int, shared: Any, *, learns: bool
    ) -> Contribution:
        if number == 0:
            factors = factors_of(self.trainable, self.weights, self.tokenizer, items)
            return Contribution(0, {}, rest=factors)
        losses = EditLosses(self.trainable, self.weights, self.tokenizer, items)
        with self.weights.tried(shared):
            if not learns:
                return Contribution(len(items), losses.measures(self.trainable.weights))
            measures, slopes = losses.slopes(self.trainable.weights)
        return Contribution(len(items), measures, rest=slopes)


class MalmenTrainer(HyperTrainer):
    """Makes the update between the passes, and the network's gradient after them."""

    _factors: list[Factors]
    _joined: Factors
    _slopes: dict[int, Tensor]

    def begin(self, *, learns: bool) -> Any:
        super().begin(learns=learns)
        self._factors, self._slopes = [], {}
        return None

    def add(self, part: Contribution) -> None:
        ModuleTrainer.add(self, part)
        if isinstance(part.rest, Factors):
            self._factors.append(part.rest)
            return
        for layer, slope in (part.rest or {}).items():
            before = self._slopes.get(layer)
            self._slopes[layer] = slope if before is None else before + slope

    def end_pass(self, number: int) -> Any:
        self._joined = Factors.joined(self._factors)
        if self._learns:
            self.module.take(self.module.seen_in(self._joined))
        updates = self.module.edit(self._joined)
        return {layer: update.matrix() for layer, update in updates.items()}

    def end(self) -> Measured:
        if self._learns:
            with torch.enable_grad():
                self._gradients = self.module.gradients(self._joined, self._slopes)
        return super().end()
