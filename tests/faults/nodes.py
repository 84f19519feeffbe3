"""A Ray cluster of several nodes on this machine, whose processes can be found and killed."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
_ACTORS = ("EditWorker", "Reducer")
_CONFIG = {
    # Values, keys and updates of the tiny model are small enough for Ray to send them inside its
    # messages. With this they lie in a node's object store, as those of a real model do, and are
    # lost with it.
    "max_direct_call_object_size": 256,
    # Ray gives its workers the lowest priority but four: on a busy machine they hardly start.
    "worker_niceness": 0,
}


@dataclass(frozen=True)
class Actor:
    """A process of the job: `EditWorker` or `Reducer`, and what it is doing (empty if nothing)."""

    process: int
    raylet: int
    kind: str
    method: str


class Nodes:
    """A head without processors and `count` nodes of one processor each.

    Args:
        count: how many nodes; one more than workers leaves room when a node has died.
        memories: bytes of memory that the first nodes announce; others announce what is free.
    """

    def __init__(self, count: int = 3, memories: Sequence[int] = ()) -> None:
        self.count, self.memories = count, memories
        self._joined: list[Any] = []
        with _workers_importing_tests():
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "include_dashboard": False,
                    "_system_config": _CONFIG,
                },
            )
        self.restore()

    @property
    def address(self) -> str:
        """HOST:PORT for `cluster.address`."""
        return str(self._cluster.address)

    def restore(self) -> None:
        """Clear away dead nodes and start others in their place, as an autoscaler would."""
        for node in list(self._cluster.worker_nodes):
            # This also reaps it: workers of a zombie would believe that their raylet lives.
            if node.all_processes["raylet"][0].process.poll() is not None:
                self._cluster.remove_node(node, allow_graceful=False)
        with _workers_importing_tests():
            for number in range(len(self._cluster.worker_nodes), self.count):
                given = number < len(self.memories)
                announced = {"memory": self.memories[number]} if given else {}
                self._joined.append(self._cluster.add_node(num_cpus=1, **announced))

    def actors(self) -> list[Actor]:
        """The job's processes, as their titles say."""
        raylets = {_raylet(node) for node in self._cluster.list_all_nodes()}
        return [actor for actor in actors_here() if actor.raylet in raylets]

    def raylets(self) -> list[int]:
        """The processes of the nodes but the head, in the order in which they joined."""
        return [_raylet(node) for node in self._joined if node in self._cluster.worker_nodes]

    def kill_node(self, raylet: int) -> bool:
        """SIGKILL to every process of a node; false for the head, which the drivers live on."""
        for node in list(self._cluster.worker_nodes):
            if _raylet(node) == raylet:
                self._cluster.remove_node(node, allow_graceful=False)
                return True
        return False

    def is_worker_node(self, raylet: int) -> bool:
        """Whether this raylet is a node's other than the head's."""
        return any(_raylet(node) == raylet for node in self._cluster.worker_nodes)

    def wait_until_idle(self, seconds: float = 60.0) -> list[Actor]:
        """Wait for all of a job's processes to end; return those that have not."""
        return wait_until_idle(self.actors, seconds)

    def close(self) -> None:
        """End all of it, at once."""
        for node in list(self._cluster.worker_nodes):
            self._cluster.remove_node(node, allow_graceful=False)
        self._cluster.shutdown()


@contextmanager
def _workers_importing_tests() -> Iterator[None]:
    """Raylets hand their environment on to the workers that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        yield


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def actors_here() -> list[Actor]:
    """The processes of all jobs on this machine, whatever their cluster."""
    found = [_actor(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()]
    return [actor for actor in found if actor is not None]


def wait_until_idle(actors: Callable[[], list[Actor]], seconds: float) -> list[Actor]:
    """Wait until there are no such processes; return those that are left."""
    deadline = time.monotonic() + seconds
    while (left := actors()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _actor(process: int) -> Actor | None:
    """What Ray has written into the title of a process: `ray::EditWorker.values`, say."""
    try:
        title = Path(f"/proc/{process}/cmdline").read_bytes().decode().strip("\0 ")
        if not title.startswith("ray::"):
            return None
        kind, _, method = title.removeprefix("ray::").partition(".")
        return Actor(process, _parent(process), kind, method) if kind in _ACTORS else None
    except OSError:  # it has just ended
        return None


def kill(process: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process, which may have ended meanwhile."""
    with suppress(ProcessLookupError):
        os.kill(process, number)
