"""How coefficients and gradients are stored with a trial.

What a search tells its optimizer is what is stored, bit for bit, so that a continued search repeats it. A row for each
channel makes these arrays large, so they are rounded before anybody uses them: coefficients to a grid on which a row's
sum of one is exact, gradients to eleven bits of each number. Their bytes are then short, and compressed.
"""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Coefficients

Array = npt.NDArray[np.float64]

_SHORT = {"int16": np.dtype("<i2"), "float16": np.dtype("<f2")}
_LARGEST_HALF = 15  # a power of two that float16 holds, with room for rounding up
_GRID_BITS = 13  # behind the point, of coefficients below 2; a row with larger ones has fewer


def rounded_coefficients(coefficients: Coefficients) -> Coefficients:
    """``[S, K]`` on a grid of powers of two that 16 bits hold; each row sums to one exactly.

    What rounding adds to a sum is taken from the row's largest coefficient. ``[K]`` comes back as it is.
    """
    if coefficients.ndim == 1:
        return coefficients
    _, exponent = math.frexp(float(np.abs(coefficients).max()) / 2)
    step = 2.0 ** min(max(exponent, 0) - _GRID_BITS, 0)
    counts = np.rint(coefficients / step)
    largest = np.abs(counts).argmax(axis=1)[:, None]
    rest = 1 / step - counts.sum(axis=1, keepdims=True)
    np.put_along_axis(counts, largest, np.take_along_axis(counts, largest, axis=1) + rest, axis=1)
    return np.asarray(counts * step + 0.0)  # no zero keeps a sign


def rounded_gradient(gradient: Array) -> Array:
    """Each number in eleven bits, as float16 in units of a power of two by the largest one."""
    scale = _half_scale(gradient)
    return np.asarray((gradient / scale).astype(np.float16).astype(np.float64) * scale + 0.0)


def _half_scale(array: Array) -> float:
    """The power of two by which an array is divided so that float16 holds it."""
    _, exponent = math.frexp(float(np.abs(array).max(initial=0.0)))
    return 2.0 ** (exponent - _LARGEST_HALF)


def stored_array(array: Array) -> dict[str, Any]:
    """JSON-able, bit for bit: the shape, and bytes in base64.

    These are of float64, or where 16 bits hold each number exactly, of int16 or float16 in units of ``scale``,
    compressed with all first bytes before all second ones.
    """
    shape = list(array.shape)
    if array.ndim > 1 and np.isfinite(array).all():
        largest = float(np.abs(array).max(initial=0.0))
        finest = 2.0 ** math.ceil(math.log2(max(largest, 2.0**-100) / np.iinfo(np.int16).max))
        half = _half_scale(array)  # rounding may have doubled it
        for name, unit in (("int16", finest), ("float16", half), ("float16", half / 2)):
            short = (array / unit).astype(_SHORT[name])
            if (short.astype(np.float64) * unit == array).all():
                planes = np.ascontiguousarray(short.reshape(-1, 1).view(np.uint8).T)
                content = zlib.compress(planes.tobytes(), 6)
                return {"shape": shape, name: base64.b64encode(content).decode(), "scale": unit}
    content = np.ascontiguousarray(array, dtype="<f8").tobytes()
    return {"shape": shape, "float64": base64.b64encode(content).decode()}


def array_of(stored: Mapping[str, Any]) -> Array:
    """The inverse of :func:`stored_array`.

    Raises:
        KeyError, TypeError, ValueError, zlib.error: it is none, as a file that came from elsewhere may have.
    """
    for dtype, kind in _SHORT.items():
        if dtype in stored:
            size = 2 * math.prod(stored["shape"])  # no more is unpacked, whatever was packed
            unpacked = zlib.decompressobj().decompress(base64.b64decode(stored[dtype]), max(size, 1))
            planes = np.frombuffer(unpacked, dtype=np.uint8)
            numbers = np.ascontiguousarray(planes.reshape(2, -1).T).view(kind)
            return np.asarray(numbers.astype(np.float64).reshape(stored["shape"]) * stored["scale"])
    content = np.frombuffer(base64.b64decode(stored["float64"]), dtype="<f8")
    # a copy, since an array over bytes is read-only
    return np.asarray(content.reshape(stored["shape"]).astype(np.float64))


def digest_of(coefficients: Coefficients) -> str:
    """What tells coefficients apart that are not stored, because replay gives them again."""
    return hashlib.sha256(np.ascontiguousarray(coefficients, dtype="<f8").tobytes()).hexdigest()[:32]


def has_coefficients(trial: FrozenTrial) -> bool:
    """Whether a trial stores its coefficients; steps of a search with many rows do not."""
    return "coefficients" in trial.user_attrs


def coefficients_of(trial: FrozenTrial) -> Coefficients:
    """The coefficients ``[K]`` or ``[S, K]`` of one of our trials.

    Raises:
        StudyStoreError: it is a step of many rows, whose coefficients are not stored.
    """
    if not has_coefficients(trial):
        raise StudyStoreError(
            f"trial {trial.number} is a step of the search, whose coefficients are not stored: name a check, a trial "
            "whose state is COMPLETE"
        )
    return array_of(trial.user_attrs["coefficients"])
