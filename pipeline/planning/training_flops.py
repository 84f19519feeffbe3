"""What a step of the training of an editor computes, by method, piece by piece.

Beside passes through the model it is products of the network's own, products in float64, and
numbers that are gone through one by one: weights as an update changes them, parameters as the
optimiser does. These take time where an edit has but some tokens, so that their bytes count too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.editing.hypernetworks.ke import KnowledgeEditorNetwork
from pipeline.editing.hypernetworks.malmen import MalmenNetwork
from pipeline.editing.hypernetworks.mend import MendNetwork
from pipeline.editing.hypernetworks.rows import shape_name
from pipeline.editing.serac.counterfactual import Counterfactual
from pipeline.editing.serac.training import Example
from pipeline.methods.edit_examples import EditExample, asked_rows, kept_rows
from pipeline.methods.hyper_training import HyperTrainable
from pipeline.methods.serac_training import SeracTraining
from pipeline.methods.trainable import Shapes, Trainable
from pipeline.planning.edit_memory import editor_outline
from pipeline.planning.flops import (
    ModelSize,
    RowTokens,
    entering_flops,
    leaving_flops,
    matrix_entries,
    scoring_flops,
)
from pipeline.planning.outline import ModelOutline
from pipeline.prompts import encode_targets, token_ids, tokenize_edits

_FLOAT, _DOUBLE = 4, 8
_WEIGHT_BYTES = 130
"""Bytes that go through memory for an entry of an edited weight that an update changes and a loss
has a gradient in: its edited copy, two gradients in float64 and their sum, their product with the
update. Counted in the code, not measured."""
_PARAMETER_BYTES = 20
"""The same for a parameter on a worker: loaded, its gradient made and added."""
_STEP_BYTES = 120
"""The same on the reducer: handed out, gradients added, clipped, Adam's moments, moved."""


@dataclass(frozen=True)
class Cost:
    """What a piece takes, or the reducer.

    Attributes:
        passes: FLOP of passes through models.
        network: FLOP of an editor that is a network of its own.
        double: FLOP in float64.
        touched: bytes that go through memory one by one.
    """

    passes: float = 0.0
    network: float = 0.0
    double: float = 0.0
    touched: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass(frozen=True)
class StepWork:
    """A step, or a measurement of as many examples.

    Attributes:
        passes: what every pass hands to the workers, piece by piece.
        reducer: of all passes.
        out: bytes that workers are given, the same ones for all.
        back: bytes that they return.
        largest: tokens of the piece that has the most in rows that are run at once.
    """

    passes: tuple[tuple[Cost, ...], ...]
    reducer: Cost
    out: float
    back: float
    largest: RowTokens


class TrainingCount(ABC):
    """Counts steps of one training.

    Args:
        trainable: what is trained.
        model: the model's shapes.
        tokenizer: its tokenizer.
        layers: the edited layers.
        module: the editor's modules, without their numbers.
    """

    def __init__(
        self,
        trainable: Trainable,
        model: ModelOutline,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int],
        module: nn.Module,
    ) -> None:
        self.trainable, self.model, self.tokenizer = trainable, model, tokenizer
        self.size, self.layers, self.module = ModelSize.of(model), tuple(layers), module
        self.parameters = sum(weight.numel() for weight in module.parameters())
        self.state_bytes = sum(
            tensor.numel() * tensor.dtype.itemsize for tensor in module.state_dict().values()
        )
        self.weights = {layer: model.hidden_size * model.key_size(layer) for layer in layers}

    @abstractmethod
    def step(self, pieces: Sequence[Sequence[Any]], *, learns: bool) -> StepWork:
        """Count a step of these pieces, or a measurement on them."""

    def of_reducer(self, pieces: int, *, learns: bool) -> Cost:
        """Handing parameters out, adding gradients of all pieces and making the step."""
        step = _STEP_BYTES + 3 * _FLOAT * (pieces - 1) if learns else 0
        return Cost(touched=step * self.parameters + 2 * self.state_bytes)


