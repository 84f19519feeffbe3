"""The plan of whatever a spec asks for, for people."""

from collections.abc import Iterator

from rich.console import Group, RenderableType

from pipeline.planning.job import PlannedJob
from pipeline.report.plan import comparison_seconds, plan_tables, said
from pipeline.report.survey_plan import survey_tables


def job_tables(planned: PlannedJob) -> RenderableType:
    """A survey's cells; else every study's tables, and for several what all take."""
    if planned.kind == "survey":
        return survey_tables(planned.cells)
    return Group(*_studies(planned))


def _studies(planned: PlannedJob) -> Iterator[RenderableType]:
    is_comparison = planned.kind == "comparison"
    for plan, estimate in planned.studies:
        if is_comparison:
            yield said(f"study {plan.spec.run_path.name}")
        yield plan_tables(plan, estimate)
    if is_comparison:
        yield said("seconds of all studies side by side, at most, by workers:")
        yield comparison_seconds(
            {plan.spec.run_path.name: estimate for plan, estimate in planned.studies}
        )
