"""The driver killed before each of its steps on disk: `python -m tests.faults.sweep [--every N]`.

A step is a sync, a rename, a removal, a folder made. Between two steps nothing on disk changes but
the file being written, so these are all the states that a killed driver can leave. A process that
has imported everything forks one driver that kills itself before step n, one that goes on and kills
itself before a random step, and one that finishes and compares; then n grows until no driver dies.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import run_batch_edit
from pipeline.spec import parse_spec
from tests.faults.job import Job, small_probe_shards
from tests.tiny_jobs import TinyJobs

_STEPS = ("fsync", "mkdir", "rename", "replace", "rmdir", "truncate", "unlink")


@contextmanager
def dying_before(step: int) -> Iterator[None]:
    """SIGKILL to this process in place of its step of this number, from 0."""
    left = step

    def mortal(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return original(*args, **kwargs)

        return call

    originals = {name: getattr(os, name) for name in _STEPS}
    for name, original in originals.items():
        setattr(os, name, mortal(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def forked(action: Callable[[], None]) -> int:
    """Do something in a forked process; 0 done, 1 an error, -9 killed."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def sweep(job: Job, every: int, seed: int) -> tuple[int, int]:
    """Kill drivers before each step, or every so many; return how many died, and how many steps.

    Raises:
        AssertionError: a run did not come out as it should.
    """
    chance = random.Random(seed)
    died, step = 0, chance.randrange(every)
    while True:
        output = job.root / f"step-{step}"
        code = forked(lambda output=output, step=step: _edit(job, output, step))  # type: ignore[misc]
        assert code in (0, -signal.SIGKILL), f"step {step}: exit code {code}"
        if code == 0:
            return died, step
        died += 1
        second = chance.randrange(1, 60)
        code = forked(lambda output=output, step=second: _edit(job, output, step))  # type: ignore[misc]
        died += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), f"steps {step}, {second}: exit code {code}"
        code = forked(lambda output=output: _finish(job, output))  # type: ignore[misc]
        assert code == 0, f"steps {step}, {second}: not as undisturbed"
        step += every


def _edit(job: Job, output: Path, step: int | None = None) -> None:
    spec = parse_spec(job.settings(output, engine="in_process"), "the test")
    with small_probe_shards():
        if step is None:
            run_batch_edit(spec)
            return
        with dying_before(step):
            run_batch_edit(spec)


def _finish(job: Job, output: Path) -> None:
    _edit(job, output)
    problems = job.problems(output)
    assert not problems, problems


def main() -> None:
    """Parse the arguments, sweep, say how many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take every so manieth step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="editfleet-sweep-") as name:
        root = Path(name)
        # The undisturbed run is made here: its threads are not there after a fork, and not needed.
        job = Job(TinyJobs(root), root / "sweep", count=6, shards=2, save_model=True)
        died, steps = sweep(job, options.every, options.seed)
    print(f"{died} drivers died before a step, of {steps}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
