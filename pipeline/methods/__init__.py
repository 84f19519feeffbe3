"""Editing methods: each says how the parts of the editing core combine."""

from pipeline.methods.memit import Memit, NormalEquations
from pipeline.methods.settings import resolve_settings, value_settings
from pipeline.spec import MethodSpec

METHODS = {"memit": Memit}

__all__ = ["METHODS", "Memit", "NormalEquations", "build_method", "resolve_settings"]


def build_method(spec: MethodSpec) -> Memit:
    """Make the method that a resolved spec names."""
    assert spec.layers is not None and spec.covariance_weight is not None, "resolve the spec first"
    return METHODS[spec.name](spec.layers, value_settings(spec), spec.covariance_weight)
