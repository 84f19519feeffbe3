"""Settings of a survey: which models, editors and data sets, and how the facts are edited."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.setting_types import Positive
from pipeline.spec.part import Part

_Entries = Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
_Sizes = Annotated[tuple[Positive, ...], Field(min_length=1)]


def _require_ascending(sizes: tuple[int, ...]) -> None:
    if list(sizes) != sorted(set(sizes)):
        raise ValueError(f"sizes must ascend without repetition, got {list(sizes)}")


class SingleSpec(Part):
    """Edits one by one, each on the unedited model, which is put back after it."""

    facts: Positive = 200
    """Facts to edit, the first ones."""


class BatchSpec(Part):
    """Batches of several sizes, each of them on the unedited model."""

    sizes: _Sizes = (1, 10, 100, 1000)
    """Edits of each batch: the first ones, so that a batch holds all smaller ones."""

    @model_validator(mode="after")
    def _check(self) -> "BatchSpec":
        _require_ascending(self.sizes)
        return self


class SequenceSpec(Part):
    """One sequence of edits, scored when so many of them have been made."""

    sizes: _Sizes = (1, 10, 100, 1000)
    """After how many edits all of them so far are scored; the last one is the sequence's length."""
    rounds_of: Positive = 1
    """Edits made at once, of which sizes are multiples. 1 is sequential editing as the survey's;
    more are done sooner."""
    at_once: Positive = 1
    """Sequences, of several editors, that are made at the same time: a small round keeps few
    workers busy, and the others then serve another sequence. Seconds of an edit do not hold the
    waiting for others; wall-clock seconds do."""

    @model_validator(mode="after")
    def _check(self) -> "SequenceSpec":
        _require_ascending(self.sizes)
        if odd := [size for size in self.sizes if size % self.rounds_of]:
            raise ValueError(
                f"sizes: {odd[0]} edits are never reached in rounds_of {self.rounds_of}; give"
                " multiples of it"
            )
        return self


class SurveySpec(Part):
    """A survey like that of Yao et al. (arXiv 2305.13172): `editfleet survey`, docs/survey.md.

    The rest of the spec is what all cells have in common. Unless it says otherwise they ask all
    probes but generation, compare neighbourhood and locality probes with the unedited model, do
    without a baseline, and keep a model that diverges. Of `rounds` a sequence takes everything but
    the rounds' number and size, the others the order.
    """

    editors: _Entries
    """For each editor the settings of `method` that differ from the spec's own, and optionally a
    `label`; that is else its name with its wrappers."""
    models: _Entries = ({},)
    """For each model the groups of settings that differ from the spec's own (`model`, and what goes
    with it of `method` and `covariance`), and a `label`; that is else its path's last name."""
    datasets: _Entries = ({},)
    """The same for each data set (`requests`, and what goes with it of `evaluation`)."""
    single: SingleSpec | None = SingleSpec()
    """Single edits; null leaves them out."""
    batch: BatchSpec | None = BatchSpec()
    """Batches; null leaves them out."""
    sequence: SequenceSpec | None = SequenceSpec()
    """A sequence; null leaves it out."""

    @model_validator(mode="after")
    def _check(self) -> "SurveySpec":
        if not (self.single or self.batch or self.sequence):
            raise ValueError("nothing is asked for: give single, batch or sequence")
        return self
