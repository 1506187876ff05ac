"""Reads files about reference images: ``.npz`` with statistics, the images as an array, or both.

They are mu and sigma of pytorch-fid, clean-fid and EDM; and ADM's, with the images as arr_0.
Pickles are not read, so nothing in a file is executed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.frechet import FrechetReference, check_covariance
from lcsc_opt.metrics.names import INCEPTION
from lcsc_opt.metrics.reference.images import ImageSet

SUFFIX = ".npz"
IMAGES = "arr_0"  # ADM's name (Dhariwal & Nichol 2021), and numpy's for an array without one
CONTENT = f"an {SUFFIX} with {IMAGES} (images [N, H, W, 1 or 3] in uint8), or with mu and sigma"  # for messages


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of features, with the number of images and the extractor's name if the file has them."""

    gaussian: FrechetReference
    count: int | None
    extractor: str | None


def read_reference_file(path: Path, extractor: str, *, images: bool) -> tuple[Statistics | None, ImageSet | None]:
    """The content of ``path`` for one extractor: statistics, images; at least one of these.

    Args:
        path: the file.
        extractor: its name in metrics, such as ``inception``.
        images: whether the images are read even if the file has statistics for the extractor, too: these are enough
            for FID, and images take long.

    Raises:
        MetricError: it holds nothing for that extractor, or cannot be read; the message names the file.
    """
    with _archive(path) as archive:
        # ADM's files have images, and the statistics of their Inception features
        has_inception_statistics = extractor == INCEPTION and "mu" in archive
        if IMAGES in archive and (images or not has_inception_statistics):
            pixels = ImageSet.of_array(archive[IMAGES], source=str(path))
            statistics = None
            if has_inception_statistics:
                statistics = _statistics(archive)
            return statistics, pixels
        return _statistics(archive), None


def has_images(path: Path) -> bool:
    """Whether an ``.npz`` holds images as an array.

    Raises:
        MetricError: it cannot be read; the message names the file.
    """
    with _archive(path) as archive:
        return IMAGES in archive


@contextmanager
def _archive(path: Path) -> Iterator[Mapping[str, Any]]:
    """The arrays of an ``.npz``. Errors while this is open become a MetricError of one line that names the file."""
    try:
        # numpy would leave a damaged file open that it has opened itself
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            yield archive
    except Exception as error:  # a parser of foreign bytes may raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        if not isinstance(error, MetricError):
            reason = f"cannot be read ({reason})"
        raise MetricError(f"{path}: {reason.removeprefix(f'{path}: ')}") from error


def _statistics(arrays: Mapping[str, Any]) -> Statistics:
    """The statistics in the arrays of a file. Raises MetricError if there are none, or they are none."""
    if not {"mu", "sigma"} <= set(arrays):
        raise MetricError(f"holds neither images nor statistics; expected {CONTENT}")
    count = None
    if "count" in arrays:
        count = int(arrays["count"])
        if count < 2:
            raise MetricError(f"count: a covariance needs at least 2 images, got {count}")
    extractor = None
    if "extractor" in arrays:
        extractor = str(arrays["extractor"])
    gaussian = FrechetReference(arrays["mu"], arrays["sigma"])
    check_covariance(arrays["sigma"])
    return Statistics(gaussian, count, extractor)
