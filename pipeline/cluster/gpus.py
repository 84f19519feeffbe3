"""How many GPUs a worker has where the spec leaves it open, and what that follows from."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.errors import InputError
from pipeline.planning.memory import gpu_memory, ordinary_edit
from pipeline.planning.outline import outline
from pipeline.results.planned import at_its_peak
from pipeline.spec import JobSpec

log = logging.getLogger(__name__)

_PARTS = (0.25, 0.5)
# The rest is for a fragmented pool, and for what the estimate leaves out.
_USED_PART = 0.9
# Edits at once for which a GPU must have room: all that are wanted before it is shared, and so many
# before the model is spread over another one, since with fewer a GPU waits for its launches.
_ALL_EDITS, _LEAST_EDITS = 256, 16


@dataclass(frozen=True)
class Gpus:
    """The GPUs that there are.

    Attributes:
        each_bytes: memory of the smallest.
        together: how many one worker can have at most: those of the largest node.
        parts: whether several workers may share one.
    """

    each_bytes: int
    together: int
    parts: bool = True


def settled_here(specs: Sequence[JobSpec]) -> list[JobSpec]:
    """`settled` for the worker of this process, which all these studies share.

    Raises:
        InputError: as of `settled`.
    """
    gpus = visible()
    if gpus is None:
        return list(specs)
    return [settled(specs[0], lambda: gpus, studies=specs), *specs[1:]]


def settled(spec: JobSpec, find: Callable[[], Gpus], *, studies: Sequence[JobSpec] = ()) -> JobSpec:
    """Put a number in the place of `gpus_per_worker: auto`, and say in the log why this one.

    Args:
        spec: the resolved spec.
        find: finds the GPUs that there are, of which there is one at least.
        studies: specs of all studies that share the workers, this one among them.

    Raises:
        InputError: the model does not fit onto as many GPUs as a node has.
    """
    if spec.cluster.gpus_per_worker != "auto":
        return spec
    model, edits = outline(spec.model, device=torch.device("cuda")), [ordinary_edit(spec)]
    specs, asked = studies or (spec,), spec.cluster.value_batch_size

    def need(count: int, batch: int) -> int:
        size = batch if asked == "auto" else min(batch, asked)
        found = [gpu_memory(one, model, edits, size, count) for one in specs]
        # Each study has edited weights of its own; the rest serves them all.
        extra = sum(part["copies of edited weights"] for part in found[1:])
        return max(map(at_its_peak, found)) + extra

    count, reason = choose(need, find(), most=model.num_blocks)
    log.info("cluster.gpus_per_worker: %g, since %s", count, reason)
    cluster = spec.cluster.model_copy(update={"gpus_per_worker": count})
    return spec.model_copy(update={"cluster": cluster})


def visible() -> Gpus | None:
    """The GPUs of this process, which has one worker; None if there are none."""
    count = torch.cuda.device_count()
    if not count:
        return None
    each = min(torch.cuda.get_device_properties(n).total_memory for n in range(count))
    return Gpus(each, count, parts=False)


def visible_bytes() -> int:
    """Memory of the GPU that this process sees; 0 if it sees none."""
    gpus = visible()
    return 0 if gpus is None else gpus.each_bytes


def choose(need: Callable[[int, int], int], gpus: Gpus, *, most: int) -> tuple[float, str]:
    """The least part, or number, of GPUs that a worker fits onto, and why.

    Args:
        need: bytes of the fullest of so many GPUs, with so many edits searched at once.
        gpus: the GPUs that there are.
        most: the model's blocks.

    Raises:
        InputError: not even all of a node's GPUs are enough.
    """
    room = _USED_PART * gpus.each_bytes
    has = f"has {_gigabytes(gpus.each_bytes)}"
    whole = need(1, _ALL_EDITS)
    for part in _PARTS if gpus.parts else ():
        if whole <= part * room:
            return part, f"a worker needs about {_gigabytes(whole)}, and a GPU {has}"
    for count in range(1, min(gpus.together, most) + 1):
        fullest = need(count, _LEAST_EDITS)
        if fullest <= room:
            where = "a worker" if count == 1 else f"of {count} GPUs the fullest"
            return count, f"{where} needs about {_gigabytes(fullest)}, and a GPU {has}"
    raise InputError(
        f"cluster.gpus_per_worker: over {min(gpus.together, most)} GPUs the fullest one needs about"
        f" {_gigabytes(need(min(gpus.together, most), _LEAST_EDITS))} and {has}; take nodes with"
        " more or larger GPUs, a smaller model.dtype, or give a number to try it all the same"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
