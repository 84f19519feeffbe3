"""The least-squares update that writes residuals at keys and disturbs old keys least.

Shapes (suffixes of tensor names): N edits, F key size, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A ridge of this many times the mean diagonal is tried first where a matrix is not positive
# definite, and a hundred times more each time after that.
_FIRST_RIDGE = 1e-10
_RIDGE_STEP = 100.0
_RIDGE_TRIES = 4


@dataclass(frozen=True)
class Factor:
    """A Cholesky factor, and the ridge that it took to have one.

    Attributes:
        lower: (F, F) float64 lower triangle.
        ridge: what was added to the diagonal; 0 where the matrix was positive definite.
    """

    lower: Tensor
    ridge: float

    def solve(self, right: Tensor) -> Tensor:
        """A^-1 right, (F, n) float64."""
        return torch.cholesky_solve(right, self.lower)


def factorise(matrix: Tensor) -> Factor:
    """Factor a symmetric positive semi-definite (F, F) float64 matrix.

    A singular matrix (too few covariance tokens, say) gets the smallest ridge that makes it
    positive definite; the ridge is reported with the factor.

    Raises:
        ValueError: the matrix holds infinities or NaNs, or no small ridge helps.
    """
    require_finite(matrix)
    scale = float(matrix.diagonal().mean())
    ridges = [0.0, *(scale * _FIRST_RIDGE * _RIDGE_STEP**i for i in range(_RIDGE_TRIES))]
    for ridge in ridges:
        shifted = matrix if ridge == 0.0 else matrix + ridge * torch.eye(len(matrix)).to(matrix)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            return Factor(lower, ridge)
    raise ValueError(
        f"the normal equations are not positive definite, even with a ridge of {ridges[-1]:.3g}"
    )


def solve_update(
    gram_FF: Tensor, cross_DF: Tensor, covariance_FF: Tensor, covariance_weight: float
) -> tuple[Tensor, float]:
    """Solve for MEMIT's update from sums over all edits: R K^T (lambda C + K K^T)^-1.

    It minimises lambda tr(D C D^T) + ||D K - R||_F^2 (arXiv 2210.07229, equation 14).

    Args:
        gram_FF: K K^T, float64.
        cross_DF: R K^T, float64.
        covariance_FF: C, float64.
        covariance_weight: lambda.

    Returns:
        The update (D, F) float64, and the ridge that was needed (0 as a rule).

    Raises:
        ValueError: an argument holds infinities or NaNs, or is not positive semi-definite.
    """
    require_finite(cross_DF)
    factor = factorise(covariance_weight * covariance_FF + gram_FF)
    return factor.solve(cross_DF.T).T, factor.ridge


def update_factors(keys_NF: Tensor, residuals_ND: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """The update of `solve_update` as two factors of rank N, for N well below F.

    With G = (lambda C)^-1 K^T the push-through identity gives R (I + K G)^-1 G^T, so that only an
    N x N system is solved; the factor of lambda C serves every batch.

    Args:
        keys_NF: float64 keys, one a row.
        residuals_ND: float64 residuals, one a row.
        factor: of lambda C.

    Returns:
        (D, N) and (N, F) float64; their product is the update.

    Raises:
        ValueError: keys or residuals hold infinities or NaNs, or lambda C is too small beside the
            keys for float64.
    """
    require_finite(keys_NF, residuals_ND)
    whitened_FN = factor.solve(keys_NF.T)
    small_NN = keys_NF @ whitened_FN
    small_NN.diagonal().add_(1.0)
    lower, info = torch.linalg.cholesky_ex(small_NN)
    if int(info):
        raise ValueError(
            "the normal equations are not positive definite; take a larger covariance weight"
        )
    return torch.cholesky_solve(residuals_ND, lower).T, whitened_FN.T


def constrained_factors(
    keys_NF: Tensor, residuals_ND: Tensor, factor: Factor
) -> tuple[Tensor, Tensor, float]:
    """The least update that writes the residuals exactly: R (K^T C^-1 K)^-1 K^T C^-1.

    It minimises tr(D C D^T) subject to D K = R (EMMET, arXiv 2403.14236), and is the
    limit of `update_factors` for lambda -> 0. Keys that depend on each other have no exact
    solution; the smallest ridge that works is put under the constraints and returned.

    Args:
        keys_NF: float64 keys, one a row, fewer than they have entries.
        residuals_ND: float64 residuals, one a row.
        factor: of C, to any scale.

    Returns:
        (D, N) and (N, F) float64, whose product is the update, and the ridge (0 as a rule).

    Raises:
        ValueError: keys or residuals hold infinities or NaNs, or no small ridge helps.
    """
    require_finite(keys_NF, residuals_ND)
    whitened_FN = factor.solve(keys_NF.T)
    gram = factorise(keys_NF @ whitened_FN)
    return gram.solve(residuals_ND).T, whitened_FN.T, gram.ridge


class RidgeSystem:
    """The matrix K K^T + ridge I of some keys, factored in its smaller form.

    Args:
        keys_RF: float64 keys, one a row.
        ridge: above 0.

    Raises:
        ValueError: keys hold infinities or NaNs, or the ridge is too small for float64.
    """

    def __init__(self, keys_RF: Tensor, ridge: float) -> None:
        require_finite(keys_RF)
        self.keys, self.ridge = keys_RF, ridge
        rows, size = keys_RF.shape
        self.is_dual = rows < size
        gram = keys_RF @ keys_RF.T if self.is_dual else keys_RF.T @ keys_RF
        gram.diagonal().add_(ridge)
        lower, info = torch.linalg.cholesky_ex(gram)
        if int(info):
            raise ValueError(
                "the ridge is too small beside the keys for float64; take a larger one"
            )
        self._lower = lower

    def regression(self, values_RD: Tensor) -> tuple[Tensor, Tensor]:
        """The ridge regression of values on the keys, V K^T (K K^T + ridge I)^-1, as two factors.

        Args:
            values_RD: float64 values, one a row.

        Returns:
            (D, m) and (m, F) float64, m the smaller of R and F; their product is the update.

        Raises:
            ValueError: values hold infinities or NaNs.
        """
        require_finite(values_RD)
        if self.is_dual:
            return torch.cholesky_solve(values_RD, self._lower).T, self.keys
        return values_RD.T @ self.keys, torch.cholesky_inverse(self._lower)

    def divided(self, matrix_DF: Tensor) -> Tensor:
        """M (K K^T + ridge I)^-1, (D, F) float64."""
        if not self.is_dual:
            return torch.cholesky_solve(matrix_DF.T, self._lower).T
        along = torch.cholesky_solve(self.keys @ matrix_DF.T, self._lower).T @ self.keys
        return (matrix_DF - along) / self.ridge


def ridge_factors(keys_RF: Tensor, values_RD: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The regression of a `RidgeSystem`, with its arguments and errors."""
    return RidgeSystem(keys_RF, ridge).regression(values_RD)


def require_finite(*tensors: Tensor) -> None:
    """Refuse infinities and NaNs.

    Raises:
        ValueError: there is one.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ValueError("the normal equations hold infinities or NaNs")
