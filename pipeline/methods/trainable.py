"""What an editor that has to be trained is to the job that trains it (`cluster/learning.py`).

A `Trainable` has two halves. `Learner`s on the workers say what some examples want of the
parameters; the `Trainer` on the reducer adds that up, in the plan's order, and makes the step. So
the same spec gives the same bits on any number of workers. A step takes one pass over its pieces,
or several where what a pass says has to be put together before the next one can begin.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.editing.update import EditedWeights
from pipeline.methods.edit_examples import EditExample, Targets, draw_examples
from pipeline.requests import EditRequest
from pipeline.spec import JobSpec

State = dict[str, Tensor]


@dataclass(frozen=True)
class Contribution:
    """What a piece of a step says.

    Attributes:
        count: examples in it.
        measures: name -> sum over these examples; `loss` is what is made small.
        gradients: parameter -> gradient of the summed loss.
        rest: whatever else the trainer has to know.
    """

    count: int
    measures: Mapping[str, float]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    rest: Any = None


@dataclass(frozen=True)
class Measured:
    """A step, or a measurement, over all its examples: their number and each measure's mean."""

    count: int
    measures: Mapping[str, float]


@dataclass(frozen=True)
class Shapes:
    """What the trainer has to know of the model, which it has not got.

    Attributes:
        hidden_size: D.
        key_sizes: layer -> F of its down-projection.
    """

    hidden_size: int
    key_sizes: Mapping[int, int]


class Learner(ABC):
    """The worker's half."""

    @abstractmethod
    def contribute(
        self, items: Sequence[Any], number: int, shared: Any, *, learns: bool
    ) -> Contribution:
        """Say what a piece's items want.

        Args:
            items: a piece of `Trainable.pieces`.
            number: of the pass, from 0.
            shared: what the trainer gave out for this pass.
            learns: whether a step is to be made of it; else only measures count.
        """


class Trainer(ABC):
    """The reducer's half: parameters and optimiser."""

    @abstractmethod
    def begin(self, *, learns: bool) -> Any:
        """Begin a step, or a measurement; return what the calls of its first pass are given."""

    @abstractmethod
    def add(self, part: Contribution) -> None:
        """Take what a piece says; pieces come in order."""

    def end_pass(self, number: int) -> Any:
        """Return what the calls of the next pass are given, once all pieces of this one are in."""
        raise NotImplementedError("of one pass only")

    @abstractmethod
    def end(self) -> Measured:
        """Make the step of what was added, if this is one; what it was like before it.

        Raises:
            ValueError: a loss or a gradient is not finite.
        """

    @abstractmethod
    def validated(self, measured: Measured) -> int:
        """Take note of a measurement; return how many there have been since the best one."""

    @property
    @abstractmethod
    def since_best(self) -> int:
        """The same, asked for again."""

    @abstractmethod
    def state(self) -> State:
        """Everything that going on needs, to the same bits: parameters, optimiser, best ones."""

    @abstractmethod
    def editor(self) -> State:
        """The parameters to save: of the best measurement, or of now if there has been none."""


class Trainable(ABC):
    """An editor that has to be trained before it edits.

    Args:
        spec: the resolved job spec, with `train`.
    """

    passes = 1
    """Passes over the pieces of a step."""

    published: Mapping[str, Any] = {}
    """Settings of `train` that were published for it, or where nothing was, those that it has."""

    def __init__(self, spec: JobSpec) -> None:
        assert spec.train is not None, "a training has settings"
        self.spec, self.train = spec, spec.train

    @abstractmethod
    def pieces(
        self,
        requests: Sequence[EditRequest],
        others: Sequence[EditRequest],
        texts: Sequence[str],
        generator: random.Random,
    ) -> list[tuple[Any, ...]]:
        """Make a step's examples and cut them for the workers, whatever their number.

        Args:
            requests: those of the step, `batch_size` times `accumulate` of them.
            others: all that may be drawn from, for what is to be left alone.
            texts: of `train.corpus`; none if it names none.
            generator: draws; seeded by the step.

        Raises:
            InputError: there is nothing to make them from.
        """

    def drawn(
        self,
        requests: Sequence[EditRequest],
        others: Sequence[EditRequest],
        texts: Sequence[str],
        generator: random.Random,
    ) -> list[EditExample]:
        """Make an example of each request, as `train` says; arguments as of `pieces`."""
        if self.train.draw_targets != "none":
            targets = Targets(others, old=self.train.draw_targets == "all")
            requests = [targets.redirected(request, generator) for request in requests]
        share = self.train.own_prompt_share
        assert share is not None, "decided by resolve_training"
        return draw_examples(requests, others, texts, generator, own_prompt_share=share)

    @abstractmethod
    def learner(self, weights: EditedWeights, tokenizer: PreTrainedTokenizerBase) -> Learner:
        """The half of a worker with an unedited model, which it leaves as it was."""

    @abstractmethod
    def trainer(self, shapes: Shapes, state: State | None) -> Trainer:
        """The half of the reducer; `state` is that of a checkpoint to go on from."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings of `method` that the saved editor depends on."""
