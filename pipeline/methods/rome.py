"""ROME (arXiv 2202.05262): one edit, one layer, a rank-one update.

(v - W k_c) u^T / (u^T k_c) with u = C^-1 k (equation 2), which writes v at k_c exactly. k is the
mean key over the contexts, the bare prompt's among them (equation 3). The published code takes the
bare prompt's key as k_c; where u^T k_c is small that update explodes, which r-ROME (arXiv
2403.07175) cures by one key throughout.

The value is MEMIT's: delta is searched at the output of the block, where the MLP's output arrives
unchanged, and v - W k = delta. Its bound is relative to the block's output, not to the MLP's.
"""

import torch
from torch import Tensor

from pipeline.editing.equations import NormalEquations, Penalty
from pipeline.editing.keys import KeyWave
from pipeline.editing.solve import Factor, require_finite
from pipeline.editing.update import Update
from pipeline.methods.closed_form import ClosedForm, missing


class Rome(ClosedForm):
    """One edit at a time; `method.rome.form` says with which keys."""

    def keys_and_residuals(
        self, wave: KeyWave, layer: int, values_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Measure keys and residuals; the form decides of which prompts.

        Returns:
            keys: (N, F), or (N, 2 F) for the original form: k, then k_c.
            residuals: (N, D) v - W k_c.
        """
        bare, hidden = wave.read_bare(layer)
        residuals = missing(values_ND, hidden)
        if self.spec.rome.form == "p-rome":
            return bare, residuals
        keys, _ = wave.read(layer, in_groups=False)
        if self.spec.rome.form == "original":
            return torch.cat([keys, bare], dim=1), residuals
        # v is the bare prompt's; W k_c is at the mean key.
        weight = wave.model.oriented_weight(layer).to(residuals.dtype)
        return keys, residuals + (bare - keys).to(residuals.dtype) @ weight.T

    def penalty(self, covariance_FF: Tensor) -> Penalty:
        if self.spec.rome.covariance == "identity":
            covariance_FF = torch.eye(len(covariance_FF)).to(covariance_FF)
        return Penalty(covariance_FF)

    def equations(
        self, penalty: Penalty, num_edits: int, past_FF: Tensor | None = None
    ) -> NormalEquations:
        if num_edits != 1:
            raise ValueError(f"ROME writes one edit at a time, not {num_edits}")
        return RankOne(penalty.factor)


class RankOne:
    """One edit's keys, and its update.

    Args:
        factor: of C.
    """

    def __init__(self, factor: Factor) -> None:
        self.factor = factor
        self.edit: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, keys_NF: Tensor, residuals_ND: Tensor) -> None:
        """Take the edit's keys and residual, in float64 from here on."""
        assert self.edit is None and len(keys_NF) == 1, "one edit only"
        size = len(self.factor.lower)
        keys = keys_NF[0].to(self.factor.lower)
        self.edit = keys[:size], keys[-size:], residuals_ND[0].to(self.factor.lower)

    def solve(self) -> Update:
        """Solve for the update.

        Raises:
            ValueError: no edit was added, or its numbers are not finite, or u^T k_c is 0.
        """
        return Update.of(*self.factors(), self.factor.ridge)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(D, 1) and (1, F) float64, whose product the update is.

        Raises:
            ValueError: as of `solve`.
        """
        if self.edit is None:
            raise ValueError("no edit reached this layer")
        key, constrained, residual = self.edit
        require_finite(*self.edit)
        direction = self.factor.solve(key[:, None])[:, 0]
        inner = direction @ constrained
        if inner == 0.0:
            raise ValueError("the keys of the prompt and of its contexts are at right angles")
        return residual[:, None] / inner, direction[None]
