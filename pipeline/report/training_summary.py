"""The summary of an editor's training as tables for a terminal or a log."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.printable import one_line
from pipeline.results.recorded import check_recorded

_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Trained(_Part):
    """What was trained, for how many steps, and what its best measurement gave."""

    method: str
    editor: str
    steps: int
    validation: dict[str, _Number]


class TrainingSummary(_Part):
    """summary.json of a training."""

    name: str
    requests: dict[str, int]
    training: Trained
    seconds: dict[str, _Number]


def check_training(summary: dict[str, Any]) -> TrainingSummary:
    """Check what summary.json of a training holds.

    Raises:
        ResultsDamagedError: it is another thing.
    """
    return check_recorded(summary, TrainingSummary, "summary.json")


def training_tables(summary: dict[str, Any]) -> RenderableType:
    """What was trained, how well it does on what it was not trained on, and the seconds.

    Raises:
        ResultsDamagedError: it is not a training's summary.
    """
    found = check_training(summary)
    counts = ", ".join(f"{count} {status}" for status, count in found.requests.items())
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in found.seconds.items())
    lines = [
        f"{found.name}: an editor of {found.training.method}, {found.training.steps} steps, in"
        f" {found.training.editor}/",
        validation_said(found.training),
        f"requests: {counts}",
        f"time: {seconds}",
    ]
    return Group(*(Text(one_line(line)) for line in lines))


def validation_said(trained: Trained) -> str:
    """The best measurement in a sentence."""
    if not trained.validation:
        return "it was not measured; the editor is that of the last step"
    named = {name: value for name, value in trained.validation.items() if name != "step"}
    edits = int(named.pop("edits", 0))
    measures = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in named.items())
    after = int(trained.validation["step"]) + 1
    return f"best on {edits} examples that it was not trained on, after step {after}: {measures}"
