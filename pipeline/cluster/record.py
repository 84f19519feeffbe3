"""What a job writes about itself: manifest, edits, summary, the edited model and its card."""

import platform
import shutil
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.cluster.covariance import Covariances
from pipeline.cluster.plan import Plan
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.scheduler import Scheduler
from pipeline.cluster.worker import WorkerDescription
from pipeline.evaluation.metrics import summarise
from pipeline.model_card import write_model_card
from pipeline.requests import RequestRow
from pipeline.results.store import RunStore

_PACKAGES = ("editfleet", "torch", "transformers", "ray", "pyarrow", "tokenizers")


def begin_run(
    plan: Plan,
    worker: WorkerDescription,
    contexts: tuple[str, ...],
    covariances: Covariances,
    num_workers: int,
) -> RunStore:
    """Make the run directory with a manifest that says exactly what is going to be done."""
    method = plan.spec.method.model_copy(update={"contexts": contexts})
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
            "model": {
                "path": spec.model.path,
                "revision": spec.model.revision,
                "fingerprint": worker.fingerprint,
                "dtype": worker.dtype,
            },
            "covariance": {
                "directory": str(covariances.directory),
                "tokens": {str(layer): count for layer, count in covariances.tokens.items()},
            },
            "workers": {
                "count": num_workers,
                "threads": worker.threads,
                "device": worker.device,
                "device_reason": worker.device_reason,
            },
            "versions": {
                "python": platform.python_version(),
                **{package: _version(package) for package in _PACKAGES},
            },
        },
    )


def edit_rows(rows: list[RequestRow], failures: dict[str, str], round: int) -> list[dict[str, Any]]:
    """One row of edits/ for every request that was read."""
    return [_edit_row(row, failures, round) for row in rows]


def finish_run(
    store: RunStore, progress: PhaseProgress, memory: list[dict[str, int]]
) -> dict[str, Any]:
    """Write summary.json, close the manifest, and return the summary."""
    statuses = Counter(store.read_parts("edits")["status"].to_pylist())
    seconds = {name: round(value, 3) for name, value in progress.seconds.items()}
    summary = {
        "name": store.manifest["name"],
        "requests": {
            status: statuses.get(status, 0)
            for status in ("applied", "rejected", "conflict", "failed")
        },
        "evaluation": summarise(store.read_parts("metrics")),
        "seconds": seconds,
    }
    store.write_json("summary.json", summary)
    sizes: Counter[str] = Counter()
    for part in store.parts():
        sizes[part.kind] += part.bytes
    store.update_manifest(
        status="finished",
        finished=_now(),
        seconds=seconds,
        bytes=dict(sizes),
        peak_worker_memory_bytes=memory,
    )
    return summary


def save_edited_model(store: RunStore, scheduler: Scheduler, applied: int) -> None:
    """Write the edited model with its card to model/, which is there whole or not at all."""
    temporary, final = store.path / ".model.tmp", store.path / "model"
    shutil.rmtree(temporary, ignore_errors=True)
    scheduler.call("save_model", str(temporary.resolve()), version=scheduler.version)
    write_model_card(temporary, store.manifest, applied)
    temporary.rename(final)


def _edit_row(row: RequestRow, failures: dict[str, str], round: int) -> dict[str, Any]:
    case_id = row.fields["case_id"]
    assert case_id is not None
    if row.status == "accepted":
        reason = failures.get(case_id, "")
        status = "failed" if reason else "applied"
    else:
        status, reason = row.status, row.reason
    return {"round": round, **row.fields, "status": status, "reason": reason}


def _version(package: str) -> str | None:
    """The installed version; None for Ray on a machine without it, or a bare source checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
