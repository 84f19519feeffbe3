"""A computation recorded once as a CUDA graph and replayed: one launch instead of thousands."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.editing.memory import is_out_of_memory

log = logging.getLogger(__name__)

Outputs = tuple[Tensor, ...]
# Libraries set themselves up in the first runs, which a capture may not contain.
_WARM_UPS = 2
_TOLERANCE = 1e-2


class Replay:
    """A recorded function of one tensor.

    Args:
        compute: a function without side effects that never waits for the device; the tensors that
            it reads must stay where they are.
        given: an argument to record it with; later ones have its shape and type.

    Raises:
        RuntimeError: it cannot be recorded, or what is replayed differs from what was computed.
    """

    def __init__(self, compute: Callable[[Tensor], Outputs], given: Tensor) -> None:
        self._given = given.detach().clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                expected = compute(self._given)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = compute(self._given)
        self._graph.replay()
        for replayed, computed in zip(self._outputs, expected, strict=True):
            difference = (replayed.float() - computed.float()).norm()
            if not bool(difference <= _TOLERANCE * computed.float().norm()):
                raise RuntimeError("what is replayed differs from what was computed")

    def __call__(self, given: Tensor) -> Outputs:
        """Replay with another argument; the outputs are overwritten by the next call."""
        self._given.copy_(given)
        self._graph.replay()
        return self._outputs


class Recorder:
    """Records where it can, and says once where it cannot.

    Args:
        is_wanted: record at all.
    """

    def __init__(self, is_wanted: bool) -> None:
        self.is_wanted = is_wanted

    def record(self, compute: Callable[[Tensor], Outputs], given: Tensor) -> Replay | None:
        """Record a computation; None where it has to be run as it is.

        Raises:
            torch.OutOfMemoryError: memory ran out.
        """
        if not self.is_wanted:
            return None
        try:
            return Replay(compute, given)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.give_up(str(error).split("\n")[0])
            return None

    def give_up(self, reason: str) -> None:
        """Record no more, and say why."""
        log.warning("values are searched without CUDA graphs: %s", reason)
        self.is_wanted = False
