"""Checks of the arrays that come from outside: each returns float64 or raises a MetricError."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import MetricError

Array = npt.NDArray[np.float64]

# Covariances are accepted with the rounding of float32; what is further off is a mistake, not rounding.
TOLERANCE = 1e-5


def as_mean(mean: npt.ArrayLike, name: str) -> Array:
    """``mean`` as ``[D]`` float64; raises MetricError when it is not one finite vector."""
    array = _finite(mean, name)
    if array.ndim != 1 or array.size == 0:
        raise MetricError(f"{name}: expected a vector [D] with D at least 1, got the shape {list(array.shape)}")
    return array


def as_covariance(cov: npt.ArrayLike, dimension: int, name: str) -> Array:
    """``cov`` as ``[D, D]`` float64, exactly symmetric.

    Raises MetricError when it has another shape, is not finite, or is not symmetric or not positive
    semidefinite by more than rounding in float32.
    """
    array = _finite(cov, name)
    if array.shape != (dimension, dimension):
        raise MetricError(
            f"{name}: expected the shape [{dimension}, {dimension}] of a mean of {dimension} features, "
            f"got {list(array.shape)}"
        )
    scale = float(np.abs(array).max())
    if float(np.abs(array - array.T).max()) > TOLERANCE * scale:
        raise MetricError(f"{name}: is not symmetric, so it is no covariance; pass np.cov(features, rowvar=False)")
    symmetric = (array + array.T) / 2
    if scale > 0 and not _is_semidefinite(symmetric, TOLERANCE * scale):
        raise MetricError(
            f"{name}: has negative eigenvalues, so it is no covariance; pass np.cov(features, rowvar=False)"
        )
    return symmetric


def as_features(features: npt.ArrayLike, name: str = "features") -> Array:
    """``features`` as ``[N, D]`` float64.

    Raises MetricError when they are not finite, empty or of another rank.
    """
    array = _finite(features, name)
    if array.ndim != 2 or 0 in array.shape:
        raise MetricError(f"{name}: expected [N, D] with N and D at least 1, got the shape {list(array.shape)}")
    return array


def _finite(values: npt.ArrayLike, name: str) -> Array:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise MetricError(f"{name}: expected an array of numbers, got {type(values).__name__}") from error
    if array.dtype.kind not in "fiu":
        raise MetricError(f"{name}: expected real numbers, got {array.dtype}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise MetricError(f"{name}: holds NaN or infinity; look for images or weights that are not finite")
    return array


def _is_semidefinite(symmetric: Array, tolerance: float) -> bool:
    # A Cholesky factorization of the shifted matrix costs a tenth of its eigenvalues.
    shifted = symmetric + tolerance * np.eye(len(symmetric))
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    return True
