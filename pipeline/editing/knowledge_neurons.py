"""Knowledge neurons: which of a fact's neurons are edited, and how their weights change.

Method: Dai et al., "Knowledge Neurons in Pretrained Transformers" (arXiv 2104.08696, sections 3.2
and 5). A neuron's *value* is its column of the down-projection, what it adds to the hidden state
when it is 1.

Shapes: P prompts, L blocks, F neurons of a block, n edited neurons of one block, D hidden size.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.editing.attribution import Attributions
from pipeline.editing.update import Update

Operation = Literal["update", "erase", "enhance"]
Scaling = Literal["value_norm", "none"]

# By so much the share of prompts is lowered or raised at a time.
_SHARE_STEP = 0.05
_ROUNDING = 1e-9


class Neuron(NamedTuple):
    """One input of a block's down-projection."""

    layer: int
    number: int


@dataclass(frozen=True)
class Candidate:
    """A neuron above the threshold in some prompt of a fact.

    Attributes:
        neuron: which.
        attribution: mean over all prompts.
        agreeing: prompts in which it is above the threshold.
    """

    neuron: Neuron
    attribution: float
    agreeing: int


@dataclass(frozen=True)
class Candidates:
    """A fact's candidates, in order of block and neuron.

    Attributes:
        neurons: the candidates.
        prompts: prompts that were asked.
        answer: token ids of the answer that was attributed.
    """

    neurons: tuple[Candidate, ...]
    prompts: int
    answer: tuple[int, ...]


def find_candidates(found: Attributions, layers: Sequence[int], threshold: float) -> Candidates:
    """The neurons whose attribution is above `threshold` times the largest one of a prompt.

    Where no neuron of a prompt has a positive attribution, that prompt names none.
    """
    most = found.scores.amax(dim=(1, 2), keepdim=True)
    above = (found.scores > threshold * most) & (most > 0)
    agreeing, mean = above.sum(dim=0), found.scores.mean(dim=0)
    neurons = tuple(
        Candidate(Neuron(layers[row], number), float(mean[row, number]), int(agreeing[row, number]))
        for row, number in agreeing.nonzero().tolist()
    )
    return Candidates(neurons, len(found.scores), found.answer)


def refine(found: Candidates, share: float, fewest: int, most: int) -> tuple[Candidate, ...]:
    """The candidates that a share of the prompts agrees on, adapted until they are few enough.

    The share is lowered by 0.05 while there are fewer than `fewest`, or raised by that while there
    are more than `most`, at the latest to one prompt or to all. Where a step leads from too many to
    too few, the smaller set counts, unless it is empty.
    """
    chosen = _agreed(found, share)
    while len(chosen) < fewest and share > _SHARE_STEP + _ROUNDING:
        share -= _SHARE_STEP
        more = _agreed(found, share)
        if chosen and len(more) > most:
            return chosen
        chosen = more
    while len(chosen) > most and share < 1.0 - _ROUNDING:
        share = min(1.0, share + _SHARE_STEP)
        fewer = _agreed(found, share)
        if not fewer:
            break
        chosen = fewer
    return chosen


def _agreed(found: Candidates, share: float) -> tuple[Candidate, ...]:
    least = share * found.prompts - _ROUNDING
    return tuple(candidate for candidate in found.neurons if candidate.agreeing >= least)


def sharing_facts(
    neurons: Sequence[Iterable[Neuron]], relations: Sequence[str | None]
) -> list[dict[Neuron, float]]:
    """For every fact, what share of its relation's other facts has each of its neurons.

    Zero where a fact names no relation, or is the only one of it.
    """
    holders: dict[str, Counter[Neuron]] = defaultdict(Counter)
    sizes = Counter(relation for relation in relations if relation)
    for own, relation in zip(neurons, relations, strict=True):
        if relation:
            holders[relation].update(own)
    return [
        {
            neuron: (holders[relation][neuron] - 1) / max(1, sizes[relation] - 1)
            if relation
            else 0.0
            for neuron in own
        }
        for own, relation in zip(neurons, relations, strict=True)
    ]


@dataclass(frozen=True)
class NeuronEdit:
    """What becomes of some neurons of one block for one fact.

    Attributes:
        numbers: the neurons.
        old, new: token ids of the answers.
    """

    numbers: tuple[int, ...]
    old: tuple[int, ...]
    new: tuple[int, ...]


@dataclass(frozen=True)
class NeuronSettings:
    """How values change; names and meaning as in the job spec's `method.kn`."""

    operation: Operation
    scaling: Scaling
    old_weight: float
    new_weight: float


def neuron_update(
    weight_DF: Tensor, embeddings_VD: Tensor, edits: Sequence[NeuronEdit], settings: NeuronSettings
) -> Update:
    """The update of one block: nothing but its edited neurons' values changes.

    `update` takes old_weight e(old) from a value and adds new_weight e(new), e an answer's row of
    the output embedding (the mean over its tokens); with the scaling `value_norm` both are first
    brought to the value's length. A neuron of several facts gets the sum of what each asks for, all
    relative to the value before. `erase` sets values to 0, `enhance` doubles them.

    Args:
        weight_DF: the block's weight as it is.
        embeddings_VD: the output embedding, whose rows have the size of a hidden state.
        edits: in the order in which they are added up; none gives an update of rank 0.
        settings: how.
    """
    order = sorted({number for edit in edits for number in edit.numbers})
    place = {number: column for column, number in enumerate(order)}
    values = weight_DF[:, order].double()
    if settings.operation == "update":
        left = torch.zeros_like(values)
        for edit in edits:
            for number in edit.numbers:
                value = values[:, place[number]]
                left[:, place[number]] += _asked(value, embeddings_VD, edit, settings)
    else:
        left = -values if settings.operation == "erase" else values
    right = torch.zeros(len(order), weight_DF.shape[1], dtype=torch.float64, device=values.device)
    right[range(len(order)), order] = 1.0
    return Update.of(left, right)


def _asked(
    value: Tensor, embeddings_VD: Tensor, edit: NeuronEdit, settings: NeuronSettings
) -> Tensor:
    old, new = (embeddings_VD[list(ids)].double().mean(dim=0) for ids in (edit.old, edit.new))
    if settings.scaling == "value_norm":
        old, new = (value.norm() * answer / answer.norm() for answer in (old, new))
    return settings.new_weight * new - settings.old_weight * old
