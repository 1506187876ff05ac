"""Moments of features, enough for FID: of a part of an evaluation, of a whole one, of the real images."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError

Array = npt.NDArray[np.float64]

BLOCK = 256  # rows of the scatter at once; only blocks from the diagonal on are computed, half of the work
TOLERANCE = 1e-5  # covariances are accepted with the rounding of float32; what is further off is a mistake


class Moments:
    """Count, mean and scatter of features: the sum of the outer products of the deviations from the mean.

    Features come all at once (:meth:`of`) or in batches (:meth:`update`), which are added on their device in float64
    without waiting for it. Moments of parts merge into those of the whole, in any order up to rounding.

    Args:
        count: N.
        mean: ``[D]`` float64.
        scatter: ``[D, D]`` float64.

    Attributes:
        count: N.
    """

    def __init__(self, count: int = 0, mean: Array | None = None, scatter: Array | None = None) -> None:
        self.count = count
        self._origin = torch.empty(0) if mean is None else torch.from_numpy(mean)
        self._sum = torch.zeros_like(self._origin)  # of the deviations from the origin
        self._about_origin = torch.empty(0) if scatter is None else torch.from_numpy(scatter)

    @classmethod
    def of(cls, features: npt.ArrayLike) -> Moments:
        """The moments of ``features``: ``[N, D]``, N at least 1.

        Raises:
            MetricError: they are not finite.
        """
        checked = as_features(features)
        mean = checked.mean(axis=0)
        deviations = checked - mean
        return cls(len(checked), mean, deviations.T @ deviations)

    @torch.inference_mode(mode=False)  # tensors made in inference mode could not be changed outside of it
    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add ``[B, D]`` of any floating-point type, all batches on one device, without waiting for the device."""
        if not len(features):
            return
        here = features.to(_double_device(features.device))
        if self.count == 0:
            self._origin = here.mean(dim=0, dtype=torch.float64)
            self._sum = torch.zeros_like(self._origin)
            self._about_origin = self._origin.new_zeros(here.shape[1], here.shape[1])
        deviations = here - self._origin  # float64, since one of the two is
        self._sum += deviations.sum(dim=0)
        for start in range(0, here.shape[1], BLOCK):
            rows = deviations[:, start : start + BLOCK]
            self._about_origin[start : start + BLOCK, start:].addmm_(rows.T, deviations[:, start:])
        self.count += len(features)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub & LeVeque 1983, Eq. 1.5), associative up to rounding.

        Raises:
            MetricError: the two have different D.
        """
        if not self.count or not other.count:
            return self if self.count else other
        mean, apart = self.mean, other.mean
        if mean.shape != apart.shape:
            raise MetricError(
                f"moments of {len(mean)} and of {len(apart)} features cannot be merged; compute both with one extractor"
            )
        counts = np.array([self.count, other.count], dtype=np.float64)
        offsets = np.stack([np.zeros_like(mean), apart - mean])
        shift = counts @ offsets / counts.sum()
        weighed = (offsets - shift) * np.sqrt(counts)[:, None]
        scatter = weighed.T @ weighed + self.scatter + other.scatter
        return Moments(self.count + other.count, mean + shift, scatter)

    @property
    def mean(self) -> Array:
        """``[D]``."""
        return (self._origin + self._sum / self.count).cpu().numpy()

    @property
    def scatter(self) -> Array:
        """``[D, D]``."""
        for start in range(0, len(self._about_origin), BLOCK):  # blocks below the diagonal from those above
            stop = start + BLOCK
            self._about_origin[stop:, start:stop] = self._about_origin[start:stop, stop:].T
        return torch.addr(self._about_origin, self._sum, self._sum, alpha=-1 / self.count).cpu().numpy()

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
        return Moments, (self.count, self.mean, self.scatter) if self.count else ()


@functools.cache
def _double_device(device: torch.device) -> torch.device:
    """``device`` if it can compute in float64, which Apple's GPUs cannot; else the CPU."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def as_mean(mean: npt.ArrayLike, name: str) -> Array:
    """``mean`` as ``[D]`` float64; raises MetricError when it is not one finite vector."""
    array = _finite(mean, name)
    if array.ndim != 1 or array.size == 0:
        raise MetricError(f"{name}: expected a vector [D] with D at least 1, got the shape {list(array.shape)}")
    return array


def as_covariance(cov: npt.ArrayLike, dimension: int, name: str) -> Array:
    """``cov`` as ``[D, D]`` float64, exactly symmetric.

    Raises:
        MetricError: it has another shape, is not finite, or is not symmetric or not positive semidefinite by more than
            rounding in float32.
    """
    array = _finite(cov, name)
    if array.shape != (dimension, dimension):
        raise MetricError(
            f"{name}: expected the shape [{dimension}, {dimension}] of a mean of {dimension} features, "
            f"got {list(array.shape)}"
        )
    scale = float(np.abs(array).max())
    symmetric = (array + array.T) / 2
    fault = "is not symmetric" if float(np.abs(array - array.T).max()) > TOLERANCE * scale else None
    if fault is None and scale > 0:
        try:  # a Cholesky factorization of the shifted matrix costs a tenth of its eigenvalues
            np.linalg.cholesky(symmetric + TOLERANCE * scale * np.eye(dimension))
        except np.linalg.LinAlgError:
            fault = "has negative eigenvalues"
    if fault is not None:
        raise MetricError(f"{name}: {fault}, so it is no covariance; pass np.cov(features, rowvar=False)")
    return symmetric


def as_features(features: npt.ArrayLike, name: str = "features") -> Array:
    """``features`` as ``[N, D]`` float64.

    Raises:
        MetricError: they are not finite, empty or of another rank.
    """
    array = _finite(features, name)
    if array.ndim != 2 or 0 in array.shape:
        raise MetricError(f"{name}: expected [N, D] with N and D at least 1, got the shape {list(array.shape)}")
    return array


def _finite(values: npt.ArrayLike, name: str) -> Array:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise MetricError(f"{name}: expected real numbers, got {array.dtype}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise MetricError(f"{name}: holds NaN or infinity; look for images or weights that are not finite")
    return array
