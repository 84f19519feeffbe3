"""Settings of a sequential study: rounds of edits, one batch after another."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.setting_types import NonNegative, Positive
from pipeline.spec.part import Part

Order = Literal["file", "shuffled", "relation", "subject"]
Scored = Literal["current", "all_past", "untouched"]


class RoundsSpec(Part):
    """How a sequential study cuts its requests into rounds, and what it scores after which."""

    size: Positive = 100
    """Edits a round; the last one may have fewer."""
    count: Positive | None = None
    """Rounds at most; requests beyond them are left untouched. Null goes on until none is left."""
    rollback: bool = False
    """Put the unedited weights back after every round, to the bit, so that each is edited alone.
    Rounds are then made in any order, as many at once as there are workers."""
    order: Order = "file"
    """Which requests come first: as in the file, `shuffled` by `seed`, or those of one `relation`
    or `subject` after those of another, in the order in which these first appear."""
    evaluate_every: Positive = 10
    """Evaluate after every so many rounds, and after the last one."""
    evaluate_after: Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None = None
    """Evaluate after these rounds instead, counted from 0 as in the column `round`."""
    evaluate: Annotated[tuple[Scored, ...], Field(min_length=1)] = ("current", "all_past")
    """What is scored then: the edits of the `current` round, those of `all_past` ones, and facts
    that are `untouched` in the whole study. With `rollback` past edits are gone, so leave
    `all_past` out."""
    past_sample: Positive | None = None
    """Score this many edits of past rounds and no others: a fixed sample of all rounds, drawn by
    `seed` as evenly as their number allows. Null scores all of them."""
    untouched_sample: Positive = 200
    """Score this many untouched facts: a fixed sample, drawn by `seed`."""

    @model_validator(mode="after")
    def _check(self) -> "RoundsSpec":
        after = self.evaluate_after
        if after is not None and list(after) != sorted(set(after)):
            raise ValueError(f"evaluate_after must ascend without repetition, got {list(after)}")
        if len(set(self.evaluate)) != len(self.evaluate):
            raise ValueError(f"evaluate names something twice: {list(self.evaluate)}")
        if self.past_sample is not None and "all_past" not in self.evaluate:
            raise ValueError("past_sample needs all_past among evaluate")
        if self.rollback and "all_past" in self.evaluate:
            raise ValueError(
                "rollback takes every round's edits back, so there are no past ones to evaluate;"
                " write evaluate: [current]"
            )
        return self
