"""Logging a finished run to MLflow or Weights & Biases, through their own libraries.

Where to is theirs to say (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT, WANDB_MODE,
...). A run that is logged again goes on with the entry that it has there.
"""

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import EditfleetError, InputError
from pipeline.report.reading import flattened
from pipeline.results.atomic import write_atomically
from pipeline.results.place import TRACKED
from pipeline.results.reading import read
from pipeline.results.remote import writing_into

_PROJECT = "editfleet"
_ARTIFACTS = ("summary.json", "report.html")
# MLflow refuses longer values of parameters.
_LONGEST_PARAMETER = 6000


@dataclass(frozen=True)
class Tracked:
    """What is logged of a run.

    Attributes:
        name: the run's name.
        settings: every setting as resolved, dotted names to text.
        metrics: round (-1 is the unedited model) -> metric -> value.
        final: what the whole run has one of: seconds by phase, requests by status.
        artifacts: files.
    """

    name: str
    settings: dict[str, str]
    metrics: dict[int, dict[str, float]]
    final: dict[str, float]
    artifacts: tuple[Path, ...]

    @classmethod
    def of(cls, run: str | Path) -> "Tracked":
        """Read a run, in its directory or at its URL.

        Raises:
            InputError: it is not a run, or not finished.
            ResultsDamagedError: a file of it is damaged.
        """
        found = read(run)
        summary = found.summary
        final = {f"seconds/{name}": value for name, value in summary["seconds"].items()}
        final |= {f"requests/{name}": float(n) for name, n in summary["requests"].items()}
        files = (found.path / name for name in _ARTIFACTS)
        return cls(
            str(summary["name"]),
            flattened(found.manifest["spec"]),
            _metrics(summary),
            final,
            tuple(path for path in files if path.is_file()),
        )


def require_trackers(names: Sequence[str]) -> None:
    """Check, before a job begins, that the libraries of its trackers are there (InputError)."""
    for name in names:
        _library(name)


def track(run: str | Path, names: Sequence[str]) -> None:
    """Log a finished run to these trackers.

    Raises:
        InputError: a library is missing, or the run is none or not finished.
        EditfleetError: a tracker refused; its own reason is in the message.
    """
    if not names:
        return
    tracked, known = Tracked.of(run), _known(read(run).path)
    for name in names:
        library = _library(name)
        try:
            known[name] = _LOGGERS[name](library, tracked, known.get(name))
        except Exception as error:
            # Their errors have no base in common, and the run itself is whole.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise EditfleetError(
                f"{run} is finished, but {name} did not take it: {reason}; `editfleet track {run}`"
                " tries again"
            ) from error
        with writing_into(run) as directory:
            write_atomically(directory / TRACKED, json.dumps(known).encode() + b"\n")


def _metrics(summary: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """Scores in per cent and measures of the whole model, by the round after which they were."""
    found: dict[int, dict[str, float]] = {}
    groups = {"": "evaluation", "current/": "current", "untouched/": "untouched"}
    for prefix, group in groups.items():
        for entry in summary.get(group, {}).get("rounds", ()):
            of_round = found.setdefault(entry["round"], {})
            for name in ("ES", "PS", "NS", "S"):
                if entry[name] is not None:
                    of_round[prefix + name] = float(entry[name]["score"])
    for entry in summary.get("general", ()):
        of_round = found.setdefault(entry["round"], {})
        for name, value in entry.items():
            if name != "round" and isinstance(value, int | float):
                of_round[f"general/{name}"] = float(value)
    return found


def _to_mlflow(mlflow: Any, tracked: Tracked, known: str | None) -> str:
    client = mlflow.MlflowClient()
    if known is None:
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        found = client.create_run(experiment.experiment_id, run_name=tracked.name)
        known = str(found.info.run_id)
        for name, setting in tracked.settings.items():
            client.log_param(known, name, setting[:_LONGEST_PARAMETER])
    for round, metrics in sorted(tracked.metrics.items()):
        for name, value in metrics.items():
            client.log_metric(known, name, value, step=round)
    for name, value in tracked.final.items():
        client.log_metric(known, name, value)
    for path in tracked.artifacts:
        client.log_artifact(known, str(path))
    client.set_terminated(known)
    return known


def _to_wandb(wandb: Any, tracked: Tracked, known: str | None) -> str:
    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    run = wandb.init(
        project=project,
        name=tracked.name,
        id=known,
        resume="allow",
        config=tracked.settings,
        settings=wandb.Settings(console="off", silent=True),
    )
    try:
        # Its own step cannot be negative, and the unedited model is round -1.
        run.define_metric("round")
        run.define_metric("*", step_metric="round")
        for round, metrics in sorted(tracked.metrics.items()):
            run.log({"round": round, **metrics})
        run.summary.update(tracked.final)
        artifact = wandb.Artifact(f"{tracked.name}-report", type="report")
        for path in tracked.artifacts:
            artifact.add_file(str(path))
        run.log_artifact(artifact)
        return str(run.id)
    finally:
        run.finish()


_LOGGERS: dict[str, Callable[[Any, Tracked, str | None], str]] = {
    "mlflow": _to_mlflow,
    "wandb": _to_wandb,
}


def _library(name: str) -> ModuleType:
    if name not in _LOGGERS:
        raise InputError(f"there is no tracker {name!r:.80}; known: {', '.join(_LOGGERS)}")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"output.trackers: {name} is not installed; install it: pip install 'editfleet[{name}]'"
        ) from error


def _known(run: Path) -> dict[str, str]:
    """The run's ids at the trackers that it was logged to before."""
    path = run / TRACKED
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        return {str(name): str(value) for name, value in content.items()}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: is not what was written ({error}); delete it") from error
