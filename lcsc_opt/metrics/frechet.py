"""Moments of features, and the squared Fréchet distance between two Gaussians (Dowson & Landau 1982): FID.

``FID = |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½`` (Heusel et al. 2017, Eq. 6). With ``Σ₁ = R Rᵀ`` the last
trace is the sum of the square roots of the eigenvalues of the symmetric ``Rᵀ Σ₂ R``, which has the
eigenvalues of ``Σ₁ Σ₂``. With N features, ``Σ₂ = Xᵀ X / (N − 1)`` for the centred features X, and the nonzero
eigenvalues are those of the N × N matrix ``X Σ₁ Xᵀ / (N − 1)``, which is smaller when N < D.

The gradient follows from ``d tr M^½ = ½ tr (M^{−½} dM)``. A zero eigenvalue of M stays out of the root and of its
inverse: in that direction the root has no derivative, and 0 is one of its subgradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.accelerator import has_float64
from lcsc_opt.base.errors import MetricError

Array = npt.NDArray[np.float64]
Gaussians = Sequence[tuple[Array, Array]]
"""The mean ``[D]`` and the covariance ``[D, D]`` of each."""

# A zero eigenvalue comes out as up to about 1.5 machine epsilons of the largest one, and its root would add
# 1e-8 of the largest root: a visible error when hundreds of eigenvalues are zero, as with N < D.
ROUNDING = 16 * float(np.finfo(np.float64).eps)
# Of the Frobenius norm. A covariance that was computed and stored in float32 is off by about 1e-7 of it.
COVARIANCE_ROUNDING = 1e-5
BLOCK = 256  # rows or columns of a symmetric or triangular matrix at once; the other half is not computed
_OTHER_FEATURES = "; use one extractor for both sets"


class Moments:
    """Count, mean and scatter of features: the sum of the outer products of the deviations from the mean.

    Features come all at once (:meth:`of`) or in batches (:meth:`update`), which are added on their device in float64
    without waiting for it. Moments of parts merge into those of the whole, in any order up to rounding.

    Args:
        count: N; without features there is neither mean nor scatter.
        mean: ``[D]`` float64.
        scatter: ``[D, D]`` float64.

    Attributes:
        count: N.
    """

    def __init__(self, count: int = 0, mean: Array | None = None, scatter: Array | None = None) -> None:
        self.count = count
        self._origin = torch.empty(0) if mean is None else torch.from_numpy(mean)
        self._sum = torch.zeros_like(self._origin)  # of the deviations from the origin
        # the scatter about the origin instead of the mean; below its diagonal blocks it is not kept up to date
        self._about_origin = torch.empty(0) if scatter is None else torch.from_numpy(scatter)

    @classmethod
    def of(cls, features: npt.ArrayLike) -> Moments:
        """The moments of ``features``: ``[N, D]``, N at least 1.

        Raises:
            MetricError: they are not finite.
        """
        checked = _checked(features, "features", None, None)
        mean = checked.mean(axis=0)
        deviations = checked - mean
        return cls(len(checked), mean, deviations.T @ deviations)

    @torch.inference_mode(mode=False)  # tensors made in inference mode could not be changed outside of it
    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add ``[B, D]`` of any floating-point type, all batches on one device, without waiting for the device."""
        if not len(features):
            return
        batch = features if has_float64(features.device) else features.cpu()  # as of a Mac's GPU
        if self.count == 0:  # the origin is near the mean of all, so that their products lose no digits
            self._origin = batch.mean(dim=0, dtype=torch.float64)
            self._sum = torch.zeros_like(self._origin)
            self._about_origin = self._origin.new_zeros(batch.shape[1], batch.shape[1])
        deviations = batch - self._origin  # float64, as the origin is
        self._sum += deviations.sum(dim=0)
        for start in range(0, batch.shape[1], BLOCK):  # only on and above the diagonal blocks
            rows = deviations[:, start : start + BLOCK]
            self._about_origin[start : start + BLOCK, start:].addmm_(rows.T, deviations[:, start:])
        self.count += len(features)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub & LeVeque 1983, Eq. 1.5), associative up to rounding.

        Raises:
            MetricError: the two have different D.
        """
        if self.count == 0:
            return other
        if other.count == 0:
            return self
        mean = self.mean
        if mean.shape != other.mean.shape:
            raise MetricError(f"moments of {len(mean)} and of {len(other.mean)} features cannot be merged")
        count = self.count + other.count
        shift = other.mean - mean
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean + shift * (other.count / count), self.scatter + other.scatter + between)

    @property
    def mean(self) -> Array:
        """``[D]``."""
        return (self._origin + self._sum / self.count).cpu().numpy()

    @property
    def scatter(self) -> Array:
        """``[D, D]``."""
        for start in range(0, len(self._about_origin), BLOCK):  # copy the blocks above the diagonal below it
            stop = start + BLOCK
            self._about_origin[stop:, start:stop] = self._about_origin[start:stop, stop:].T
        about_mean = torch.addr(self._about_origin, self._sum, self._sum, alpha=-1 / self.count)
        return about_mean.cpu().numpy()

    @property
    def covariance(self) -> Array:
        """``[D, D]``, divided by N − 1.

        Raises:
            MetricError: N < 2.
        """
        if self.count < 2:
            raise MetricError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as arrays on the CPU: the process that merges them need not have the device."""
        if self.count == 0:
            return Moments, ()
        return Moments, (self.count, self.mean, self.scatter)


