"""Several studies on one replica of the model: the worker of jobs that run side by side."""

from collections.abc import Sequence
from typing import Any

from pipeline.cluster.worker import EditWorker, Replica, WorkerDescription
from pipeline.spec import JobSpec


class WorkerHost:
    """One replica that serves a study after another, each with its own updates in the weights.

    A change of study writes the edited weights anew, which costs little beside a shard of work.
    Memory: a copy of the edited weights and of their sum of updates a study, beside the model.

    Args:
        specs: resolved specs, of one model.
        threads: compute threads.

    Raises:
        InputError: the model cannot be loaded or is not supported.
    """

    def __init__(self, specs: Sequence[JobSpec], threads: int) -> None:
        replica = Replica(specs[0].model, threads, specs[0].cluster.gpus_per_worker)
        self.workers = [
            EditWorker(_with_its_share(spec, len(specs)), threads, replica) for spec in specs
        ]
        self._active = 0

    def describe(self) -> WorkerDescription:
        """Report model, device and the shapes of the first study."""
        return self.workers[0].describe()

    def call(self, study: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of a study's `EditWorker`, with that study's weights in the model."""
        if study != self._active:
            self.workers[self._active].weights.lay_down()
            self._active = study
            self.workers[study].weights.take_up()
        return getattr(self.workers[study], method)(*args, **kwargs)


def _with_its_share(spec: JobSpec, studies: int) -> JobSpec:
    """Hidden states of all studies together have the room that the spec gives a worker."""
    share = {"hidden_states_gb": spec.cluster.hidden_states_gb / studies}
    return spec.model_copy(update={"cluster": spec.cluster.model_copy(update=share)})
