"""What a job writes about itself: manifest, edits, summary, the edited model and its card."""

import logging
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.covariance import Covariances
from pipeline.cluster.general import held_out_entry
from pipeline.cluster.plan import Plan, cut_probes
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.rounds import BASELINE_ROUND
from pipeline.cluster.scheduler import Scheduler
from pipeline.errors import JobFailedError
from pipeline.evaluation.summary import summarise_job
from pipeline.model_card import write_model_card
from pipeline.requests import RequestRow
from pipeline.results.recorded import RecordedRun, check_recorded
from pipeline.results.seconds import read_seconds
from pipeline.results.store import MANIFEST, RunStore
from pipeline.spec import MethodSpec, parse_spec

log = logging.getLogger(__name__)

_PACKAGES = ("editfleet", "torch", "transformers", "ray", "pyarrow", "tokenizers")


def begin_run(
    plan: Plan,
    worker: WorkerDescription,
    method: MethodSpec,
    covariances: Covariances | None,
    num_workers: int,
) -> RunStore:
    """Make the run directory with a manifest that says exactly what is going to be done.

    `method` holds what the unedited model has decided of the plan's: contexts and norm anchor.
    """
    generated = plan.spec.method.contexts is None
    measured = plan.spec.method.measures_anchor
    spec = plan.spec.model_copy(update={"method": method})
    return RunStore.create(
        spec.run_path,
        {
            "name": spec.name,
            "status": "running",
            "started": _now(),
            "spec": spec.model_dump(mode="json"),
            "spec_sha256": spec.digest(),
            "settings_source": plan.settings_source,
            "contexts_source": "generated" if generated else "spec",
            "anchor_source": "measured" if measured else "spec",
            **plan_entries(plan),
            "model": {
                "path": spec.model.path,
                "revision": spec.model.revision,
                "fingerprint": worker.fingerprint,
                "dtype": worker.dtype,
            },
            "covariance": None if covariances is None else _covariance_entry(covariances),
            "workers": _workers(worker, num_workers),
            "versions": package_versions(),
        },
        spec.place,
    )


def go_on(store: RunStore, worker: WorkerDescription, num_workers: int) -> None:
    """Write into the manifest of an earlier run that a driver has taken it up again."""
    entry = {
        "at": _now(),
        "workers": _workers(worker, num_workers),
        "versions": package_versions(),
    }
    resumed = [*store.manifest.get("resumed", []), entry]
    store.update_manifest(status="running", stopped=None, resumed=resumed)


def stop_run(store: RunStore, progress: PhaseProgress, error: BaseException) -> None:
    """Write into the manifest that the job ended before it was finished, and why."""
    failed = isinstance(error, Exception)
    try:
        store.update_manifest(
            status="failed" if failed else "interrupted",
            stopped={"at": _now(), "reason": _reason(error) if failed else "interrupted"},
            seconds=_rounded(progress.seconds),
        )
    except OSError as problem:
        # A full disk is likely why the job ends; its own error says more.
        log.warning("%s: cannot write down that the job has ended: %s", store.place, problem)


@contextmanager
def recording_end(
    store: Callable[[], RunStore | None], progress: PhaseProgress, path: Path
) -> Iterator[None]:
    """Write into the run's manifest why the block ended early, if it does and the run has begun.

    Raises:
        JobFailedError: in the place of an OSError, such as that of a full disk.
    """
    try:
        yield
    except BaseException as error:
        if (begun := store()) is not None:
            stop_run(begun, progress, error)
        if isinstance(error, OSError):
            raise JobFailedError(
                f"{error}; what was finished is kept in {path}, and the same command goes on from"
                " there"
            ) from error
        raise


