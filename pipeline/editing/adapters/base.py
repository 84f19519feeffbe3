"""Adapters: what an editor puts beside a model's weights, which it leaves to the bit.

An `Update` and an `Adapter` are the two kinds of `Change` (`pipeline.editing.update`): both belong
to a block, are applied and taken out by `EditedWeights`, and are kept as files of a run. An adapter
is an increment: what a round adds. All increments of a kind at a block make one by `joined`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from pipeline.errors import InputError
from pipeline.models.editable import EditableModel


@dataclass(frozen=True)
class Adapter(ABC):
    """Tensors and settings that make a module beside a block.

    Attributes:
        kind: the name under which it is stored (`pipeline.editing.adapters.KINDS`).
        parts: its tensors, on the CPU, float32 where they are numbers that are computed with.
        settings: what JSON can hold, and `parts` do not say.
    """

    kind: ClassVar[str]

    parts: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    @abstractmethod
    def joined(cls, increments: Sequence[Self]) -> Self:
        """One adapter that does what some rounds' increments, in their order, do together.

        Raises:
            ValueError: their settings differ.
        """

    @abstractmethod
    def attach(self, model: EditableModel, layer: int) -> Callable[[], None]:
        """Put it beside a block of a model; call what is returned to take it off again."""

    @abstractmethod
    def problem(self) -> str | None:
        """What keeps tensors and settings that were read from being such an adapter."""

    @abstractmethod
    def misfit(self, model: EditableModel, layer: int) -> str | None:
        """What keeps it from being put beside a block of this model."""

    def merge(self, model: EditableModel, layer: int) -> None:
        """Write it into the model's own weights, which then need no adapter.

        Raises:
            InputError: this kind, or this architecture, does not allow it.
        """
        raise InputError(f"an adapter of kind {self.kind!r} cannot be merged into weights")

    def norm(self) -> float:
        """Root of the sum of squares of all its numbers."""
        floating = [part for part in self.parts.values() if part.is_floating_point()]
        return math.sqrt(sum(float(part.double().square().sum()) for part in floating))