class NetworkCount(TrainingCount):
    """MEND and KE: a piece is some batches, each of which a worker makes the updates of."""

    trainable: HyperTrainable

    def __init__(
        self,
        trainable: HyperTrainable,
        model: ModelOutline,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int],
    ) -> None:
        shapes = Shapes(model.hidden_size, {layer: model.key_size(layer) for layer in layers})
        with torch.device("meta"):
            network = trainable.network(shapes)
        super().__init__(trainable, model, tokenizer, layers, network)

    def step(self, pieces: Sequence[Sequence[Any]], *, learns: bool) -> StepWork:
        found = [self._piece(batches, learns=learns) for batches in pieces]
        return StepWork(
            (tuple(cost for cost, _ in found),),
            self.of_reducer(len(pieces), learns=learns),
            self.state_bytes,
            len(pieces) * self.parameters * _FLOAT if learns else 0.0,
            max((largest for _, largest in found), key=lambda rows: rows.tokens),
        )

    def _piece(
        self, batches: Sequence[Sequence[EditExample]], *, learns: bool
    ) -> tuple[Cost, RowTokens]:
        examples = [example for batch in batches for example in batch]
        edits, losses, largest = self.losses(examples, learns=learns)
        cost = edits + losses + self._networks(examples, learns=learns)
        touched = len(batches) * sum(self.weights.values()) * _WEIGHT_BYTES
        touched += self.state_bytes * 2
        if learns:
            touched += len(batches) * self.parameters * _PARAMETER_BYTES
        return cost + Cost(touched=touched), largest

    def losses(
        self, examples: Sequence[EditExample], *, learns: bool
    ) -> tuple[Cost, Cost, RowTokens]:
        """Factors of the edits; both losses, with the gradients in the weights; the most rows."""
        first, size = self.layers[0], self.size
        edited = _total(self.edit_rows(examples))
        asked = _total(self._asked(examples))
        left = _total(self._left(examples))
        factors = entering_flops(size, edited, first)
        factors += leaving_flops(size, edited, first, backward=True)
        passes = sum(
            entering_flops(size, rows, first) + leaving_flops(size, rows, first, backward=learns)
            for rows in (asked, left)
        )
        # The unedited model has been asked first what it makes of what is left alone.
        passes += leaving_flops(size, left, first, backward=False)
        double = sum(
            2.0 * (self.counted(asked, layer) + self.counted(left, layer)) * entries
            for layer, entries in self.weights.items()
        )
        largest = max((edited, asked, left), key=lambda rows: rows.tokens)
        return Cost(factors), Cost(passes, double=double if learns else 0.0), largest

    def counted(self, rows: RowTokens, layer: int) -> int:
        """Rows of keys and gradients of a layer; the last block computes those that are read."""
        return rows.read if layer == len(self.size.blocks) - 1 else rows.tokens

    def edit_rows(self, examples: Sequence[EditExample]) -> list[RowTokens]:
        """Of the edits themselves."""
        contexts = self.trainable.spec.method.contexts or ("{}",)
        requests = [example.edit for example in examples]
        edits = tokenize_edits(self.tokenizer, requests, contexts, self.model.answers)
        return [RowTokens.of_target(edit) for edit in edits]

    def _asked(self, examples: Sequence[EditExample]) -> list[RowTokens]:
        rows = asked_rows(self.tokenizer, examples, self.model.answers)
        return [RowTokens.of_target(row) for row in rows]

    def _left(self, examples: Sequence[EditExample]) -> list[RowTokens]:
        rows = kept_rows(
            self.tokenizer,
            examples,
            self.model.answers,
            max_tokens=self.trainable.train.max_tokens,
            answers_only=self.trainable.answers_only,
        )
        return [RowTokens(len(row.ids), len(row.places), len(row.source or ())) for row in rows]

    @abstractmethod
    def _networks(self, examples: Sequence[EditExample], *, learns: bool) -> Cost:
        """The network's own work for some edits: forwards, and once more with its gradients."""


