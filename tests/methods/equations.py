"""One layer's problem straight from its covariance, as the reducer puts it together."""

from torch import Tensor

from pipeline.editing.equations import NormalEquations
from pipeline.methods import ClosedForm


def normal_equations(
    method: ClosedForm, covariance_FF: Tensor, num_edits: int, past_FF: Tensor | None = None
) -> NormalEquations:
    """A method's equations for N edits; `past_FF` is K K^T of earlier rounds."""
    return method.equations(method.penalty(covariance_FF), num_edits, past_FF)
