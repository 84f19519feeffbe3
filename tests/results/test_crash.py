"""Processes that are killed, or run out of disk, for real."""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import FrameType
from typing import Any

from pipeline.results import RunStore, atomic, listing, store

PRELUDE = dedent(
    """
    import errno, itertools, os, resource, sys
    from pathlib import Path
    from pipeline.results import RunStore

    def write(run, shard, text):
        rows = [{"round": 0, "case_id": text, "status": "applied"}] * 2
        run.write_part("edits", rows, round=0, shard=shard, weight_version=0)

    root = Path(sys.argv[1])
    """
)


def rows(text: str) -> list[dict[str, Any]]:
    return [{"round": 0, "case_id": text, "status": "applied"}] * 2


def start(script: str, path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + dedent(script), str(path)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )


def contents(run: RunStore) -> dict[int, str]:
    """The text of each listed shard; checks that every part is whole."""
    run.verify()
    texts = run.read_parts("edits")["case_id"].to_pylist()
    assert texts[::2] == texts[1::2]
    shards = [part.shard for part in run.parts("edits")]
    assert [int(text.split()[0]) for text in texts[::2]] == shards
    return {int(text.split()[0]): text for text in texts[::2]}


def snapshots_at_every_line(run: Path, job: Callable[[], None], snapshots: Path) -> list[Path]:
    """Run the job; copy the run directory, where it changed, before each line of our own code.

    A copy is what a process killed there leaves behind: bytes that Python still buffers are
    not in it.
    """
    watched = {module.__file__ for module in (atomic, listing, store)}
    copies: list[Path] = []
    seen: set[tuple[tuple[str, bytes], ...]] = set()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in watched:
            return None
        files = sorted(file for file in run.rglob("*") if file.is_file())
        state = tuple((str(file), file.read_bytes()) for file in files)
        if state not in seen and run.is_dir():
            seen.add(state)
            copies.append(Path(shutil.copytree(run, snapshots / str(len(copies)))))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        job()
    finally:
        sys.settrace(before)
    return copies


def test_a_crash_at_any_line_of_the_protocol(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def job() -> None:
        run = RunStore.create(path, {"status": "running"})
        for shard, text in [(0, "0 first"), (1, "1 first"), (0, "0 again")]:
            run.write_part("edits", rows(text), round=0, shard=shard, weight_version=0)
        run.update_manifest(status="complete")

    copies = snapshots_at_every_line(path, job, tmp_path)
    states: list[tuple[str | None, str | None, str]] = []
    for copy in [*copies, path]:
        if (copy / "manifest.json").exists():
            run = RunStore.open(copy)
        else:
            run = RunStore.create(copy, {"status": "running"})
        texts = contents(run)
        state = (texts.get(0), texts.get(1), run.manifest["status"])
        if not states or states[-1] != state:
            states.append(state)
        # What a resumed job does.
        for shard in {0, 1} - set(texts):
            text = f"{shard} resumed"
            run.write_part("edits", rows(text), round=0, shard=shard, weight_version=0)
        assert set(contents(RunStore.open(copy))) == {0, 1}
    assert states == [
        (None, None, "running"),
        ("0 first", None, "running"),
        ("0 first", "1 first", "running"),
        (None, "1 first", "running"),
        ("0 again", "1 first", "running"),
        ("0 again", "1 first", "complete"),
    ]
    # At least: an empty folder, and before and after each rename and each listing.
    assert len(copies) >= 15


def test_killed_at_any_moment_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunStore.create(path, {})
    generator = random.Random(0)
    written = 0
    for attempt in range(3):
        process = start(
            """
            run = RunStore.open(root)
            print("writing", flush=True)
            for number in itertools.count():
                write(run, number % 7, f"{number % 7} {os.getpid()} {number}")
            """,
            path,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n", attempt
        time.sleep(generator.uniform(0.02, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
        run = RunStore.open(path)
        texts = contents(run)
        # At most the shard that was being rewritten is missing.
        assert len(texts) >= min(written, 6)
        written = max(written, len(texts))
    assert written >= 6


def test_a_full_disk_lists_nothing_half_written(tmp_path: Path) -> None:
    """Files may not grow beyond a limit: first no part fits, then the list breaks off in a line."""
    run = RunStore.create(tmp_path / "run", {})
    process = start(
        """
        def write_until_full(limit, shard):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                for shard in itertools.count(shard):
                    write(run, shard, f"{shard} kept")
            except OSError as error:
                files = sorted(file.name for file in root.rglob("*") if file.is_file())
                tail = listed.read_bytes()[-1:]
                print(errno.errorcode[error.errno], shard, tail == b"\\n", *files)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

        run, listed = RunStore.open(root), root / "manifest.jsonl"
        write(run, 0, "0 kept")
        size, line = run.parts()[0].bytes, len(listed.read_bytes())
        write_until_full(size // 2, 1)
        # Not a multiple of a line's length.
        lines_that_fit = -(-size // line)
        write_until_full(lines_that_fit * line + line // 2, 1)
        print(lines_that_fit)
        write(run, 20, "20 kept")
        """,
        run.path,
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    part_failed, list_failed, lines_that_fit = output.splitlines()
    manifests = "manifest.json manifest.jsonl"
    assert part_failed == f"EFBIG 1 True {manifests} round-00000-shard-00000.parquet"
    # The part that could not be listed any more is an orphan, and the list is cut in its line.
    fit = int(lines_that_fit)
    names = " ".join(f"round-00000-shard-{shard:05d}.parquet" for shard in range(fit + 1))
    assert list_failed == f"EFBIG {fit} False {manifests} {names}"
    shards = [*range(fit), 20]
    assert contents(RunStore.open(run.path)) == {shard: f"{shard} kept" for shard in shards}