class MendCount(NetworkCount):
    """Every token's factors go through the network, and are multiplied.

    In float64, where they are fewer numbers than the product, and with its graph in float32.
    """

    module: MendNetwork

    def _networks(self, examples: Sequence[EditExample], *, learns: bool) -> Cost:
        rows, cost = _total(self.edit_rows(examples)), Cost()
        batch_size = self.trainable.train.batch_size
        assert batch_size is not None
        batches = len(examples) / batch_size
        for layer, entries in self.weights.items():
            counted, d = self.counted(rows, layer), self.model.hidden_size
            product = 2.0 * counted * entries
            network = counted * mapping_flops(self.module, layer, 1, learns=learns)
            if learns:
                network += 3 * product
            is_wide = counted * (d + entries // d) >= batches * entries
            cost += Cost(network=network + (product if is_wide else 0.0))
            cost += Cost(double=0.0 if is_wide else product)
        return cost


class KnowledgeEditorCount(NetworkCount):
    """The edit is read in words, and its gradient is gated."""

    module: KnowledgeEditorNetwork

    def _networks(self, examples: Sequence[EditExample], *, learns: bool) -> Cost:
        network, greedy = 0.0, 0.0
        width, gates = matrix_entries(self.module.lstm), matrix_entries(self.module.gates)
        edits = self.edit_rows(examples)
        prompts = token_ids(self.tokenizer, [example.edit.text for example in examples])
        targets = [example.edit.target_new for example in examples]
        answers = encode_targets(self.tokenizer, targets, self.model.answers)
        for prompt, answer in zip(prompts, answers, strict=True):
            words = len(prompt) + 2 * len(answer) + 2
            network += width * words + gates + matrix_entries(self.module.condition)
            greedy += self._greedy(len(prompt), len(answer))
        rows = _total(edits)
        double = sum(
            2.0 * self.counted(rows, layer) * entries for layer, entries in self.weights.items()
        )
        return Cost(greedy, (8.0 if learns else 2.0) * network, double * (1 + int(learns)))

    def _greedy(self, prompt: int, answer: int) -> float:
        """The model's own answer, for each token of which all before it run again."""
        begun, source = (1, prompt) if self.size.encoder else (prompt, 0)
        return sum(scoring_flops(self.size, begun + made, 1, source) for made in range(answer))


class MalmenCount(NetworkCount):
    """Factors come to the reducer in a first pass, gradients in the weights in a second."""

    module: MalmenNetwork

    def step(self, pieces: Sequence[Sequence[Any]], *, learns: bool) -> StepWork:
        found = [self.losses(examples, learns=learns) for examples in pieces]
        dense = sum(self.weights.values())
        tried = Cost(touched=dense * _WEIGHT_BYTES)
        rows = _total([row for examples in pieces for row in self.edit_rows(examples)]).read
        factors = sum(
            rows * (self.model.hidden_size + self.model.key_size(layer)) * _FLOAT
            for layer in self.layers
        )
        slopes = len(pieces) * dense * _DOUBLE if learns else 0
        return StepWork(
            (tuple(edits for edits, _, _ in found), tuple(loss + tried for _, loss, _ in found)),
            self._reducer(rows, len(pieces), learns=learns),
            dense * _FLOAT,
            factors + slopes,
            max((largest for _, _, largest in found), key=lambda rows: rows.tokens),
        )

    def _networks(self, examples: Sequence[EditExample], *, learns: bool) -> Cost:
        raise NotImplementedError("the reducer has the network")

    def _reducer(self, rows: int, pieces: int, *, learns: bool) -> Cost:
        """The update of the whole batch, and the network's gradient from those in the weights."""
        step = Cost(touched=_STEP_BYTES * self.parameters if learns else 0)
        dense = sum(self.weights.values())
        added = Cost(touched=dense * _DOUBLE * (3 * (pieces - 1) + 2) if learns else dense * _FLOAT)
        total = step + added
        for layer in self.layers:
            d, f = self.model.hidden_size, self.model.key_size(layer)
            # For the update, and again by hand.
            times = 2 if learns else 1
            network = rows * mapping_flops(self.module, layer, times, learns=learns)
            double = regression_flops(rows, f, d, forms_product=True)
            if learns:
                double += regression_flops(rows, f, d, forms_product=False)
                double += division_flops(rows, f, d)
            total += Cost(network=network, double=double)
        return total


class SeracCount(TrainingCount):
    """Classifier and h go forwards and backwards, with gradients in all their parameters."""

    trainable: SeracTraining

    def __init__(
        self,
        trainable: SeracTraining,
        model: ModelOutline,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int],
    ) -> None:
        outline = editor_outline(trainable.spec.method.serac, model)
        super().__init__(trainable, model, tokenizer, layers, outline.module)
        self.outline = outline

    def step(self, pieces: Sequence[Sequence[Any]], *, learns: bool) -> StepWork:
        found = [self._piece(examples, learns=learns) for (examples,) in pieces]
        return StepWork(
            (tuple(cost for cost, _ in found),),
            self.of_reducer(len(pieces), learns=learns),
            self.state_bytes,
            len(pieces) * self.parameters * _FLOAT if learns else 0.0,
            max((rows for _, rows in found), key=lambda rows: rows.tokens),
        )

    def _piece(self, examples: Sequence[Example], *, learns: bool) -> tuple[Cost, RowTokens]:
        prompts, targets = [one.prompt for one in examples], [one.target for one in examples]
        asked = token_ids(self.tokenizer, [one.inside for one in examples])
        outside = token_ids(self.tokenizer, [one.outside for one in examples])
        answers = encode_targets(self.tokenizer, targets, self.model.answers)
        texts = (*token_ids(self.tokenizer, prompts), *answers, *asked, *outside)
        embedded = sum(map(len, texts))
        passes = 2.0 * self.outline.classifier * embedded
        passes += 2.0 * self.outline.head * 3 * len(examples)
        form = Counterfactual(self.model, self.tokenizer)
        edits = form.edit_ids(prompts, targets)
        behind = sum(len(form.behind(*both)) for both in zip(edits, asked, strict=True))
        read = sum(map(len, answers))
        rows = RowTokens(read, read, behind)
        if not self.model.answers.is_apart:
            rows = RowTokens(behind + read - len(examples), read)
        passes += scoring_flops(self.outline.answering, rows.tokens, read, rows.source)
        touched = 2.0 * self.state_bytes + (self.parameters * _PARAMETER_BYTES if learns else 0)
        largest = RowTokens(max(rows.tokens, embedded), read, rows.source)
        return Cost((3.0 if learns else 1.0) * passes, touched=touched), largest


