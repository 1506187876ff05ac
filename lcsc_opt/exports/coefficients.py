"""Averages that a user names: ``uniform``, ``last:N``, ``step:N``, ``ema:RATE``, ``power:WIDTH``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.profiles import (
    ema_coefficients,
    power_ema_coefficients,
    uniform_coefficients,
)

_PROFILES = {"ema": ema_coefficients, "power": power_ema_coefficients}
_WINDOWS = ("uniform", "last", "step")
_EXPECTED = "uniform, last:N, step:N, ema:RATE (as ema:0.9999) or power:WIDTH (as power:0.1)"


def average_coefficients(kind: str, steps: Sequence[int]) -> Coefficients:
    """The coefficients ``[K]`` of ``uniform``, ``last:N``, ``step:N``, ``ema:RATE`` or ``power:WIDTH``.

    Raises:
        StudySpecError: its number is none or out of range, or there is no such step, or not so many.
    """
    name, _, text = kind.partition(":")
    if name in _PROFILES:
        try:
            return _PROFILES[name](steps, float(text))
        except StudySpecError as error:
            raise StudySpecError(f"{kind}: {error}") from error
        except ValueError as error:
            raise StudySpecError(f"{kind}: expected a number, as in ema:0.9999 or power:0.1") from error
    if kind == "uniform":
        return uniform_coefficients(len(steps), len(steps))
    if name == "uniform" or not text.isdecimal() or (name == "last" and int(text) == 0):
        raise StudySpecError(f"{kind}: expected {_EXPECTED}")
    if name == "last" and int(text) > len(steps):
        raise StudySpecError(f"{kind}: there are {len(steps)} checkpoints")
    if name == "last":
        return uniform_coefficients(len(steps), int(text))
    if int(text) not in steps:
        listed = ", ".join(str(step) for step in steps[:8])
        if len(steps) > 8:
            listed += f" … {steps[-1]}"
        raise StudySpecError(f"{kind}: there is no checkpoint of this step; the steps are {listed}")
    one_hot = np.zeros(len(steps))
    one_hot[list(steps).index(int(text))] = 1.0
    return one_hot


def is_average(source: str) -> bool:
    """Whether this names an average, such as ``ema:0.9999``, and not the file of a recipe.

    Raises:
        StudySpecError: what follows the colon is no rate, width or number; or it is neither, and there is no such file.
    """
    name, _, text = source.partition(":")
    if name not in _PROFILES and name not in _WINDOWS:
        if not Path(source).exists():
            raise StudySpecError(
                f"{source}: no such file; expected {_EXPECTED}; or the file of a recipe or an exported model. "
                "lcsc export merges the answer of a study"
            )
        return False
    only_checkpoints_tell = text.isdecimal() and (name == "step" or (name == "last" and int(text) > 0))
    if not only_checkpoints_tell:  # whether there is such a step, or so many
        average_coefficients(source, (1, 2))  # of any two steps
    return True
