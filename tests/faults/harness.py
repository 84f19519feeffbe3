"""Trials: a driver on a cluster, killed or robbed of its processes, resumed until it is through."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.faults.driver import Death
from tests.faults.job import Job
from tests.faults.nodes import ROOT, Actor, kill

# Nobody waits for ever, but four imports of torch on a busy machine take their time.
PATIENCE_SECONDS = 900.0
_SIGNALLED = {128 + number: number for number in (signal.SIGINT, signal.SIGTERM)}


class HangingError(Exception):
    """A driver neither ends nor goes on."""


class Place(Protocol):
    """A cluster that jobs are tried on."""

    @property
    def address(self) -> str:
        """HOST:PORT for `cluster.address`."""
        ...

    def restore(self) -> None:
        """Start nodes in the place of dead ones, where that is wanted."""
        ...

    def wait_until_idle(self, seconds: float = 60.0) -> list[Actor]:
        """Wait for all of a job's processes to end; return those that have not."""
        ...


@dataclass
class Ended:
    """How a driver ended: its exit code (negative: the signal) and what it said."""

    code: int
    log: str

    @property
    def is_killed(self) -> bool:
        """Whether it was killed or told to end; else it has ended by itself."""
        return self.code == -signal.SIGKILL or self.code in _SIGNALLED


@dataclass
class Trial:
    """One run on the way to its end, over as many drivers as it takes.

    Args:
        job: what is run.
        nodes: the cluster.
        output: the run directory.
        deaths: that processes die by themselves; see driver.py.
        cluster: settings of it beside the address.
    """

    job: Job
    nodes: Place
    output: Path
    deaths: Sequence[Death] = ()
    cluster: Mapping[str, Any] = field(default_factory=dict)
    ends: list[Ended] = field(default_factory=list)
    _process: "subprocess.Popen[bytes] | None" = None

    def __post_init__(self) -> None:
        self.spec = self.job.spec_file(self.output, address=self.nodes.address, **self.cluster)
        self._log = self.output.with_name(f"{self.output.name}.log")

    @property
    def driver(self) -> int:
        """The process of the driver under way."""
        assert self._process is not None
        return self._process.pid

    @property
    def code(self) -> int:
        """The exit code of the driver, which has ended."""
        assert self._process is not None and self._process.returncode is not None
        return self._process.returncode

    def start(self) -> None:
        """Start a driver; the first begins the run, others go on with it."""
        self._began = time.monotonic()
        deaths = json.dumps([asdict(death) for death in self.deaths])
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.driver", str(self.spec), deaths],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def reach(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; false when the driver has ended before.

        Raises:
            HangingError: the driver does neither; it is killed.
        """
        assert self._process is not None
        while not condition():
            if self._process.poll() is not None:
                return False
            if time.monotonic() - self._began > PATIENCE_SECONDS:
                kill(self.driver)
                self._process.wait()
                raise HangingError(f"the driver hangs; its log ends:\n{self.tail()}")
            self.nodes.restore()
            time.sleep(0.005)
        return True

    def wait(self) -> Ended:
        """Wait for the driver to end."""
        self.reach(lambda: False)
        assert self._process is not None
        ended = Ended(self._process.returncode, self._log.read_text(errors="replace"))
        self.ends.append(ended)
        return ended

    def problems(self) -> list[str]:
        """What is wrong after the last driver has ended, the codes and words of all included."""
        last = self.ends[-1]
        # One request cannot be edited, which is what 2 means.
        found = [] if last.code == 2 else [f"exit code {last.code}: {self.tail()}"]
        found += [f"traceback: {end.log[-2000:]}" for end in self.ends if _is_untidy(end)]
        if left := self.nodes.wait_until_idle():
            found.append(f"left behind: {left}")
        return found + self.job.problems(self.output)

    def tail(self) -> str:
        """The last lines of the driver's log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])


def _is_untidy(end: Ended) -> bool:
    """Whether the log of a driver shows a traceback: no user should see one."""
    return "Traceback" in end.log


def until_complete(trial: Trial, *, at_most: int = 10) -> int:
    """Start drivers until one ends by itself; return how many it took."""
    for number in range(1, at_most + 1):
        trial.start()
        if not trial.wait().is_killed:
            return number
    raise HangingError(f"not complete after {at_most} drivers")
