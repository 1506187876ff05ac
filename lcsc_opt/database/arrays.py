"""How coefficients and gradients are stored with a trial."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial

from lcsc_opt.base.records import Coefficients


def stored_array(array: npt.NDArray[np.float64]) -> dict[str, Any]:
    """JSON-able, bit for bit: the shape, and the bytes of little-endian float64 in base64.

    Half as long as numbers in decimals, and many times as fast to read.
    """
    content = np.ascontiguousarray(array, dtype="<f8").tobytes()
    return {"shape": list(array.shape), "float64": base64.b64encode(content).decode()}


def array_of(stored: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """The inverse of :func:`stored_array`."""
    content = np.frombuffer(base64.b64decode(stored["float64"]), dtype="<f8")
    # a copy, since an array over bytes is read-only
    return np.asarray(content.reshape(stored["shape"]).astype(np.float64))


def coefficients_of(trial: FrozenTrial) -> Coefficients:
    """The coefficients ``[K]`` or ``[S, K]`` of one of our trials."""
    return array_of(trial.user_attrs["coefficients"])
