"""Statistics of features (count, mean, scatter): of parts of an evaluation, and of the reference images."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.files import write_atomically

LABELS = {"count": "one integer", "extractor": "one string"}
MEMBERS = ("mu", "sigma", *LABELS)
BROKEN_FILE = (OSError, EOFError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Statistics of a set of features, enough for FID. Those of parts merge into those of the whole, in any order.

    Attributes:
        count: N.
        mean: ``[D]`` float64.
        scatter: ``[D, D]`` float64, the sum over images of the outer product of the deviation from the mean.
    """

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def from_features(cls, features: npt.ArrayLike) -> FeatureStatistics:
        """Statistics of ``features``: ``[N, D]``, N at least 1.

        Raises:
            MetricError: they are not finite.
        """
        checked = as_features(features)
        mean = checked.mean(axis=0)
        deviations = checked - mean
        return cls(len(checked), mean, deviations.T @ deviations)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together (Chan, Golub & LeVeque 1983, Eq. 1.5), associative up to rounding.

        Raises:
            MetricError: the two have different D.
        """
        return FeatureStatistics.merged([self, other])

    @classmethod
    def merged(cls, parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
        """Statistics of all ``parts`` together, of which there is at least one.

        Raises:
            MetricError: they have different D.
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        for part in parts:
            if part.mean.shape != first.mean.shape:
                raise MetricError(
                    f"statistics of {len(first.mean)} and of {len(part.mean)} features cannot be merged; "
                    "compute both with the same extractor"
                )
        counts = np.array([part.count for part in parts], dtype=np.float64)
        offsets = np.stack([part.mean - first.mean for part in parts])  # [parts, D]
        shift = counts @ offsets / counts.sum()
        weighed = (offsets - shift) * np.sqrt(counts)[:, None]
        scatter = weighed.T @ weighed
        for part in parts:
            scatter += part.scatter
        return cls(sum(part.count for part in parts), first.mean + shift, scatter)

    @property
    def covariance(self) -> Array:
        """``[D, D]``, divided by N − 1.

        Raises:
            MetricError: N < 2.
        """
        if self.count < 2:
            raise MetricError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Mean and covariance of the reference images' features.

    Attributes:
        mean: ``[D]`` float64.
        cov: ``[D, D]`` float64, divided by N − 1.
        count: N, how many images; None when the file does not say.
        extractor: the name of the extractor, which identifies its weights; None when the file does not say.

    Raises:
        MetricError: made of arrays that are not finite, have other shapes, or are no covariance.
    """

    mean: Array
    cov: Array
    count: int | None = None
    extractor: str | None = None

    def __post_init__(self) -> None:
        mean = as_mean(self.mean, "mu")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "cov", as_covariance(self.cov, len(mean), "sigma"))
        if self.count is not None and self.count < 2:
            raise MetricError(f"count: a covariance needs at least 2 images, got {self.count}")

    @classmethod
    def from_statistics(cls, statistics: FeatureStatistics, extractor: str | None = None) -> ReferenceStatistics:
        """The reference that ``statistics`` describe.

        Raises:
            MetricError: they are of fewer than 2 images.
        """
        return cls(statistics.mean, statistics.covariance, statistics.count, extractor)

    @property
    def dimension(self) -> int:
        """The number of features, D."""
        return len(self.mean)

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of everything that is saved, however the file was compressed."""
        labels = json.dumps([self.dimension, self.count, self.extractor])
        digest = hashlib.sha256(labels.encode())
        digest.update(np.ascontiguousarray(self.mean, dtype="<f8").tobytes())
        digest.update(np.ascontiguousarray(self.cov, dtype="<f8").tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write ``mu``, ``sigma`` and, when known, ``count`` and ``extractor`` as ``.npz``, atomically.

        The names are those of pytorch-fid, clean-fid and EDM, which can read the file.

        Raises:
            MetricError: ``path`` does not end in ``.npz`` or cannot be written.
        """
        if path.suffix != ".npz":
            raise MetricError(f"{path}: reference statistics are written as .npz, name the file so")
        arrays: dict[str, Any] = {"mu": self.mean, "sigma": self.cov}
        known = {"count": self.count, "extractor": self.extractor}
        arrays.update({name: np.array(value) for name, value in known.items() if value is not None})
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomically(path, buffer.getvalue(), error=MetricError)

    @classmethod
    def load(cls, path: Path) -> ReferenceStatistics:
        """Read what :meth:`save`, pytorch-fid, clean-fid or EDM wrote; only ``mu`` and ``sigma`` are needed.

        Pickled objects are refused.

        Raises:
            MetricError: for anything that cannot be used; the message names the file.
        """
        try:
            arrays = _read_npz(path)
            return cls(arrays["mu"], arrays["sigma"], _count(arrays), _extractor(arrays))
        except MetricError as error:
            raise MetricError(f"{path}: {error}") from error


def reference_warning(count: int | None, dimension: int, *, what: str = "reference set") -> str | None:
    """A warning about FID where ``count`` images are too few for ``dimension`` features; else None.

    ``what`` names the set: the reference images, or the samples of one evaluation. An unknown count gives no warning.
    """
    if count is None or count > dimension:
        return None
    return (
        f"the {what} has {count} images for {dimension} features: "
        f"its covariance has rank {count - 1} at most, so FID is biased upwards "
        "and compares only with FIDs of as many images; "
        f"use more than {dimension} images, or an extractor with fewer features"
    )


def _read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The known arrays that the file has. Raises MetricError, whose message does not name the file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if missing := {"mu", "sigma"} - set(archive):
                raise MetricError(
                    f"holds no {' and no '.join(sorted(missing))}; expected the .npz of pytorch-fid or of this library"
                )
            return {name: archive[name] for name in MEMBERS if name in archive}
    except MetricError:
        raise
    except FileNotFoundError as error:
        raise MetricError("does not exist; compute the reference statistics first") from error
    except (*BROKEN_FILE, TypeError, AttributeError) as error:  # a single array is no context manager
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MetricError(
            f"cannot be read as reference statistics ({reason}); expected an .npz with mu and sigma"
        ) from error


def _count(arrays: dict[str, npt.NDArray[Any]]) -> int | None:
    if "count" not in arrays:
        return None
    count = arrays["count"]
    if count.shape != () or count.dtype.kind not in "iu":
        raise MetricError(f"count: expected {LABELS['count']}")
    return int(count)


def _extractor(arrays: dict[str, npt.NDArray[Any]]) -> str | None:
    if "extractor" not in arrays:
        return None
    extractor = arrays["extractor"]
    if extractor.shape != () or extractor.dtype.kind != "U":
        raise MetricError(f"extractor: expected {LABELS['extractor']}")
    return str(extractor)


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

    Raises:
        MetricError: they are not finite, empty or of another rank.
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
