"""What a spec asks for, planned and estimated: one job, studies side by side, cells, a training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.cluster.learning import training_spec
from pipeline.cluster.plan import Plan, make_plan
from pipeline.cluster.survey import Entry, plan_survey
from pipeline.planning.estimate import make_estimates, worker_counts
from pipeline.planning.memory import largest_memory, side_by_side
from pipeline.results.planned import Estimate, Memory
from pipeline.spec import JobSpec
from pipeline.spec.cells import survey_cells
from pipeline.spec.variants import variants

Kind = Literal["job", "comparison", "survey", "training"]
Cells = Sequence[tuple[Entry, Estimate | None]]
"""Cells of a survey; one that cannot be made has no estimate."""


@dataclass(frozen=True)
class PlannedJob:
    """What a spec asks for.

    Attributes:
        kind: a job that edits, several studies of one, a survey or a training.
        studies: every study's plan and estimate: one, or those of a comparison, or of the cells of
            a survey that can be made; all estimates are for the same numbers of workers.
        cells: of a survey, all of them; else none.
    """

    kind: Kind
    studies: Sequence[tuple[Plan, Estimate]]
    cells: Cells = ()

    @property
    def spec(self) -> JobSpec:
        """The resolved spec of the first study."""
        return self.studies[0][0].spec

    @property
    def memory(self) -> Memory:
        """What workers, reducer and driver need, whatever of it is made at the same time."""
        memories = [estimate.memory for _, estimate in self.studies]
        return largest_memory(memories) if self.kind == "survey" else side_by_side(memories)


def plan_job(
    spec: JobSpec,
    *,
    rate: float | None = None,
    reducer_rate: float | None = None,
    steps: float | None = None,
    gigabits: float = 10.0,
) -> PlannedJob:
    """Plan and estimate whatever a spec asks for; no weights are loaded.

    Args: as of `pipeline.planning.estimate.make_estimate`.

    Raises:
        InputError: the spec or the requests are wrong; of a survey, not one cell can be made.
    """
    kind, plans, entries = _plans(spec)
    estimates = make_estimates(
        plans,
        rate=rate,
        reducer_rate=reducer_rate,
        steps=steps,
        gigabits=gigabits,
        workers=worker_counts(plans[0].spec),
    )
    return PlannedJob(kind, list(zip(plans, estimates, strict=True)), estimated(entries, estimates))


def _plans(spec: JobSpec) -> tuple[Kind, list[Plan], list[Entry]]:
    if spec.train is not None:
        return "training", [make_plan(training_spec(spec))], []
    if spec.survey is not None:
        entries = plan_survey(survey_cells(spec))
        return "survey", [entry.plan for entry in entries if entry.plan is not None], entries
    if spec.compare is not None:
        return "comparison", [make_plan(one) for one in variants(spec)], []
    return "job", [make_plan(spec)], []


def estimated(entries: Sequence[Entry], estimates: Sequence[Estimate]) -> Cells:
    """Put each estimate to its cell."""
    left = iter(estimates)
    return [(entry, None if entry.plan is None else next(left)) for entry in entries]
