"""What the trainings of MEND, MALMEN and KE share.

The loss of a batch of edits that are made together is, at the edited weights,

    edit_weight * NLL(answers, asked in other words) + locality_weight * KL(unedited || edited)

a mean over the batch. Its gradient in each weight is the gradient in that weight's update, from
which the network's own follow. With MEND and KE a worker does all of this for a batch, and a step
is the mean over several; with MALMEN a batch is large, so that its edits are shared out: in a first
pass their factors come to the reducer, which makes the update, in a second the losses' gradients.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.editing.gradients import Factors, TargetGradients
from pipeline.editing.hypernetworks.network import HyperNetwork
from pipeline.editing.locality import KeptGradients
from pipeline.editing.normaliser import Moments
from pipeline.editing.update import EditedWeights
from pipeline.errors import InputError
from pipeline.methods.edit_examples import (
    EditExample,
    asked_rows,
    kept_rows,
)
from pipeline.methods.hypernetworks import TrainedMethod, trained_method
from pipeline.methods.module_training import ModuleTrainer, add_gradients
from pipeline.methods.trainable import (
    Contribution,
    Learner,
    Shapes,
    State,
    Trainable,
    Trainer,
)
from pipeline.models.editable import EditableModel
from pipeline.prompts import tokenize_edits
from pipeline.requests import EditRequest
from pipeline.spec import JobSpec

# Tokens in one pass with gradients, edits that a worker is given at once, and bytes of the weights
# that these have each for itself.
MAX_TOKENS, EDITS_OF_A_PIECE, BYTES_APART = 2048, 16, 2**29
# What the saved editor does not depend on.
_AFTER_TRAINING = frozenset({"editor", "editor_sha256", "repeats"})

T = TypeVar("T")
Build = Callable[[], HyperNetwork]


@dataclass(frozen=True)
class Weights:
    """What an edit's two losses count."""

    edit: float
    locality: float