def plan_entries(plan: Plan) -> dict[str, Any]:
    """What a manifest says about the requests and how they are cut, to be compared on resuming."""
    shards = cut_probes(plan.rounds.probes(BASELINE_ROUND))
    rounds = {} if plan.spec.rounds is None else {"rounds": len(plan.rounds.shards)}
    return {
        "requests": {
            "count": len(plan.rows),
            "accepted": plan.num_requests,
            "sha256": plan.requests_digest(),
        },
        "plan": {
            "shards": len(plan.shards),
            "probes": sum(len(shard.items) for shard in shards),
            "probe_shards": len(shards),
            **rounds,
        },
        "held_out": held_out_entry(plan.held_out),
    }


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result can depend on."""
    packages = {package: _version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **packages}


def edit_rows(
    rows: list[RequestRow], failures: dict[str, str], notes: dict[str, str], round: int
) -> list[dict[str, Any]]:
    """One row of edits/ for every request that was read; `notes` are reasons of applied ones."""
    return [_edit_row(row, failures, notes, round) for row in rows]


def finish_run(
    store: RunStore,
    progress: PhaseProgress,
    memory: list[dict[str, Any]],
    reducers: list[dict[str, Any]],
    status: str = "finished",
) -> dict[str, Any]:
    """Write summary.json, close the manifest, and return the summary.

    Args:
        store: the run.
        progress: its seconds.
        memory: what each worker took.
        reducers: what the reducers took, where that was counted.
        status: how it ended.
    """
    study = store.manifest["spec"]["rounds"]
    is_study = study is not None
    seconds = _rounded(progress.seconds)
    rounds = [entry.model_dump() for entry in read_seconds(store.path)] if is_study else None
    summary = {
        "name": store.manifest["name"],
        **summarise_job(
            store.read_parts("edits"),
            store.read_parts("metrics"),
            store.read_parts("general"),
            rounds,
            rolled_back=is_study and study["rollback"],
        ),
        "seconds": seconds,
    }
    store.write_json("summary.json", summary)
    sizes: Counter[str] = Counter()
    for part in store.parts():
        sizes[part.kind] += part.bytes
    store.update_manifest(
        status=status,
        finished=_now(),
        seconds=seconds,
        bytes=dict(sizes),
        peak_worker_memory_bytes=memory,
        reducers_used=reducers,
    )
    return summary


def save_edited_model(store: RunStore, scheduler: Scheduler, applied: int) -> None:
    """Write the edited model with its card to model/, which is there whole or not at all."""
    temporary, final = store.path / ".model.tmp", store.path / "model"
    shutil.rmtree(final, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)
    recorded = check_recorded(store.manifest, RecordedRun, store.path / MANIFEST)
    spec = parse_spec(recorded.spec, f"{store.path / MANIFEST}: spec")
    try:
        scheduler.call("save_model", str(temporary.resolve()), version=scheduler.version)
        _require_here(temporary, store.place)
        write_model_card(temporary, spec, recorded, applied)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _covariance_entry(covariances: Covariances) -> dict[str, Any]:
    return {
        "directory": str(covariances.directory),
        "tokens": {str(layer): count for layer, count in covariances.tokens.items()},
        "sha256": covariances.digests(),
    }


def _require_here(model: Path, place: str) -> None:
    """Check that the worker wrote the model where this machine finds it.

    Raises:
        JobFailedError: it did not.
    """
    if not (model / "config.json").is_file():
        raise JobFailedError(
            f"{place}: a worker on another machine wrote model/ to {model.parent}, which this one"
            " does not share; set output.path (at a URL output.staging) to a directory that all"
            " machines share, or leave output.save_model out and use `editfleet export`"
        )


def _edit_row(
    row: RequestRow, failures: dict[str, str], notes: dict[str, str], round: int
) -> dict[str, Any]:
    case_id = row.fields["case_id"]
    assert case_id is not None
    if row.status == "accepted":
        status = "failed" if case_id in failures else "applied"
        reason = failures.get(case_id) or notes.get(case_id, "")
    else:
        status, reason = row.status, row.reason
    return {"round": round, **row.fields, "status": status, "reason": reason}


def _workers(worker: WorkerDescription, num_workers: int) -> dict[str, Any]:
    return {
        "count": num_workers,
        "threads": worker.threads,
        "device": worker.device,
        "device_reason": worker.device_reason,
    }


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _version(package: str) -> str | None:
    """The installed version; None for Ray on a machine without it, or a bare source checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
