"""A driver in a process of its own: `editfleet edit`, on which deaths at set moments are wished.

    python -m tests.faults.driver SPEC DEATHS

DEATHS is JSON, a list of `Death`. Whatever has to die kills itself, by SIGKILL, so that the moment
is exact; each death comes once, also over several drivers of one run.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import ray

from pipeline.cli import main
from pipeline.cluster import ray_engine
from pipeline.cluster.progress import PhaseProgress, Ticker
from tests.faults import job

Victim = Literal["worker", "reducer", "node", "keys", "driver"]
Moment = Literal["entry", "answer"]


@dataclass(frozen=True)
class Death:
    """One death.

    Attributes:
        mark: a file that is made when it comes.
        victim: `worker` or `reducer`; `node` is that of a worker; `keys` is the node that holds the
            keys which the reducer is about to be sent; `driver`.
        at: a method of the victim; of the driver the end of a phase.
        moment: before the method has done anything, or when its work is done but not answered.
        number: which call of the method, from 0, in a process's life or at a weight version.
        version: only at this weight version.
    """

    mark: str
    victim: Victim
    at: str
    moment: Moment = "entry"
    number: int = 0
    version: int | None = None

    def come(self) -> None:
        """Kill this process, or its node and this process; nothing if that has been done before."""
        if self.is_due():
            if self.victim == "node":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def is_due(self) -> bool:
        """Whether nobody has died this death yet; only the first who asks is told so."""
        try:
            Path(self.mark).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def mortal(base: type, deaths: list[Death]) -> type:
    """The class with methods that kill their process."""
    calls: Counter[tuple[str, Any]] = Counter()

    def replaced(method: str) -> Any:
        original = getattr(base, method)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            version = kwargs.get("version")
            number = calls[method, version]
            calls[method, version] += 1
            due = [d for d in deaths if d.at == method and d.number == number]
            due = [d for d in due if d.version in (None, version)]
            for death in due:
                if death.moment == "entry":
                    death.come()
            result = original(self, *args, **kwargs)
            for death in due:
                death.come()
            return result

        return call

    return type(base.__name__, (base,), {death.at: replaced(death.at) for death in deaths})


class KeyLosingEngine(ray_engine.RayEngine):
    """Kills the node that holds the keys of a shard just before the reducer is sent them."""

    deaths: list[Death]
    adds = 0

    def reduce(self, method: str, *args: Any) -> Any:
        """Call the reducer and wait."""
        for death in self.deaths if method == "add" else []:
            if self.adds == death.number and death.is_due():
                self._kill_the_node_of(args[1])
        type(self).adds += method == "add"
        return super().reduce(method, *args)

    def _kill_the_node_of(self, keys: Any) -> None:
        (holder,) = ray.experimental.get_object_locations([keys])[keys]["node_ids"]
        for worker in self._workers:
            node, raylet = ray.get(worker.__ray_call__.remote(_whereabouts))
            if node == holder:
                os.kill(raylet, signal.SIGKILL)
                # Until the cluster knows: the keys are gone for sure, and so is their worker.
                while any(n["Alive"] and n["NodeID"] == holder for n in ray.nodes()):
                    time.sleep(0.05)
                return
        raise AssertionError(f"no worker lives on node {holder}, which holds the keys")


def _whereabouts(_worker: Any) -> tuple[str, int]:
    return ray.get_runtime_context().get_node_id(), os.getppid()


def _arrange(deaths: list[Death]) -> None:
    of = {victim: [d for d in deaths if d.victim == victim] for victim in get_args(Victim)}
    replaced = {
        "EditWorker": mortal(ray_engine.EditWorker, of["worker"] + of["node"]),
        "Reducer": mortal(ray_engine.Reducer, of["reducer"]),
        "RayEngine": KeyLosingEngine,
    }
    for name, replacement in replaced.items():
        setattr(ray_engine, name, replacement)
    KeyLosingEngine.deaths = of["keys"]
    phase = PhaseProgress.phase

    @contextmanager
    def deadly_phase(self: Any, name: str, *args: Any) -> Iterator[Ticker]:
        with phase(self, name, *args) as ticker:
            yield ticker
        for death in of["driver"]:
            if death.at == name:
                death.come()

    setattr(PhaseProgress, "phase", deadly_phase)  # noqa: B010 - an assignment needs its type


if __name__ == "__main__":
    _arrange([Death(**death) for death in json.loads(sys.argv[2])])
    with job.small_probe_shards():
        main(["edit", sys.argv[1]])