class HyperTrainable(Trainable):
    """A piece is some batches, each of whose edits are made together (MEND, KE)."""

    answers_only = False
    """Whether, of a question to be left alone, only the answer's tokens count."""

    smoothing = 0.0

    def __init__(self, spec: JobSpec) -> None:
        super().__init__(spec)
        self.method: TrainedMethod = trained_method(spec.method)
        assert self.train.edit_weight is not None and self.train.locality_weight is not None
        self.weights = Weights(self.train.edit_weight, self.train.locality_weight)

    def pieces(
        self,
        requests: Sequence[EditRequest],
        others: Sequence[EditRequest],
        texts: Sequence[str],
        generator: random.Random,
    ) -> list[tuple[Any, ...]]:
        assert self.train.batch_size is not None
        size = self.train.batch_size
        examples = self.drawn(requests, others, texts, generator)
        batches = [tuple(part) for part in cut(examples, size)]
        return [tuple(part) for part in cut(batches, max(1, EDITS_OF_A_PIECE // size))]

    def learner(self, weights: EditedWeights, tokenizer: PreTrainedTokenizerBase) -> Learner:
        return BatchLearner(self, weights, tokenizer)

    def trainer(self, shapes: Shapes, state: State | None) -> Trainer:
        network = self.network(shapes)
        return HyperTrainer(self, network, state)

    def network(self, shapes: Shapes) -> HyperNetwork:
        """The network, with the parameters that it begins with."""
        sizes = {layer: (shapes.hidden_size, size) for layer, size in shapes.key_sizes.items()}
        return self.method.network(sizes, shapes.hidden_size, self.spec.seed)

    def optimiser(self, network: HyperNetwork) -> torch.optim.Optimizer:
        """What makes the steps."""
        assert self.train.learning_rate is not None
        return torch.optim.Adam(network.parameters(), lr=self.train.learning_rate)

    def settings(self) -> dict[str, Any]:
        own = self.spec.method.trained
        assert own is not None
        return own.model_dump(mode="json", exclude=set(_AFTER_TRAINING))


class EditLosses:
    """The two losses of some examples, on a model whose weights change.

    Args:
        trainable: whose settings count.
        weights: of the model, unedited.
        tokenizer: the model's.
        examples: at least one.
    """

    def __init__(
        self,
        trainable: HyperTrainable,
        weights: EditedWeights,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[EditExample],
    ) -> None:
        model, layers = weights.model, weights.layers
        self._asked = TargetGradients(
            model,
            asked_rows(tokenizer, examples, model.answers),
            layers,
            "target_tokens",
            MAX_TOKENS,
            smoothing=trainable.smoothing,
        )
        left = kept_rows(
            tokenizer,
            examples,
            model.answers,
            max_tokens=trainable.train.max_tokens,
            answers_only=trainable.answers_only,
        )
        self._left = KeptGradients(model, left, layers, MAX_TOKENS)

    def slopes(self, counts: Weights) -> tuple[dict[str, float], dict[int, Tensor]]:
        """Measures summed over the examples, and the loss' gradient in each weight, (D, F)."""
        asked, left = self._asked.factors("all"), self._left.factors("all")
        return _measures(asked.losses.sum(), left.losses.sum(), counts), _slopes(
            asked, left, counts
        )

    def slopes_apart(
        self, counts: Weights, size: int
    ) -> tuple[dict[str, float], list[dict[int, Tensor]]]:
        """Measures summed over the examples, and the gradients of every `size` in a row."""
        both = [rows.factors_apart("all", size) for rows in (self._asked, self._left)]
        edit, locality = (torch.cat([part.losses for part in parts]).sum() for parts in both)
        slopes = [_slopes(asked, left, counts) for asked, left in zip(*both, strict=True)]
        return _measures(edit, locality, counts), slopes

    def measures(self, counts: Weights) -> dict[str, float]:
        """Measures summed over the examples, with how many edits succeed."""
        model = self._asked.model
        asked = self._asked.read(lambda batch, states: batch.losses_and_misses(model, states))
        left = self._left.read(lambda batch, states: batch.losses(model, states)[:, None])
        succeeded = float((asked[:, 1] == 0).sum())
        return {**_measures(asked[:, 0].sum(), left.sum(), counts), "success": succeeded}

    @contextmanager
    def tried(self, weights: Mapping[int, Tensor], size: int) -> Iterator[None]:
        """Let every `size` examples in a row have weights of their own for a while."""
        with self._asked.weights_apart(weights, size), self._left.weights_apart(weights, size):
            yield


def _slopes(asked: Factors, left: Factors, counts: Weights) -> dict[int, Tensor]:
    return {
        layer: counts.edit * asked.matrix(layer) + counts.locality * left.matrix(layer)
        for layer in asked.keys
    }


def _measures(edit: Tensor, locality: Tensor, counts: Weights) -> dict[str, float]:
    return {
        "loss": counts.edit * float(edit) + counts.locality * float(locality),
        "edit_loss": float(edit),
        "locality_loss": float(locality),
    }


class BatchLearner(Learner):
    """Makes the updates of batches, tries each, and says what the network should have done.

    Args: as of `Trainable.learner`.
    """

    def __init__(
        self,
        trainable: HyperTrainable,
        weights: EditedWeights,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.trainable, self.weights, self.tokenizer = trainable, weights, tokenizer
        model = weights.model
        width = model.model.get_input_embeddings().weight.shape[1]
        if width != model.hidden_size and trainable.spec.method.name == "ke":
            raise InputError(
                f"method.name: ke reads token embeddings, which have {width} entries in this model"
                f" and its hidden states {model.hidden_size}; take another method"
            )
        keys = {layer: model.key_size(layer) for layer in weights.layers}
        self.network = trainable.network(Shapes(model.hidden_size, keys)).to(model.output_device)
        size = 4 * model.hidden_size * sum(keys.values())
        self._at_once = max(1, BYTES_APART // size)

    def contribute(
        self, items: Sequence[Any], number: int, shared: Any, *, learns: bool
    ) -> Contribution:
        self.network.load_state_dict(shared["network"])
        parts = [
            self._contribute(batches, shared["weights"], learns=learns)
            for batches in cut(items, self._at_once)
        ]
        return _added(parts)

    def _contribute(
        self, batches: Sequence[Sequence[EditExample]], counts: Weights, *, learns: bool
    ) -> Contribution:
        """What some batches of one size say, with a pass for all of them."""
        size = len(batches[0])
        examples = [example for batch in batches for example in batch]
        losses = EditLosses(self.trainable, self.weights, self.tokenizer, examples)
        factors = self._factors_apart(examples, size)
        seen = self.network.seen_in(Factors.joined(factors)) if learns else {}
        self.network.take(seen)
        with losses.tried(self._edited(factors), size):
            if not learns:
                return Contribution(len(examples), losses.measures(counts))
            measures, slopes = losses.slopes_apart(counts, size)
        gradients: dict[str, Tensor] = {}
        for pair in zip(factors, slopes, strict=True):
            with torch.enable_grad():
                add_gradients(gradients, self.network.gradients(*pair))
        rows = {name: moments.to("cpu") for name, moments in seen.items()}
        return Contribution(len(examples), measures, gradients, rows)

    def _factors_apart(self, examples: Sequence[EditExample], size: int) -> list[Factors]:
        rows = laid_out(self.trainable, self.weights.model, self.tokenizer, examples)
        device = self.weights.model.output_device
        found = rows.factors_apart(self.trainable.method.tokens, size)
        return [factors.to(device) for factors in found]

    def _edited(self, factors: Sequence[Factors]) -> dict[int, Tensor]:
        """Layer -> (N, D, F), the weights that the network gives each of N batches."""
        updates = [self.network.edit(part) for part in factors]
        device = self.weights.model.output_device
        return {
            layer: self.weights.apart(layer, [update[layer].matrix(device) for update in updates])
            for layer in self.weights.layers
        }


def _added(parts: Sequence[Contribution]) -> Contribution:
    """What parts of a piece say together."""
    first, *others = parts
    measures, gradients = dict(first.measures), dict(first.gradients)
    rest: dict[str, Moments] = dict(first.rest or {})
    for part in others:
        measures = {name: total + part.measures[name] for name, total in measures.items()}
        add_gradients(gradients, part.gradients)
        for name, moments in (part.rest or {}).items():
            rest[name] = rest[name].merged(moments) if name in rest else moments
    return Contribution(sum(part.count for part in parts), measures, gradients, rest)


def cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Parts of so many items, the last one of what is left."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def factors_of(
    trainable: HyperTrainable,
    weights: EditedWeights,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EditExample],
) -> Factors:
    """What some examples' edits say, as when they are edited."""
    rows = laid_out(trainable, weights.model, tokenizer, examples)
    return rows.factors(trainable.method.tokens)


def laid_out(
    trainable: HyperTrainable,
    model: EditableModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EditExample],
) -> TargetGradients:
    """Some examples' edits, laid out as when they are edited."""
    requests = [example.edit for example in examples]
    contexts = trainable.spec.method.contexts or ("{}",)
    edits = tokenize_edits(tokenizer, requests, contexts, model.answers)
    found = trainable.method.gradients(model, edits, MAX_TOKENS, keeps=False)
    assert isinstance(found, TargetGradients), "networks read the target's gradients"
    return found


class HyperTrainer(ModuleTrainer):
    """The network with its optimiser and its normaliser.

    Args: as of `Trainable.trainer`.
    """

    module: HyperNetwork

    def __init__(
        self, trainable: HyperTrainable, network: HyperNetwork, state: State | None
    ) -> None:
        self.trainable = trainable
        train = trainable.train
        super().__init__(
            network,
            trainable.optimiser(network),
            train.max_gradient_norm,
            train.warm_up or 0,
            state,
        )

    def shared(self) -> Any:
        return {"network": super().shared(), "weights": self.trainable.weights}

    def add(self, part: Contribution) -> None:
        super().add(part)
        self.module.take(part.rest or {})