class FrechetReference:
    """Distances to one Gaussian; the factor of its covariance is computed once, when it is first needed.

    Args:
        mean: ``[D]``.
        cov: ``[D, D]``, symmetric and positive semidefinite up to float32 rounding.

    Attributes:
        mean: ``[D]`` float64.
        cov: ``[D, D]`` float64.

    Raises:
        MetricError: an array is not finite, or has another shape.
    """

    def __init__(self, mean: npt.ArrayLike, cov: npt.ArrayLike) -> None:
        self.mean = _checked(mean, "mu", None)
        self.cov = _covariance(cov, len(self.mean), "sigma")
        self._trace = float(np.trace(self.cov))

    @property
    def dimension(self) -> int:
        """The number of features, D."""
        return len(self.mean)

    def distance(self, mean: npt.ArrayLike, cov: npt.ArrayLike) -> float:
        """Squared Fréchet distance to N(mean, cov), in float64.

        The covariance may be of any rank: fewer images than features give a singular one. Where features or moments
        are at hand, :meth:`distance_from_features` and :meth:`distance_from_moments` are faster.

        Raises:
            MetricError: an array is not finite, or has another shape.
        """
        checked = _checked(mean, "mean", self.dimension, advice=_OTHER_FEATURES)
        return self._distance(checked, _covariance(cov, self.dimension, "covariance"))

    def distance_from_features(self, features: npt.ArrayLike) -> float:
        """FID of ``features`` ``[N, D]``: the squared distance to the Gaussian with their mean and covariance.

        The covariance divides by N − 1, as in pytorch-fid and torch-fidelity. When N < D it goes
        through the N × N matrix.

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
        if moments.count < 2:
            raise MetricError(f"a covariance needs at least 2 images, got {moments.count}")
        mean = _checked(moments.mean, "moments", self.dimension, advice=_OTHER_FEATURES)
        return self._distance(mean, moments.scatter, divisor=moments.count - 1)

    def distance_and_gradient(self, features: npt.ArrayLike) -> tuple[float, Array]:
        """:meth:`distance_from_features`, up to rounding, and its derivative in them, ``[N, D]`` float64.

        Both are from one eigendecomposition. The errors are the same.
        """
        mean, deviations = self._mean_and_deviations(features)
        count = len(deviations)
        if count < self.dimension:
            half = deviations @ self.cov
            root, inverse = _trace_of_root_and_inverse(half @ deviations.T)
            of_root = inverse @ half  # d tr M^½ / d deviations with M = deviations Σ₁ deviationsᵀ
        else:
            half = self._after(deviations)
            root, inverse = _trace_of_root_and_inverse(half.T @ half)
            of_root = half @ inverse @ self._factor[0].T  # the same with M = Rᵀ deviationsᵀ deviations R
        # Both terms sum to zero over the images, so centring the features changes nothing.
        of_covariance = 2.0 * (deviations - of_root) / np.sqrt(count - 1)
        of_mean = 2.0 * (mean - self.mean) / count
        return self._combine(mean, float(np.square(deviations).sum()), root), of_covariance + of_mean

    def distances_to_others(self, features: npt.ArrayLike, others: Gaussians) -> Array:
        """``[G]``: the distances of ``features`` ``[N, D]`` to Gaussians that differ little from this one.

        They are linear in the covariance, and one decomposition serves all; what depends on the mean is exact.

        Args:
            features: of the samples.
            others: the mean ``[D]`` and covariance ``[D, D]`` of each.

        Raises:
            MetricError: as :meth:`distance_from_features`.
        """
        mean, deviations = self._mean_and_deviations(features)
        root = deviations.T
        if len(deviations) > self.dimension:  # [D, D] in place of [D, N]
            root, _ = FrechetReference(mean, deviations.T @ deviations)._factor
        trace = self._trace + float(np.square(deviations).sum())
        product = root.T @ self.cov @ root
        return _to_first_order(others, replaced=self.cov, root=root, product=product, other_mean=mean, trace=trace)

    def distances_from_others(self, features: npt.ArrayLike, others: Gaussians) -> Array:
        """``[G]``: the distances from Gaussians that differ little from that of ``features`` ``[N, D]``, likewise.

        N is at least D.
        """
        _, deviations = self._mean_and_deviations(features)
        root, _ = self._factor
        half = self._after(deviations)
        covariance = deviations.T @ deviations
        trace = self._trace + float(np.trace(covariance))
        return _to_first_order(
            others, replaced=covariance, root=root, product=half.T @ half, other_mean=self.mean, trace=trace
        )

    def _mean_and_deviations(self, features: npt.ArrayLike) -> tuple[Array, Array]:
        """``[D]`` and ``[N, D]``, the latter scaled so that deviationsᵀ deviations is the covariance."""
        checked = _checked(features, "features", None, self.dimension, advice=_OTHER_FEATURES)
        if len(checked) < 2:
            raise MetricError("a covariance needs at least 2 images, got 1")
        mean = checked.mean(axis=0)
        return mean, (checked - mean) / np.sqrt(len(checked) - 1)

    def _distance(self, mean: Array, scatter: Array, *, divisor: int = 1) -> float:
        """The distance to the covariance ``scatter / divisor``, which is never computed, to save its memory."""
        root = _sum_of_roots(np.linalg.eigvalsh(self._between(scatter))) / np.sqrt(divisor)
        return self._combine(mean, float(np.trace(scatter)) / divisor, root)

    def _combine(self, mean: Array, trace: float, trace_of_root: float) -> float:
        """The distance to a Gaussian with this mean and trace of its covariance; ``trace_of_root`` is tr (Σ₁ Σ₂)^½."""
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
            is_positive = _is_positive(values)
            return vectors[:, is_positive] * np.sqrt(values[is_positive]), False

    def _between(self, scatter: Array) -> Array:
        """``Rᵀ S R`` [r, r] of a symmetric S [D, D].

        Above the diagonal, which ``eigvalsh`` does not read, it may be anything finite.
        """
        factor, triangular = self._factor
        half = self._after(scatter)
        if not triangular:
            full: Array = factor.T @ half
            return full
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
        product = np.empty_like(rows)  # [N, D]; half of the factor is zero, and skipped
        for start in range(0, rows.shape[1], BLOCK):
            columns = slice(start, start + BLOCK)
            np.matmul(rows[:, start:], factor[start:, columns], out=product[:, columns])
        return product


def _to_first_order(
    others: Gaussians,
    *,
    replaced: Array,
    root: Array,
    product: Array,
    other_mean: Array,
    trace: float,
) -> Array:
    """``[G]``: the distances between two Gaussians, where each of ``others`` in turn takes the place of one of the two.

    Let Σ be the covariance that is replaced, and T = S Sᵀ that of the other one. The derivative in Σ is ``I − A`` with
    the map ``A = S (Sᵀ Σ S)^{−½} Sᵀ``, for which ``A Σ A = T`` (Dowson & Landau 1982).

    Args:
        others: what replaces it, each not far from it.
        replaced: Σ, ``[D, D]``.
        root: S, ``[D, r]``.
        product: ``Sᵀ Σ S``, ``[r, r]``.
        other_mean: ``[D]``, of the Gaussian that stays.
        trace: of Σ and T together.
    """
    trace_of_root, inverse = _trace_of_root_and_inverse(product)
    derivative = np.eye(len(root)) - root @ inverse @ root.T
    distances = []
    for mean, covariance in others:
        change = float((derivative * (covariance - replaced)).sum())
        distances.append(float(np.square(mean - other_mean).sum()) + trace - 2.0 * trace_of_root + change)
    return np.array(distances)


def effective_dimension(cov: Array) -> float:
    """The participation ratio of a covariance ``[D, D]``, ``(tr C)² / tr C²``: between 1 and D, 0 for zero.

    It is the number of directions in which features vary: D if all vary alike, 1 if only one does.
    """
    trace_of_square = float(np.square(cov).sum())  # of a symmetric matrix
    if trace_of_square == 0:
        return 0.0
    return float(np.trace(cov)) ** 2 / trace_of_square


def check_covariance(cov: npt.ArrayLike) -> None:
    """Check that ``cov`` ``[D, D]`` is symmetric and has no negative eigenvalue, up to float32 rounding.

    It is the array ``sigma`` of a file, as messages call it.

    Raises:
        MetricError: it is not, or it is not finite.
    """
    array = _checked(cov, "sigma", None, None)
    dimension = len(array)
    symmetric = _covariance(array, dimension, "sigma")
    rounding = COVARIANCE_ROUNDING * float(np.linalg.norm(array))
    if np.abs(array - symmetric).max() > rounding:
        raise MetricError("sigma: is not symmetric, so it is not a covariance; write the statistics again")
    try:
        # much faster than eigenvalues; fails if one of them is below -rounding; tiny is for zeros, whose rounding is 0
        np.linalg.cholesky(symmetric + (rounding + np.finfo(np.float64).tiny) * np.eye(dimension))
    except np.linalg.LinAlgError as error:
        values = np.linalg.eigvalsh(symmetric)
        raise MetricError(
            f"sigma: is not a covariance, since its smallest eigenvalue is {values[0]:.3g} and the largest "
            f"{values[-1]:.3g}; write the statistics again"
        ) from error


def _sum_of_roots(values: npt.NDArray[np.floating[Any]]) -> float:
    """``tr M^½`` from the ascending eigenvalues of M; those that are rounding count as zero."""
    return float(np.sqrt(values[_is_positive(values)]).sum())


def _trace_of_root_and_inverse(product: Array) -> tuple[float, Array]:
    """``tr M^½`` and the pseudo-inverse ``M^{−½}``, of the shape of M, with the same eigenvalues kept."""
    if product.size == 0:  # features that are all constant have no direction
        return 0.0, np.zeros_like(product)
    values, vectors = np.linalg.eigh((product + product.T) / 2)
    is_positive = _is_positive(values)
    roots = np.sqrt(values[is_positive])
    basis = vectors[:, is_positive]
    return float(roots.sum()), (basis / roots) @ basis.T


def _is_positive(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.bool_]:
    """Which of the ascending eigenvalues are larger than rounding errors."""
    largest = 0.0
    if len(values):
        largest = max(float(values[-1]), 0.0)
    is_positive: npt.NDArray[np.bool_] = values > ROUNDING * largest
    return is_positive


def _checked(values: npt.ArrayLike, name: str, *expected_shape: int | None, advice: str = "") -> Array:
    """``values``, also a tensor, as float64; ``None`` in the shape is any length from 1.

    ``advice`` ends the message about a wrong shape.

    Raises:
        MetricError: they have another shape, or are not finite real numbers.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.double()  # numpy has no bfloat16
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:  # rows of several lengths
        raise MetricError(f"{name}: expected real numbers in one shape: {error}") from error
    if array.dtype.kind not in "fiu":
        raise MetricError(f"{name}: expected real numbers, got {array.dtype}")
    fits = array.ndim == len(expected_shape) and array.size > 0
    # not strict: with more or fewer axes than expected, it does not fit already
    for length, expected_length in zip(array.shape, expected_shape, strict=False):
        fits = fits and expected_length in (None, length)
    if not fits:
        expected = ", ".join("any from 1" if length is None else str(length) for length in expected_shape)
        raise MetricError(f"{name}: expected the shape [{expected}], got {list(array.shape)}{advice}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise MetricError(f"{name}: holds NaN or infinity; check the images and the weights")
    return array


def _covariance(cov: npt.ArrayLike, dimension: int, name: str) -> Array:
    """``cov`` as ``[D, D]`` float64, exactly symmetric. Raises MetricError for another shape, NaN and infinity."""
    advice = "; mean and covariance have to be of the same features"
    array = _checked(cov, name, dimension, dimension, advice=advice)
    symmetric: Array = (array + array.T) / 2
    return symmetric
