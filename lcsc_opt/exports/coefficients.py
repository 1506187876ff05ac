"""Averages that a user names: ``uniform``, ``last:N``, ``step:N``, ``ema:RATE``, ``power:WIDTH``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.checkpoints.finding import shown_steps
from lcsc_opt.coefficients import profiles

_PROFILES = {"ema": profiles.ema_coefficients, "power": profiles.power_ema_coefficients}
_WINDOWS = ("uniform", "last", "step")


def average_coefficients(kind: str, steps: Sequence[int]) -> Coefficients:
    """The coefficients ``[K]`` of ``uniform``, ``last:N``, ``step:N``, ``ema:RATE`` or ``power:WIDTH``.

    Raises:
        StudySpecError: its number is missing or out of range, there is no such step, or there are not so many.
    """
    name, _, text = kind.partition(":")  # the text is empty in "uniform"
    if name in _PROFILES:
        try:
            return _PROFILES[name](steps, float(text))
        except StudySpecError as error:
            raise StudySpecError(f"{kind}: {error}") from error
        except ValueError as error:
            raise StudySpecError(f"{kind}: expected a number, as in ema:0.9999 or power:0.1") from error
    if kind == "uniform":
        return profiles.uniform_coefficients(len(steps), len(steps))
    if name == "uniform" or not text.isdecimal():
        raise StudySpecError(f"{kind}: expected uniform, last:N or step:N")
    number = int(text)
    if name == "last":
        if not 0 < number <= len(steps):
            raise StudySpecError(f"{kind}: there are {len(steps)} checkpoints")
        return profiles.uniform_coefficients(len(steps), number)
    if number not in steps:
        raise StudySpecError(f"{kind}: there is no checkpoint of this step; the steps are {shown_steps(steps)}")
    return np.asarray(np.eye(len(steps))[list(steps).index(number)])


def is_average(source: str) -> bool:
    """Whether this names an average, such as ``ema:0.9999``, and not the file of a recipe."""
    name = source.partition(":")[0]
    return name in _PROFILES or name in _WINDOWS