COUNTS: Mapping[str, Callable[..., TrainingCount]] = {
    "mend": MendCount,
    "malmen": MalmenCount,
    "ke": KnowledgeEditorCount,
    "serac": SeracCount,
}


def mapping_flops(
    network: MendNetwork | MalmenNetwork, layer: int, forwards: int, *, learns: bool
) -> float:
    """FLOP of mapping a row of a layer so many times, and once more with gradients if it learns.

    The rows themselves need none.
    """
    stacks = network.stacks
    stack: Any = stacks.of_shape[shape_name(stacks.normalisers.sizes[layer])]
    entries = sum(block.down.numel() + block.up.numel() for block in stack.blocks)
    back = 6.0 * entries - 2.0 * stack.blocks[0].down.numel() if learns else 0.0
    return 2.0 * forwards * entries + back


def regression_flops(rows: int, key_size: int, hidden_size: int, *, forms_product: bool) -> float:
    """FLOP of a `RidgeSystem` and its regression, whose factors may be multiplied after it.

    Triangular solves count as products, an inverse of a factored matrix 2 F^3 / 3.
    """
    n, f, d = rows, key_size, hidden_size
    m = min(n, f)
    found = 2.0 * m * n * f + m**3 / 3
    found += 2.0 * n * n * d if n < f else 2.0 * n * f * d + 2.0 * f**3 / 3
    return found + (2.0 * m * f * d if forms_product else 0.0)


def division_flops(rows: int, key_size: int, hidden_size: int) -> float:
    """FLOP of MALMEN's gradients by hand behind its regression: in the values and in the ridge."""
    n, f, d = rows, key_size, hidden_size
    divided = 4.0 * n * f * d + 2.0 * n * n * d if n < f else 2.0 * f * f * d
    return divided + 2.0 * min(n, f) * f * d + 2.0 * n * f * d


def _total(rows: Sequence[RowTokens]) -> RowTokens:
    return sum(rows, RowTokens(0, 0))
