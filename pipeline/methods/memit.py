"""MEMIT (arXiv 2210.07229): values at the last layer, one update a layer, in ascending order.

Each update is R K^T (lambda C + K K^T)^-1 (equation 14).
"""

from torch import Tensor

from pipeline.editing.equations import Penalty
from pipeline.methods.closed_form import ClosedForm


class Memit(ClosedForm):
    """Old keys are protected by the covariance of a corpus, A = lambda C."""

    def penalty(self, covariance_FF: Tensor) -> Penalty:
        assert self.spec.covariance_weight is not None, "resolve the spec first"
        return Penalty(self._norm_penalty(self.spec.covariance_weight * covariance_FF))
