"""editfleet: rewrite facts inside large language models, thousands at once, on a Ray cluster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.adapter_files import load_adapter
    from pipeline.applying import apply_updates
    from pipeline.cluster.comparison import run_comparison
    from pipeline.cluster.run import RunResult, run_batch_edit, run_covariance, run_sequential
    from pipeline.cluster.survey import SurveyResult, run_survey
    from pipeline.exporting import export_model
    from pipeline.harness import run_harness
    from pipeline.report.page import write_report
    from pipeline.requests import EditRequest
    from pipeline.serac_files import load_serac
    from pipeline.spec import JobSpec, load_spec
    from pipeline.unediting import UneditResult, unedit

# Loaded when first asked for: a spec can be checked without waiting for torch and Ray.
_PLACES = {
    "EditRequest": "pipeline.requests",
    "JobSpec": "pipeline.spec",
    "RunResult": "pipeline.cluster.run",
    "SurveyResult": "pipeline.cluster.survey",
    "UneditResult": "pipeline.unediting",
    "apply_updates": "pipeline.applying",
    "export_model": "pipeline.exporting",
    "load_adapter": "pipeline.adapter_files",
    "load_serac": "pipeline.serac_files",
    "load_spec": "pipeline.spec",
    "run_batch_edit": "pipeline.cluster.run",
    "run_comparison": "pipeline.cluster.comparison",
    "run_covariance": "pipeline.cluster.run",
    "run_harness": "pipeline.harness",
    "run_sequential": "pipeline.cluster.run",
    "run_survey": "pipeline.cluster.survey",
    "run_training": "pipeline.cluster.learning",
    "unedit": "pipeline.unediting",
    "write_report": "pipeline.report.page",
}

__all__ = [
    "EditRequest",
    "JobSpec",
    "RunResult",
    "SurveyResult",
    "UneditResult",
    "apply_updates",
    "export_model",
    "load_adapter",
    "load_serac",
    "load_spec",
    "run_batch_edit",
    "run_comparison",
    "run_covariance",
    "run_harness",
    "run_sequential",
    "run_survey",
    "run_training",
    "unedit",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
