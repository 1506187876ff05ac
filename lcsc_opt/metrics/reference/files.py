"""Files of reference images: their statistics, their features, or the images as an array.

::

    .npz           mu, sigma of pytorch-fid, clean-fid and EDM; ADM's, with the images as arr_0; features
    .npy           features [N, D]
    .safetensors   features [N, D], or mu and sigma
    .pkl           EDM2's statistics for Inception (fid) and DINOv2 (fd_dinov2)

Nothing in them is executed: of a pickle only numbers and arrays are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lcsc_opt.base.errors import MetricError, TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.pickles import Record, Span
from lcsc_opt.checkpoints.torch_files import read_content
from lcsc_opt.checkpoints.weights import read_safetensors
from lcsc_opt.metrics.names import INCEPTION
from lcsc_opt.metrics.reference.images import ImageArray
from lcsc_opt.metrics.statistics import BROKEN_FILE, ReferenceStatistics

SUFFIXES = (".npz", ".npy", ".safetensors", ".pkl")
EDM2_NAMES = {INCEPTION: "fid", "dinov2": "fd_dinov2"}
IMAGES = "arr_0"  # ADM's name (Dhariwal & Nichol 2021), and numpy's for an array without one


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceFile:
    """The content of a reference file: at least one of the three.

    Attributes:
        statistics: mean and covariance.
        features: ``[N, D]``.
        images: the images themselves.
    """

    statistics: ReferenceStatistics | None = None
    features: npt.NDArray[np.float32] | None = None
    images: ImageArray | None = None


def read_reference_file(path: Path, extractor: str, *, images: bool) -> ReferenceFile:
    """What ``path`` holds for one extractor.

    Args:
        path: one of the formats above.
        extractor: its name in metrics. Statistics beside raw images (ADM's) are Inception's.
        images: whether raw images are read even where there are statistics.

    Raises:
        MetricError: it holds nothing for that extractor, or cannot be read; the message names the file.
    """
    try:
        match path.suffix.lower():
            case ".npz":
                return _from_npz(path, extractor, images=images)
            case ".npy":
                mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # mapping fails for a file that is cut off
                return ReferenceFile(features=_features(np.array(mapped)))
            case ".safetensors":
                return _from_tensors(read_safetensors(path)[0])
            case _:
                return ReferenceFile(statistics=_from_edm2(path, extractor))
    except MetricError as error:
        message = str(error)
        raise MetricError(message if message.startswith(str(path)) else f"{path}: {message}") from error
    except (*BROKEN_FILE, TrajectoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MetricError(f"{path}: cannot be read ({reason})") from error


def has_images(path: Path) -> bool:
    """Whether a ``.npz`` holds the images themselves, as ADM's do.

    Raises:
        MetricError: it cannot be read.
    """
    try:
        return IMAGES in _names_in(path)
    except BROKEN_FILE as error:
        raise MetricError(f"{path}: cannot be read ({error})") from error


def _from_npz(path: Path, extractor: str, *, images: bool) -> ReferenceFile:
    names = _names_in(path)
    if IMAGES in names and (images or extractor != INCEPTION or "mu" not in names):
        pixels = ImageArray(_member(path, IMAGES), source=str(path))
        has_statistics = extractor == INCEPTION and {"mu", "sigma"} <= names
        return ReferenceFile(ReferenceStatistics.load(path) if has_statistics else None, images=pixels)
    if "features" in names:
        return ReferenceFile(features=_features(_member(path, "features")))
    return ReferenceFile(ReferenceStatistics.load(path))


def _names_in(path: Path) -> set[str]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return set(archive)


def _member(path: Path, name: str) -> npt.NDArray[Any]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return np.asarray(archive[name])


def _from_tensors(tensors: Mapping[str, Tensor]) -> ReferenceFile:
    if "features" in tensors:
        return ReferenceFile(features=_features(_as_array(tensors["features"])))
    if "mu" in tensors and "sigma" in tensors:
        return ReferenceFile(ReferenceStatistics(_as_array(tensors["mu"]), _as_array(tensors["sigma"])))
    raise MetricError("holds no features and no mu and sigma")


def _as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """A copy; numpy has no bfloat16, so what is shorter than float32 becomes that."""
    short = tensor.is_floating_point() and tensor.itemsize < 4
    return (tensor.float() if short else tensor).numpy().copy()


def _features(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if array.ndim != 2 or len(array) < 2 or array.dtype.kind != "f":
        raise MetricError(f"expected features [N, D] with N at least 2, got {list(array.shape)} in {array.dtype}")
    features = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(features).all():
        raise MetricError("holds features that are not finite")
    return features


def _from_edm2(path: Path, extractor: str) -> ReferenceStatistics:
    try:
        stored = read_content(path)
    except TrajectoryError as error:
        raise MetricError(f"is no dictionary of arrays alone: it {error}") from error
    name = EDM2_NAMES.get(extractor)
    statistics = stored.get(name) if isinstance(stored, dict) else None
    if not isinstance(statistics, dict) or not {"mu", "sigma"} <= set(statistics):
        raise MetricError(
            f"holds no statistics for {extractor}; EDM2's files have mu and sigma for {' and '.join(EDM2_NAMES)}"
        )
    if extractor == "dinov2":
        notice(
            f"{path.name}: EDM2 scales images for DINOv2 another way than torch-fidelity; distances to its statistics "
            "compare with each other, not with EDM2's"
        )
    count = stored.get("num_images")
    return ReferenceStatistics(
        _array(statistics["mu"], path), _array(statistics["sigma"], path), count if isinstance(count, int) else None
    )


def _array(value: Any, path: Path) -> npt.NDArray[np.float64]:
    """The array that a record of numpy's stands for. Its numbers are text in the record, or bytes still in the file."""
    try:
        _, shape, kind, column_major, content = _array_state(value)
        name, order = kind.args[0], kind.state[1] if kind.state else "<"
        if name not in ("f8", "f4", "float64", "float32") or not isinstance(content, (Span, str)):
            raise MetricError("holds arrays of something else than numbers")
        raw = content.encode("latin1") if isinstance(content, str) else _bytes(path, content)
        flat = np.frombuffer(raw, dtype=np.dtype(name).newbyteorder(order))
        return flat.reshape(shape, order="F" if column_major else "C").astype(np.float64)
    except MetricError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise MetricError(f"holds a broken array ({type(error).__name__})") from error


def _array_state(value: Any) -> tuple[Any, ...]:
    """The arguments of numpy's ``ndarray.__setstate__``: version, shape, type, whether it is column-major, content."""
    name = value.name.replace("numpy.core.", "numpy._core.") if isinstance(value, Record) else ""
    if name == "numpy._core.multiarray._reconstruct" and isinstance(value.state, tuple):
        *start, content = value.state
        encoded = isinstance(content, Record) and content.name == "_codecs.encode"  # bytes, as protocol 2 writes them
        return (*start, content.args[0] if encoded else content)
    if name == "numpy._core.numeric._frombuffer":  # as protocol 5 writes them
        content, kind, shape, order = value.args
        return (1, shape, kind, order == "F", content)
    raise MetricError("holds no arrays where mu and sigma should be")


def _bytes(path: Path, span: Span) -> bytes:
    with path.open("rb") as file:
        file.seek(span.start)
        return file.read(span.size)
