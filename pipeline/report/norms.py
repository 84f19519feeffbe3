"""How long the stored updates and adapters are: one number a round and layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ResultsDamagedError
from pipeline.results.reading import Run

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class UpdateNorm:
    """One layer's update or adapter of one round.

    Attributes:
        round: the round, from 0.
        layer: the edited block.
        norm: Frobenius norm; of an adapter, the root of the sum of squares of all its numbers.
        rank: edits that its factors hold; None for a dense matrix and for an adapter.
    """

    round: int
    layer: int
    norm: float
    rank: int | None


def update_norms(run: Run) -> list[UpdateNorm]:
    """Measure every stored update, by round and layer.

    Raises:
        ResultsDamagedError: an update file is damaged.
    """
    from pipeline.editing.update import Update  # imports torch
    from pipeline.results.updates import read_update

    found = []
    for path in run.updates():
        layer, update, metadata = read_update(path)
        is_update = isinstance(update, Update)
        norm, rank = _norm(update.parts) if is_update else (update.norm(), None)
        found.append(UpdateNorm(_round(path, metadata), layer, norm, rank))
    return sorted(found, key=lambda norm: (norm.round, norm.layer))


def _norm(parts: "Mapping[str, Tensor]") -> tuple[float, int | None]:
    """Norm and rank; the factors' product, which may be large, is not formed.

    ||L R||^2 = tr((L^T L) (R R^T)), two N x N matrices.
    """
    if "dense" in parts:
        return float(parts["dense"].double().norm()), None
    left, right = parts["left"].double(), parts["right"].double()
    squared = float(((left.T @ left) * (right @ right.T)).sum())
    return math.sqrt(max(0.0, squared)), left.shape[1]


def _round(path: Path, metadata: Mapping[str, str]) -> int:
    try:
        return int(metadata["round"])
    except (KeyError, ValueError) as error:
        raise ResultsDamagedError(f"{path} does not say which round it is of") from error
