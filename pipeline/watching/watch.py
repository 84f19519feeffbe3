"""What is written down and counted of every phase and every call to a worker."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipeline.cluster.scheduler import Ended
from pipeline.results.timings import Timing, write_timing
from pipeline.spec import JobSpec
from pipeline.watching.metrics import RayMetrics

log = logging.getLogger(__name__)

_PHASES = {
    "values": "values",
    "read_keys": "insertion",
    "apply": "insertion",
    "gradients": "training",
    "attribute": "attribution",
    "change_neurons": "insertion",
    "adapt": "training",
    "queries": "memory",
    "remember": "memory",
    "covariance": "covariance",
    "value_lengths": "anchor",
    "evaluate": "evaluation",
    "measure_general": "general",
}
_OF_A_LAYER = ("read_keys", "apply")


class Counted(Protocol):
    """Somewhere that timings are counted, too."""

    def count(self, timing: Timing) -> None:
        """Count a phase or a call that has ended."""
        ...


class Watch:
    """Writes timings into the run directory, once there is one, and hands them to `counters`.

    Args:
        layers: the edited blocks, in the order of their updates.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = layers
        self.counters: list[Counted] = []
        self._run: Path | None = None
        self._early: list[Timing] = []

    def write_to(self, run: Path) -> None:
        """Write into this run directory from now on, what came before it included."""
        self._run, early, self._early = run, self._early, []
        for timing in early:
            self._write(timing)

    def phase_ended(self, name: str, seconds: float) -> None:
        """Note a phase that has just ended."""
        self._note(Timing(phase=name, start=time.time() - seconds, seconds=seconds))

    def call_ended(self, ended: Ended) -> None:
        """Note a call to a worker that has just ended."""
        round, layer = self._place(ended)
        phase = _PHASES.get(ended.method, ended.method)
        self._note(
            Timing(
                phase="baseline" if phase == "evaluation" and round == -1 else phase,
                call=ended.method,
                start=time.time() - ended.seconds,
                seconds=ended.seconds,
                worker=ended.worker,
                shard=ended.shard,
                items=ended.items,
                round=round,
                layer=layer,
                outcome=ended.outcome,
                retries=ended.retries,
            )
        )

    def _place(self, ended: Ended) -> tuple[int | None, int | None]:
        """The round and the layer: every round has one update a layer, so versions tell."""
        if ended.method not in _OF_A_LAYER:
            return ended.round, None
        assert ended.version is not None
        round, position = divmod(ended.version, len(self.layers))
        return round, self.layers[position]

    def _note(self, timing: Timing) -> None:
        for counter in self.counters:
            counter.count(timing)
        if self._run is None:
            self._early.append(timing)
        else:
            self._write(timing)

    def _write(self, timing: Timing) -> None:
        assert self._run is not None
        try:
            write_timing(self._run, timing)
        except OSError as error:
            # A job is worth more than its timings; what the disk lacks will end it if need be.
            log.warning("timings are not written any more: %s", error)
            self._early, self._run = [], None


def watch_of(spec: JobSpec) -> Watch:
    """Watch a job, with the metrics of Ray where it runs there.

    Args:
        spec: the resolved spec.
    """
    assert spec.method.layers is not None
    watch = Watch(spec.method.layers)
    if spec.cluster.engine == "ray":
        watch.counters.append(RayMetrics(spec.run_path.name))
    return watch
