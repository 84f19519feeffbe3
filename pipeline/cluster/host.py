"""Several studies on one replica of the model: the worker of jobs that share one, and its reducer.

What a study's calls take for editing is counted (`pipeline.cluster.usage`), so that its cost can be
told whatever ran beside it or before it.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.cluster.calls.base import Replica
from pipeline.cluster.reducer import Reducer
from pipeline.cluster.usage import Usage
from pipeline.cluster.worker import EditWorker
from pipeline.spec import JobSpec, MethodSpec

_NOT_EDITING = frozenset(
    {
        "describe",
        "prepare",
        "generate_contexts",
        "set_contexts",
        "set_anchor_norm",
        "covariance",
        "queries",
        "set_queries",
        "assessment",
        "evaluate",
        "measure_general",
        "embedding_deviation",
        "trace",
        "save_model",
        "peak_memory",
    }
)
"""Methods of a worker whose time and memory are not those of an edit."""


class WorkerHost:
    """One replica that serves a study after another, each with its own updates in the weights.

    A change of study writes the edited weights anew, which costs little beside a shard of work.
    Memory: a copy of the edited weights and of their sum of updates for each study that is under
    way, beside the model.

    Args:
        specs: resolved specs, of one model.
        threads: compute threads.
        at_once: how many studies are under way at the same time, each from its first call to `end`.

    Raises:
        InputError: the model cannot be loaded or is not supported.
    """

    def __init__(self, specs: Sequence[JobSpec], threads: int, at_once: int) -> None:
        self._replica = Replica(specs[0].model, threads, specs[0].cluster.gpus_per_worker)
        self._specs, self._threads, self._at_once = specs, threads, at_once
        self._workers: dict[int, tuple[EditWorker, Usage]] = {}
        self._active: int | None = None

    def describe(self) -> str:
        """Say that the model is here: its fingerprint."""
        return self._replica.fingerprint

    def worker(self, study: int) -> EditWorker:
        """A study's worker, with that study's weights in the model."""
        if study != self._active:
            self._lay_down()
            if study not in self._workers:
                self._workers[study] = self._begin(study)
            self._workers[study][0].weights.take_up()
            self._active = study
        return self._workers[study][0]

    def end(self, study: int) -> None:
        """Forget a study, whose weights leave the model."""
        if study == self._active:
            self._lay_down()
        self._workers.pop(study, None)

    def call(self, study: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of a study's `EditWorker`, with that study's weights in the model."""
        bound = getattr(self.worker(study), method)
        usage = self._workers[study][1]
        if method == "peak_memory":
            return {**bound(), "editing": usage.as_dict()}
        if method in _NOT_EDITING:
            return bound(*args, **kwargs)
        with usage.counted():
            return bound(*args, **kwargs)

    def _begin(self, study: int) -> tuple[EditWorker, Usage]:
        usage = Usage()
        spec = _with_its_share(self._specs[study], self._at_once)
        return EditWorker(spec, self._threads, self._replica), usage

    def _lay_down(self) -> None:
        """Leave the model unedited."""
        if self._active is not None:
            self._workers[self._active][0].weights.lay_down()
            self._active = None


class ReducerHost:
    """A process whose reducer is now one study's, now another's."""

    def __init__(self) -> None:
        self._reducer: Reducer | None = None

    def serve(self, method: MethodSpec, threads: int) -> None:
        """Be the reducer of a study from now on; what was before is dropped."""
        self._reducer = None
        self._usage = Usage()
        self._reducer = Reducer(method, threads)

    def call(self, method: str, *args: Any) -> Any:
        """Call the reducer."""
        with self._usage.counted():
            return getattr(self._reducer, method)(*args)

    def used(self) -> dict[str, float | int | None]:
        """What the study's calls took."""
        return self._usage.as_dict()


def _with_its_share(spec: JobSpec, studies: int) -> JobSpec:
    """Hidden states of all studies together have the room that the spec gives a worker."""
    share = {"hidden_states_gb": spec.cluster.hidden_states_gb / studies}
    return spec.model_copy(update={"cluster": spec.cluster.model_copy(update=share)})
