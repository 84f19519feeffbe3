"""lm-evaluation-harness on a run's model, unedited and edited; an optional extra."""

import importlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from pipeline.applying import apply_updates, last_round, require_round
from pipeline.errors import EditfleetError, InputError, JobFailedError
from pipeline.models.editable import resolve_device
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.places import below
from pipeline.results import read
from pipeline.results.harness import FOLDER, write_harness
from pipeline.results.remote import writing_into
from pipeline.serving import log_likelihoods, served_run
from pipeline.spec import parse_spec

_FILE_NAME = re.compile(r"[\w.+()-]{1,200}", re.ASCII)

Rows = list[dict[str, Any]]
_Results = dict[str, Any]
_Key = tuple[str, str, str]
_Asked = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts, null of a window of running text, and the ids of context and continuation."""


def run_harness(
    run: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    round: int | None = None,
    batch_size: int = 16,
    output: str | Path | None = None,
    allow_pickle: bool = False,
) -> Rows:
    """Score the unedited model and the edited one on tasks of lm-evaluation-harness.

    Nothing is exported: the run's updates are put into a model in memory, and taken out again for
    the unedited scores. Of a run with an edit memory a question's context is what is looked up;
    texts that are scored as a whole are read by the edited model. Both models get the same
    questions. Each task's table is written whole or not at all and replaces that of an earlier
    call.

    Args:
        run: the directory or URL of a finished run, or with `round` also a study under way.
        tasks: names of tasks, groups or tags.
        include_path: a folder with tasks of one's own (YAML). The Python functions that they name
            are run.
        limit: ask at most so many questions a task; null asks all.
        round: the model as it was after this round of a study, counted from 0; null: after all.
        batch_size: questions at once.
        output: where to write the tables, a directory or a URL; null is RUN/harness.
        allow_pickle: load the unedited weights from .bin files where there are no safetensors.

    Returns:
        Rows of `pipeline.results.schemas.HARNESS`.

    Raises:
        InputError: lm-eval is not installed, a task is unknown or cannot be loaded, or the run, or
            the round, is not finished.
        FingerprintMismatchError: the model at the run's path is not the one that was edited.
        JobFailedError: a task fails while it is evaluated.
        OSError: the output cannot be written.
    """
    opened = read(run)
    require_round(opened, round)
    spec = parse_spec(opened.recorded.spec, f"{run}/manifest.json: spec")
    source = spec.model.model_copy(update={"allow_pickle": allow_pickle})
    evaluator, huggingface = _import("lm_eval.evaluator"), _import("lm_eval.models.huggingface")
    manager = _task_manager(tasks, include_path)
    model, tokenizer = load_model(source, resolve_device()[0]), load_tokenizer(source)
    # The edited model first: a run that does not fit is refused before anything is scored.
    given = {"tokenizer": tokenizer, "batch_size": batch_size}
    revert: Callable[[], None]
    if spec.method.is_memory:
        served, memory = served_run(opened, model, tokenizer, round=round)
        harnessed = _looking_up(huggingface.HFLM)(pretrained=served, **given)
        revert = partial(memory.remove, [entry.key for entry in memory])
    else:
        revert = apply_updates(model, run, round=round).revert
        harnessed = huggingface.HFLM(pretrained=model, **given)

    def evaluated(task: str) -> _Results:
        with _failing(task):
            found: _Results = evaluator.simple_evaluate(
                harnessed, tasks=[task], limit=limit, task_manager=manager, log_samples=False
            )
        return found

    edited = {task: evaluated(task) for task in tasks}
    revert()
    number = last_round(opened) if round is None else round
    place = below(opened.place, FOLDER) if output is None else output
    rows: Rows = []
    for task, after in edited.items():
        found = _rows(evaluated(task), after, number)
        with writing_into(place) as directory:
            write_harness(directory, number, task, found)
        rows += found
    return rows


def _looking_up(plain: Any) -> Any:
    """lm-eval's model for a `SeracModel`: it says what the prompt is, and that text has none."""

    class LookingUp(plain):
        def _loglikelihood_tokens(
            self, requests: Sequence[_Asked], disable_tqdm: bool = False, override_bs: Any = None
        ) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            # Windows of running text have no strings, and what has no context has an empty one.
            is_asked = [texts is not None and bool(texts[0]) for texts, _, _ in requests]
            order = sorted(
                range(len(requests)),
                key=lambda i: (is_asked[i], len(requests[i][1]) + len(requests[i][2])),
            )
            for looked_up, group in groupby(order, key=is_asked.__getitem__):
                places = list(group)
                for start in range(0, len(places), self.batch_size):
                    some = places[start : start + self.batch_size]
                    ids = [requests[place][1:] for place in some]
                    given = {"looked_up": looked_up, "limit": self.max_length}
                    scores = log_likelihoods(self.model, ids, **given)
                    for place, score in zip(some, scores, strict=True):
                        found[place] = score
            return found

    return LookingUp


