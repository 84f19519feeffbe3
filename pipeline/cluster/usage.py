"""What editing takes of a process: seconds, and memory beyond what it held before."""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass
class Usage:
    """Seconds and peak memory of some calls, those that edit.

    Memory is counted from what the process holds when this is made: of a worker that is the model
    and its libraries. The resident peak is Linux's (VmHWM), which is set back before each counted
    call; where the system has none, `resident` stays None.

    Attributes:
        seconds: of all counted calls.
        resident: bytes of main memory at the peak beyond the beginning.
        device: the same on a GPU.
    """

    seconds: float = 0.0
    resident: int | None = None
    device: int = 0

    def __post_init__(self) -> None:
        _give_back_what_is_free()
        self._resident = _status("VmRSS")
        self._device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a call."""
        has_peak = _reset_peaks()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
            if has_peak and self._resident is not None:
                peak = (_status("VmHWM") or 0) - self._resident
                self.resident = max(self.resident or 0, peak)
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated() - self._device
                self.device = max(self.device, peak)

    def as_dict(self) -> dict[str, float | int | None]:
        """As it stands in a run's manifest."""
        return {"seconds": self.seconds, "resident": self.resident, "device": self.device}


def _give_back_what_is_free() -> None:
    """Let the system have the memory that earlier work has freed, which would hide what is new."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reset_peaks() -> bool:
    """Set the peaks back to what is held now; whether the resident one is known here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    """An entry of /proc/self/status in bytes; None where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{name}:")]
    return int(found[0].split()[1]) * 1024 if found else None
