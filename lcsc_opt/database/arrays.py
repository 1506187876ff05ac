"""How coefficients and gradients are stored with a trial."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial

from lcsc_opt.base.records import Coefficients


def stored_array(array: npt.NDArray[np.float64]) -> Any:
    """JSON-able, bit for bit: ``[K]`` as a list of numbers, ``[S, K]`` as its shape and its bytes.

    Rows for 52 layers with 100 checkpoints need 55 KB in this way, and 105 KB as numbers.
    """
    if array.ndim == 1:
        return array.tolist()
    content = np.ascontiguousarray(array, dtype="<f8").tobytes()
    return {"shape": list(array.shape), "float64": base64.b64encode(content).decode()}


def array_of(stored: Any) -> npt.NDArray[np.float64]:
    """The inverse of :func:`stored_array`."""
    if not isinstance(stored, dict):
        return np.array(stored, dtype=np.float64)
    content = np.frombuffer(base64.b64decode(stored["float64"]), dtype="<f8")
    array: npt.NDArray[np.float64] = content.reshape(stored["shape"]).astype(np.float64)
    return array


def coefficients_of(trial: FrozenTrial) -> Coefficients:
    """The coefficients ``[K]`` or ``[S, K]`` of one of our trials, as plain Optuna reads it; ``[0]`` without such."""
    return array_of(trial.user_attrs.get("coefficients", ()))
