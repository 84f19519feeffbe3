"""Methods that make updates from gradients of the target's loss."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from pipeline.editing.calibration import BankGradients
from pipeline.editing.descent import Step
from pipeline.editing.gradients import Factors, TargetGradients, Tokens
from pipeline.editing.targets import Read
from pipeline.editing.update import Change, EditedWeights
from pipeline.methods.base import Method
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts

T = TypeVar("T")
State = dict[str, Tensor]


class LaidOut(Protocol):
    """Edits as rows whose gradients can be taken again and again.

    `keeps` says whether what lower blocks make of them is kept, and may be set before the first
    time; `num_bytes` is what that takes.
    """

    keeps: bool

    @property
    def num_bytes(self) -> int: ...


class GradientMethod(Method, ABC):
    """Takes gradients of a round's edits on all workers, step by step, and makes updates of them.

    The steps are the same whatever the number of workers: `batches` says which edits a step is of,
    and the reducer adds their factors in that order to what `begin` has returned.
    """

    tokens: Tokens = "all"
    """Whose factors count."""

    read: Read = "target_tokens"
    """Where a target is predicted."""

    epochs = 1
    """Times that every edit is gone through at most."""

    def gradients(
        self, model: EditableModel, edits: Sequence[EditPrompts], max_tokens: int, *, keeps: bool
    ) -> "LaidOut":
        """Lay out edits for their gradients, which are taken every epoch anew."""
        return TargetGradients(model, edits, self.layers, self.read, max_tokens, keeps)

    def factors(
        self, laid_out: Any, weights: EditedWeights, changes: Any
    ) -> Factors | BankGradients:
        """Take the gradients of edits.

        Args:
            laid_out: what `gradients` returned for them.
            weights: the model's weights as the round before left them.
            changes: what the steps so far have changed, as `Step.changes`; None before the first.
        """
        with weights.tried(changes or {}):
            found: Factors = laid_out.factors(self.tokens)
        return found

    def batches(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """What each step of an epoch is of, in order."""
        yield items

    @abstractmethod
    def begin(
        self, weights: Mapping[int, Tensor], pristine: Mapping[int, Tensor], state: State | None
    ) -> "Making":
        """Begin a round.

        Args:
            weights: layer -> (D, F) float64, as the round before left it.
            pristine: the same of the unedited model.
            state: what the round before left behind, for a method that `remembers`.
        """

    def is_done(self, epoch: Sequence[Step]) -> bool:
        """Whether these steps, an epoch's, were the last ones."""
        return True


class Making(ABC):
    """A round's updates in the making."""

    @abstractmethod
    def add(self, factors: Any) -> None:
        """Take the factors of some edits of the next step."""

    @abstractmethod
    def step(self) -> Step:
        """Do a step with what was added since the last one.

        Raises:
            ValueError: the factors make no update.
        """

    @abstractmethod
    def finish(self) -> tuple[Mapping[int, Change], State]:
        """The changes of all layers, and what the next round has to know (empty as a rule)."""
