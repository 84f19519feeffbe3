"""What a method knows of the rounds so far, and checkpoints of a training: tensors on disk."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import ResultsDamagedError
from pipeline.results.store import RunStore


def write_state(store: RunStore, state: dict[str, Tensor], *, round: int, layer: int) -> str:
    """Write a round's state, of all layers, under the lowest one's number; return the name."""
    described = {"layer": str(layer), "round": str(round)}
    return store.write_tensors("state", state, round=round, layer=layer, metadata=described)


def write_checkpoint(store: RunStore, state: dict[str, Tensor], *, steps: int) -> str:
    """Write what a training needs to go on after so many steps; return the name."""
    described = {"steps": str(steps)}
    return store.write_tensors("checkpoint", state, round=steps, layer=0, metadata=described)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a round's state, or a checkpoint.

    Raises:
        ResultsDamagedError: the file holds no tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ResultsDamagedError(f"{path} is not a file of a method's state: {error}") from error
