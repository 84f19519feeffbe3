"""Methods that put modules beside the weights, which stay as they are."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pipeline.editing.adapters import Adapter
from pipeline.methods.base import Method
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts
from pipeline.results.listing import TableKind


@dataclass(frozen=True)
class Scene:
    """What a piece of a round's edits is made on.

    Attributes:
        model: the model, with the adapters of the rounds before attached.
        before: layer -> what those rounds have put beside it, joined.
        memory_ND: queries of the unedited model that were asked for, float32.
        max_tokens: tokens in one pass with gradients.
    """

    model: EditableModel
    before: dict[int, Adapter]
    memory_ND: Tensor
    max_tokens: int


@dataclass(frozen=True)
class Made:
    """What a piece of a round's edits has become.

    Attributes:
        adapters: every edited layer -> its increment, empty where there is nothing to do.
        rows: one row of the method's table an edit, without its round and case_id.
    """

    adapters: dict[int, Adapter]
    rows: list[dict[str, Any]]


class AdapterMethod(Method, ABC):
    """Makes of a round's edits an increment of an adapter, piece by piece on the workers.

    The edits of a round are made on the model of the round before, each by itself; a round's
    increment is that of its pieces, joined in the plan's order.
    """

    table: ClassVar[TableKind]
    """Where a row an edit is written."""

    edits_of_a_piece: ClassVar[int] = 16
    """Edits that a worker makes at once; part of the result's last bits."""

    @property
    def num_queries(self) -> int:
        """Queries of the unedited model at the edited block that it remembers; 0 for none."""
        return 0

    @abstractmethod
    def make(self, scene: Scene, edits: Sequence[EditPrompts], seeds: Sequence[int]) -> Made:
        """Make the increments of some edits, possibly none.

        Args:
            scene: what they are made on.
            edits: tokenised requests.
            seeds: one of each edit's own, for what is drawn.

        Raises:
            ValueError: an edit cannot be made; the others are then tried without it.
        """


def join(pieces: Sequence[dict[int, Adapter]]) -> dict[int, Adapter]:
    """One increment a layer, of those of several pieces in their order."""
    return {
        layer: type(adapter).joined([piece[layer] for piece in pieces])
        for layer, adapter in pieces[0].items()
    }


def seed_of(seed: int, case_id: str) -> int:
    """An edit's own seed, whatever is edited beside it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {case_id}".encode()).digest()[:8]) >> 1