def _import(module: str) -> Any:
    try:
        # Its notes on every setting left alone would bury what the command prints.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"editfleet harness needs lm-evaluation-harness ({error}); install it:"
            " pip install 'editfleet[harness]'"
        ) from error


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """The tasks by name, each of which has been loaded once, so that a wrong one fails early."""
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"--include-path {include_path} is no folder")
    if not tasks:
        raise InputError("no task to evaluate; name one with --tasks")
    manager = _known_tasks(tasks, include_path)
    for task in tasks:
        if task not in manager.task_index:
            where = "" if include_path is None else f" or under {include_path}"
            raise InputError(
                f"lm-eval has no task {task!r}{where}; `lm-eval ls tasks` lists its own"
            )
        if not _FILE_NAME.fullmatch(task):
            raise InputError(
                f"task {task!r}: its name cannot be a file's; use letters, digits and . _ + - ( )"
            )
        with _loading(task):
            found = manager.load([task])["tasks"]
        if unsafe := [name for name, one in found.items() if getattr(one, "UNSAFE_CODE", False)]:
            raise InputError(
                f"task {unsafe[0]!r} runs code that the model writes, which editfleet does not do;"
                " `editfleet export` the model and use lm-eval's --confirm_run_unsafe_code"
            )
    return manager


def _known_tasks(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """The index of one's own tasks; with lm-eval's thousands, which take a minute, if needed."""
    managers = _import("lm_eval.tasks")
    if include_path is not None:
        own = managers.TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    return managers.TaskManager(include_path=None if include_path is None else str(include_path))


def _rows(unedited: _Results, edited: _Results, round: int) -> Rows:
    """One row a metric of every task and group in the results; texts among them are left out."""
    before, after = _values(unedited), _values(edited)
    rows = []
    for key, value in after.items():
        task, metric, filter_ = key
        if metric.endswith("_stderr"):
            continue
        deviation = (task, f"{metric}_stderr", filter_)
        asked = edited["n-samples"].get(task, {})
        shots, task_version = edited["n-shot"].get(task), edited["versions"].get(task)
        rows.append(
            {
                "round": round,
                "task": task,
                "metric": metric,
                "filter": filter_,
                "unedited": before.get(key),
                "unedited_stderr": before.get(deviation),
                "edited": value,
                "edited_stderr": after.get(deviation),
                "higher_is_better": edited["higher_is_better"].get(task, {}).get(metric),
                "count": asked.get("effective", edited["results"][task].get("sample_len")),
                "documents": asked.get("original"),
                "num_fewshot": shots,
                "version": None if task_version is None else str(task_version),
                "lm_eval_version": version("lm_eval"),
            }
        )
    return rows


def _values(results: _Results) -> dict[_Key, float]:
    found = {}
    for task, entries in results["results"].items():
        for name, value in entries.items():
            metric, comma, filter_ = name.rpartition(",")
            if comma and isinstance(value, int | float):
                found[task, metric, filter_] = float(value)
    return found


@contextmanager
def _loading(task: str) -> Iterator[None]:
    """Turn what a task's files, data and functions raise, which can be anything, into one line."""
    try:
        yield
    except (EditfleetError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"task {task!r} cannot be loaded: {_said(error)}") from error


@contextmanager
def _failing(task: str) -> Iterator[None]:
    try:
        yield
    except (EditfleetError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise JobFailedError(f"task {task!r} failed in lm-eval: {_said(error)}") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
