"""A disk that fills up, and a driver that dies at any step on disk: resumed, the same bits.

Damaged and missing parts are in tests/cluster/test_resume.py.
"""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from pipeline import run_batch_edit
from pipeline.errors import EditfleetError, InputError, JobFailedError
from pipeline.spec import parse_spec
from tests.faults.job import Job, small_probe_shards
from tests.tiny_jobs import TinyJobs

ROOT = Path(__file__).parents[2]
PAGE = 4096
FULL = r"(No space left on device|os error 28|File too large|os error 27)"


@pytest.fixture(scope="module")
def small_job(tiny: TinyJobs) -> Job:
    return Job(tiny, tiny.root / "small", count=6, shards=2, save_model=True)


class SmallDisk:
    """A file system in memory of some bytes.

    Args:
        path: where to mount it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, size: int) -> None:
        """Give it this many bytes; a smaller one than what it holds is refused."""
        subprocess.run(["mount", "-o", f"remount,size={size}", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk with room for everything, until it is resized."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small disk: {mounted.stderr.strip()}")
    yield SmallDisk(path)
    # Lazily: covariances that were read from it may still be mapped into memory.
    subprocess.run(["umount", "--lazy", path], check=True)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond this (EFBIG, as at a quota); what is open may."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _edit(job: Job, output: Path, limit: int | None = None) -> None:
    spec = parse_spec(job.settings(output, engine="in_process"), "the test")
    with small_probe_shards(), file_limit(limit) if limit else nullcontext():
        run_batch_edit(spec)


def _used(path: Path) -> int:
    """Bytes in whole pages, as a file system in memory counts them."""
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    return sum(-(-size // PAGE) * PAGE for size in sizes)


def _fails_for_want_of_space(job: Job, output: Path, limit: int | None = None) -> None:
    with pytest.raises(EditfleetError, match=FULL) as caught:
        _edit(job, output, limit)
    assert isinstance(caught.value, InputError | JobFailedError) and "\n" not in str(caught.value)
    assert not [file for file in output.rglob("*.tmp") if file.is_file()]


@pytest.mark.parametrize("share", [0.0, 0.15, 0.4, 0.75])
def test_a_full_disk_ends_the_job_and_more_room_finishes_it(
    small_job: Job, disk: SmallDisk, share: float
) -> None:
    """Full at the start, among the covariances, in the run, and while the model is written."""
    _fill_up(small_job, disk, PAGE + int(share * _used(small_job.root)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_disk_can_be_full_at_any_page(small_job: Job, disk: SmallDisk) -> None:
    """Every size from nothing to enough, in one run directory after the other."""
    whole = _used(small_job.root)
    for size in range(PAGE, whole, PAGE):
        for path in (disk.path / "run", disk.path / "run-covariances"):
            subprocess.run(["rm", "-rf", path], check=True)
        _fill_up(small_job, disk, size)


def _fill_up(job: Job, disk: SmallDisk, size: int) -> None:
    output = disk.path / "run"
    disk.resize(size)
    _fails_for_want_of_space(job, output)
    disk.resize(64 << 20)
    _edit(job, output)
    assert job.problems(output) == []


def test_a_disk_that_fills_up_a_little_more_each_time(small_job: Job, disk: SmallDisk) -> None:
    """A run that is resumed again and again, and gets some pages further each time."""
    output, size, times = disk.path / "run", PAGE, 0
    whole = _used(small_job.root)
    while size < whole:
        disk.resize(size)
        _fails_for_want_of_space(small_job, output)
        size, times = size + max(16 * PAGE, whole // 10), times + 1
    disk.resize(64 << 20)
    _edit(small_job, output)
    assert small_job.problems(output) == [] and times > 5


@pytest.mark.parametrize("limit", [100, 5000])
def test_files_that_may_not_grow_end_the_job(small_job: Job, tmp_path: Path, limit: int) -> None:
    """Needs no rights, unlike a small disk."""
    output = tmp_path / "run"
    _fails_for_want_of_space(small_job, output, limit)
    _edit(small_job, output)
    assert small_job.problems(output) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_driver_dies_before_any_step_on_disk() -> None:
    """See sweep.py; in a process of its own, since drivers are forked from it."""
    command = [sys.executable, "-m", "tests.faults.sweep"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    swept = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert swept.returncode == 0, swept.stdout + swept.stderr
    found = re.search(r"^(\d+) drivers died before a step, of (\d+)", swept.stdout, re.MULTILINE)
    assert found is not None and int(found[1]) >= int(found[2]) > 50
