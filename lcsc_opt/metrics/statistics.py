"""Count, mean and scatter of features: of parts of an evaluation, and of the reference images."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lcsc_opt.errors import MetricError
from lcsc_opt.metrics._arrays import Array, as_covariance, as_features, as_mean
from lcsc_opt.metrics._files import write_atomically

MEMBERS = ("mu", "sigma", "count", "extractor")
BROKEN_FILE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """What FID needs of a set of features; statistics of parts merge into those of the whole in any grouping.

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

        Raises MetricError when they are not finite.
        """
        checked = as_features(features)
        mean = checked.mean(axis=0)
        deviations = checked - mean
        return cls(len(checked), mean, deviations.T @ deviations)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together (Chan, Golub & LeVeque 1983, Eq. 1.5), associative up to rounding.

        Raises MetricError when the two have different D.
        """
        if self.mean.shape != other.mean.shape:
            raise MetricError(
                f"statistics of {len(self.mean)} and of {len(other.mean)} features cannot be merged; "
                "compute both with the same extractor"
            )
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Array:
        """``[D, D]``, divided by N − 1. Raises MetricError when N < 2."""
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

    Raises MetricError when made of arrays that are not finite, have other shapes, or are no covariance.
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

        Raises MetricError when they are of fewer than 2 images.
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

        The names are those of pytorch-fid, clean-fid and EDM, which can read the file. Raises MetricError
        when ``path`` does not end in ``.npz`` or cannot be written.
        """
        if path.suffix != ".npz":
            raise MetricError(f"{path}: reference statistics are written as .npz, name the file so")
        arrays: dict[str, Any] = {"mu": self.mean, "sigma": self.cov}
        known = {"count": self.count, "extractor": self.extractor}
        arrays.update({name: np.array(value) for name, value in known.items() if value is not None})
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> ReferenceStatistics:
        """Read what :meth:`save`, pytorch-fid, clean-fid or EDM wrote; only ``mu`` and ``sigma`` are needed.

        Pickled objects are refused. Raises MetricError, which names the file, for anything that cannot be
        used.
        """
        arrays = _read_npz(path)
        missing = [name for name in ("mu", "sigma") if name not in arrays]
        if missing:
            raise MetricError(
                f"{path}: holds no {' and no '.join(missing)}; expected the .npz of pytorch-fid or of this library"
            )
        try:
            return cls(arrays["mu"], arrays["sigma"], _count(arrays), _extractor(arrays))
        except MetricError as error:
            raise MetricError(f"{path}: {error}") from error


def reference_warning(count: int | None, dimension: int, *, what: str = "reference set") -> str | None:
    """One line on what FID means when ``count`` images are too few for ``dimension`` features; else None.

    ``what`` names the set: the reference images, or the samples of one evaluation. An unknown count warns of
    nothing.
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
    """The arrays that are used, those that the file has."""
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise MetricError(f"{path}: is a single array; expected an .npz with mu and sigma")
            with file:  # a member that is no array comes as bytes
                return {name: np.asarray(file[name]) for name in MEMBERS if name in file}
    except MetricError:
        raise
    except FileNotFoundError as error:
        raise MetricError(f"{path}: does not exist; compute the reference statistics first") from error
    except BROKEN_FILE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MetricError(
            f"{path}: cannot be read as reference statistics ({reason}); expected an .npz with mu and sigma"
        ) from error


def _count(arrays: dict[str, npt.NDArray[Any]]) -> int | None:
    if "count" not in arrays:
        return None
    count = arrays["count"]
    if count.shape != () or count.dtype.kind not in "iu":
        raise MetricError("count: expected one integer")
    return int(count)


def _extractor(arrays: dict[str, npt.NDArray[Any]]) -> str | None:
    if "extractor" not in arrays:
        return None
    extractor = arrays["extractor"]
    if extractor.shape != () or extractor.dtype.kind != "U":
        raise MetricError("extractor: expected one string")
    return str(extractor)
