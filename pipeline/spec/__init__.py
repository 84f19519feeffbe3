"""The one definition of every setting, its default, its bounds and its help text."""

from pipeline.spec.assess import AssessSpec
from pipeline.spec.groups import (
    ClusterSpec,
    CovarianceSpec,
    DataType,
    EvaluationSpec,
    GeneralSpec,
    ModelSpec,
    OutputSpec,
    Probe,
    RequestsSpec,
)
from pipeline.spec.job import JobSpec
from pipeline.spec.loading import load_spec, parse_spec
from pipeline.spec.method import MethodSpec, ValueSpec
from pipeline.spec.rounds import RoundsSpec
from pipeline.spec.survey import SurveySpec
from pipeline.spec.trace import TraceSpec
from pipeline.spec.train import TrainSpec

__all__ = [
    "AssessSpec",
    "ClusterSpec",
    "CovarianceSpec",
    "DataType",
    "EvaluationSpec",
    "GeneralSpec",
    "JobSpec",
    "MethodSpec",
    "ModelSpec",
    "OutputSpec",
    "Probe",
    "RequestsSpec",
    "RoundsSpec",
    "SurveySpec",
    "TraceSpec",
    "TrainSpec",
    "ValueSpec",
    "load_spec",
    "parse_spec",
]
