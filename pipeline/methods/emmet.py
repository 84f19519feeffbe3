"""EMMET (arXiv 2403.14236): residuals as constraints, for a whole batch.

R (K^T (mu C)^-1 K + damping I)^-1 K^T (mu C)^-1, which is MEMIT's update with lambda = mu damping
(push-through identity), so that both are solved alike; mu is `covariance_weight`. Without damping
D K = R holds exactly and mu does not matter; for one edit that is ROME's update.
"""

from torch import Tensor

from pipeline.editing.equations import ConstrainedEdits, NormalEquations, Penalty
from pipeline.methods.closed_form import ClosedForm


class Emmet(ClosedForm):
    """One solver with two parametrisations: MEMIT's, or the constraints themselves."""

    def penalty(self, covariance_FF: Tensor) -> Penalty:
        assert self.spec.covariance_weight is not None, "resolve the spec first"
        weighted = self._norm_penalty(self.spec.covariance_weight * covariance_FF)
        return Penalty((self.spec.emmet.damping or 1.0) * weighted)

    def equations(
        self, penalty: Penalty, num_edits: int, past_FF: Tensor | None = None
    ) -> NormalEquations:
        if self.spec.emmet.damping:
            return super().equations(penalty, num_edits, past_FF)
        if num_edits > len(penalty.matrix):
            raise ValueError(
                f"{num_edits} edits are more constraints than a key has entries"
                f" ({len(penalty.matrix)}); give method.emmet.damping, or edit fewer at once"
            )
        return ConstrainedEdits(penalty)
