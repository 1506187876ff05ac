"""The Fréchet distance between two Gaussians (Dowson & Landau 1982), squared, as FID uses it.

``FID = |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½`` (Heusel et al. 2017, Eq. 6). With ``Σ₁ = R Rᵀ`` the last
trace is the sum of the square roots of the eigenvalues of the symmetric ``Rᵀ Σ₂ R``, which has the
eigenvalues of ``Σ₁ Σ₂``. With N features, ``Σ₂ = Xᵀ X / (N − 1)`` for the centred features X, and the nonzero
eigenvalues are those of the N × N matrix ``X Σ₁ Xᵀ / (N − 1)``, which is smaller when N < D.

The gradient follows from ``d tr M^½ = ½ tr (M^{−½} dM)``. A zero eigenvalue of M stays out of the root and of its
inverse: in that direction the root has no derivative, and 0 is one of its subgradients.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.moments import Array, Moments, as_covariance, as_features, as_mean

# A zero eigenvalue comes out as up to about 1.5 machine epsilons of the largest one, and its root would add
# 1e-8 of the largest root: a visible error when hundreds of eigenvalues are zero, as with N < D.
ROUNDING = 16 * float(np.finfo(np.float64).eps)
BLOCK = 256  # columns at once: as fast as LAPACK's own, which does the same


def frechet_distance(mean_1: npt.ArrayLike, cov_1: npt.ArrayLike, mean_2: npt.ArrayLike, cov_2: npt.ArrayLike) -> float:
    """Squared Fréchet distance between N(mean_1, cov_1) and N(mean_2, cov_2).

    Args:
        mean_1: ``[D]``.
        cov_1: ``[D, D]``, symmetric and positive semidefinite up to float32 rounding; its rank
            may be less than D.
        mean_2: ``[D]``.
        cov_2: ``[D, D]``, as ``cov_1``.

    Returns:
        The distance in squared feature units, at least 0; computed in float64.

    Raises MetricError when an array is not finite, has another shape, or is no covariance. Distances of many
    means and covariances to one are faster with :class:`FrechetReference`.
    """
    return FrechetReference(mean_1, cov_1).distance(mean_2, cov_2)


class FrechetReference:
    """Distances to one Gaussian; the factor of its covariance is computed once, when it is first needed.

    Args:
        mean: ``[D]``.
        cov: ``[D, D]``, symmetric and positive semidefinite up to float32 rounding.

    Attributes:
        mean: ``[D]`` float64.
        cov: ``[D, D]`` float64.

    Raises MetricError when an array is not finite, has another shape, or is no covariance. Safe to use from
    several threads: nothing changes after the factor is computed.
    """

    def __init__(self, mean: npt.ArrayLike, cov: npt.ArrayLike) -> None:
        self.mean = as_mean(mean, "mu")
        self.cov = as_covariance(cov, len(self.mean), "sigma")
        self._trace = float(np.trace(self.cov))

    @property
    def dimension(self) -> int:
        """The number of features, D."""
        return len(self.mean)

    def distance(self, mean: npt.ArrayLike, cov: npt.ArrayLike) -> float:
        """Squared Fréchet distance to N(mean, cov), in float64.

        Args:
            mean: ``[D]``.
            cov: ``[D, D]``, symmetric and positive semidefinite up to float32 rounding; its rank may be less than D.

        Raises:
            MetricError: an array is not finite, has another shape, or is no covariance.
        """
        checked = as_mean(mean, "mean")
        self._check_dimension(len(checked), "mean")
        return self._distance(checked, as_covariance(cov, self.dimension, "covariance"))

    def distance_from_features(self, features: npt.ArrayLike) -> float:
        """FID of ``features``: the squared distance to the Gaussian with their mean and covariance.

        The covariance divides by N − 1, as in pytorch-fid and torch-fidelity. When N < D it goes
        through the N × N matrix.

        Args:
            features: ``[N, D]``, N at least 2.

        Raises:
            MetricError: the features are not finite, have another D, or are fewer than two.
        """
        mean, deviations = self._mean_and_deviations(features)
        if len(deviations) >= self.dimension:
            return self._distance(mean, deviations.T @ deviations)
        half = self._after(deviations)
        values = np.linalg.eigvalsh(half @ half.T)
        return self._combine(mean, float(np.square(deviations).sum()), _sum_of_roots(values))

    def distance_from_moments(self, moments: Moments) -> float:
        """FID from the moments of features, with the covariance of :meth:`distance_from_features`.

        Raises:
            MetricError: they are of another D, or of fewer than two features.
        """
        mean = moments.mean
        self._check_dimension(len(mean), "moments")
        if moments.count < 2:
            raise MetricError(f"a covariance needs at least 2 images, got {moments.count}")
        return self._distance(mean, moments.scatter, divisor=moments.count - 1)

    def distance_and_gradient(self, features: npt.ArrayLike) -> tuple[float, Array]:
        """FID of ``features`` and its derivative in each of them, from one eigendecomposition.

        Args:
            features: ``[N, D]``, N at least 2.

        Returns:
            The distance of :meth:`distance_from_features`, up to rounding, and the gradient ``[N, D]`` float64.

        Raises:
            MetricError: as :meth:`distance_from_features`.
        """
        mean, deviations = self._mean_and_deviations(features)
        count = len(deviations)
        if count < self.dimension:
            half = deviations @ self.cov
            root, inverse = _trace_of_root_and_inverse(half @ deviations.T)
            of_root = inverse @ half  # d tr M^½ / d deviations, M = deviations Σ₁ deviationsᵀ
        else:
            half = self._after(deviations)
            root, inverse = _trace_of_root_and_inverse(half.T @ half)
            of_root = half @ inverse @ self._factor[0].T  # the same, M = Rᵀ deviationsᵀ deviations R
        # Both terms sum to zero over the images, so centring the features changes nothing.
        of_covariance = 2.0 * (deviations - of_root) / np.sqrt(count - 1)
        of_mean = 2.0 * (mean - self.mean) / count
        return self._combine(mean, float(np.square(deviations).sum()), root), of_covariance + of_mean

    def _mean_and_deviations(self, features: npt.ArrayLike) -> tuple[Array, Array]:
        """``[D]`` and ``[N, D]``, the latter scaled so that deviationsᵀ deviations is the covariance."""
        checked = as_features(features)
        self._check_dimension(checked.shape[1], "features")
        if len(checked) < 2:
            raise MetricError("a covariance needs at least 2 images, got 1")
        mean = checked.mean(axis=0)
        return mean, (checked - mean) / np.sqrt(len(checked) - 1)

    def _distance(self, mean: Array, scatter: Array, *, divisor: int = 1) -> float:
        """The distance to the covariance ``scatter / divisor``, which is never computed, to save its memory."""
        root = _sum_of_roots(np.linalg.eigvalsh(self._between(scatter))) / np.sqrt(divisor)
        return self._combine(mean, float(np.trace(scatter)) / divisor, root)

    def _combine(self, mean: Array, trace: float, trace_of_root: float) -> float:
        shift = float(np.square(mean - self.mean).sum())
        # A distance cannot be negative; rounding can make the difference of the traces so.
        return max(0.0, shift + (self._trace + trace - 2.0 * trace_of_root))

    @cached_property
    def _factor(self) -> tuple[Array, bool]:
        """``R`` ``[D, r]`` with ``R Rᵀ`` the covariance, and whether it is lower triangular: by Cholesky, or by
        eigenvectors if the covariance is singular.
        """
        try:
            return np.linalg.cholesky(self.cov).astype(np.float64, copy=False), True
        except np.linalg.LinAlgError:
            values, vectors = np.linalg.eigh(self.cov)
            kept = values > ROUNDING * values[-1]
            return vectors[:, kept] * np.sqrt(values[kept]), False

    def _between(self, scatter: Array) -> Array:
        """``Rᵀ S R`` [r, r] of a symmetric S [D, D]; above the diagonal it may be anything finite."""
        (factor, triangular), half = self._factor, self._after(scatter)
        if not triangular:
            return factor.T @ half
        product = np.zeros_like(half)
        for start in range(0, len(half), BLOCK):
            stop = start + BLOCK
            np.matmul(factor[start:, start:stop].T, half[start:, :stop], out=product[start:stop, :stop])
        return product

    def _after(self, rows: Array) -> Array:
        """``X R`` [N, r] of X [N, D]."""
        factor, triangular = self._factor
        if not triangular:
            return rows @ factor
        product = np.empty_like(rows)
        for start in range(0, rows.shape[1], BLOCK):
            columns = slice(start, start + BLOCK)
            np.matmul(rows[:, start:], factor[start:, columns], out=product[:, columns])
        return product

    def _check_dimension(self, dimension: int, name: str) -> None:
        if dimension != self.dimension:
            raise MetricError(
                f"{name}: {dimension} features, but the reference has {self.dimension}; "
                "compute both with the same extractor"
            )


def _sum_of_roots(values: npt.NDArray[np.floating[Any]]) -> float:
    """``tr M^½`` from the ascending eigenvalues of M; those that are rounding count as zero."""
    return float(np.sqrt(values[_kept(values)]).sum())


def _trace_of_root_and_inverse(product: Array) -> tuple[float, Array]:
    """``tr M^½`` and the pseudo-inverse ``M^{−½}``, of the shape of M, with the same eigenvalues kept."""
    if product.size == 0:
        return 0.0, np.zeros_like(product)
    values, vectors = np.linalg.eigh((product + product.T) / 2)
    kept = _kept(values)
    roots, basis = np.sqrt(values[kept]), vectors[:, kept]
    return float(roots.sum()), (basis / roots) @ basis.T


def _kept(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.bool_]:
    """Which of the ascending eigenvalues are larger than rounding errors."""
    kept: npt.NDArray[np.bool_] = values > ROUNDING * max(float(values[-1]) if len(values) else 0.0, 0.0)
    return kept
