"""Multiple-choice tasks of lm-evaluation-harness, defined in files, for tests without a network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tiny_jobs import records

# What the edits of `TinyJobs` are about: a question, its options, and which of them is the new one.
QUESTIONS = [
    (
        edit["prompt"].replace("{}", edit["subject"]),
        [f" {edit[target]['str']}" for target in ("target_true", "target_new")],
        1,
    )
    for edit in (record["requested_rewrite"] for record in records(12))
]


def write_questions(
    path: Path, questions: Sequence[Any] = QUESTIONS, **more: Sequence[Any]
) -> None:
    """Write questions as a file of rows that a task can read, with other columns beside them."""
    rows = [{"question": q, "options": o, "answer": a} for q, o, a in questions]
    for name, column in more.items():
        for row, value in zip(rows, column, strict=True):
            row[name] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_task(folder: Path, name: str, file: str, **more: Any) -> None:
    """Write the definition of a task over a file of such rows beside it."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / file)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **more,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
