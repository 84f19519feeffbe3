"""AlphaEdit (arXiv 2410.02355): updates in the null space of what the covariance holds.

With N the eigenvectors of C whose eigenvalues are below a threshold, P = N N^T, and K_p the keys of
earlier rounds, the paper's update R K^T P (K_p K_p^T P + K K^T P + ridge I)^-1 is

    R K^T N (N^T (K K^T + K_p K_p^T) N + ridge I)^-1 N^T,

which is symmetric positive definite, and smaller.
"""

import torch
from torch import Tensor

from pipeline.editing.equations import Penalty
from pipeline.methods.closed_form import ClosedForm


class AlphaEdit(ClosedForm):
    """Old keys are protected by leaving their directions alone; earlier edits by their keys."""

    remembers = True

    def penalty(self, covariance_FF: Tensor) -> Penalty:
        settings = self.spec.alphaedit
        basis = null_space(covariance_FF, settings.threshold, settings.threshold_is == "relative")
        if basis.shape[1] == 0:
            raise ValueError(
                "no eigenvalue of the covariance is below method.alphaedit.threshold"
                f" {settings.threshold:g} ({settings.threshold_is}), so no direction may be edited;"
                " raise it"
            )
        return Penalty(settings.ridge * torch.eye(basis.shape[1]).to(basis), basis)


def null_space(covariance_FF: Tensor, threshold: float, relative: bool) -> Tensor:
    """Eigenvectors of C whose eigenvalues are below a threshold, (F, B) float64.

    Args:
        covariance_FF: C, symmetric, float64.
        threshold: bound on the eigenvalues.
        relative: take it times the mean eigenvalue, so that the model's scale does not matter.
    """
    values, vectors = torch.linalg.eigh(covariance_FF)
    bound = threshold * float(values.mean()) if relative else threshold
    return vectors[:, values < bound].contiguous()
