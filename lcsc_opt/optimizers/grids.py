"""Grids of averages that need no search, such as ``EMAGrid`` for EMA*; and ``PlaneGrid`` for landscapes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import nevergrad as ng
import numpy as np
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer
from pydantic import Field

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Candidate, Coefficients
from lcsc_opt.coefficients import profiles
from lcsc_opt.coefficients.plane import DEFAULT_SIZE, Plane, plane_grid
from lcsc_opt.optimizers.parametrization import Numbers, ask_with, steps_of

ProfileName = Literal["ema", "power", "uniform", "extrapolated", "single", "strength"]
Steps = tuple[int, ...]

_EXTRAPOLATIONS = (0.0, 0.25, 0.5, 1.0, 2.0)
_STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def _powers(steps: Steps, widths: Sequence[float] | None) -> list[Coefficients]:
    return [profiles.power_ema_coefficients(steps, width) for width in widths or profiles.POWER_EMA_SIGMAS]


@profiles.of_trained
def _uniforms(steps: Steps, windows: Sequence[float] | None) -> list[Coefficients]:
    return [profiles.uniform_coefficients(len(steps), window) for window in _windows(windows, len(steps))]


def _windows(windows: Sequence[float] | None, count: int) -> list[int]:
    """Numbers of last checkpoints; by default 2, 4, 8 … and all. One is left out: every report has the last checkpoint.

    A larger one than ``count`` is all of them, so that one study file serves training runs of every length.
    """
    if windows is None:
        windows = [2**power for power in range(1, count)] + [count]
    for window in windows:
        if window < 1 or window != int(window):
            raise StudySpecError(f"values: expected whole numbers of checkpoints, got {window}")
    return sorted({min(int(window), count) for window in windows})


@profiles.of_trained
def _extrapolated(steps: Steps, extrapolations: Sequence[float] | None) -> list[Coefficients]:
    """Of the last 1, 2, 4 … and a half of the checkpoints; one checkpoint alone is what it is."""
    half = len(steps) // 2
    if half == 0:
        return [np.ones(1)]
    windows = [2**power for power in range(half) if 2**power < half] + [half]
    return [
        profiles.extrapolated_average(len(steps), window, extrapolation)
        for window in windows
        for extrapolation in extrapolations or _EXTRAPOLATIONS
    ]


def _singles(steps: Steps, chosen: Sequence[float] | None) -> list[Coefficients]:
    """One checkpoint each: those of the chosen steps, else all."""
    one_hot_of_step = dict(zip(steps, np.eye(len(steps)), strict=True))
    for step in chosen or ():
        if step not in one_hot_of_step:
            raise StudySpecError(f"values: there is no checkpoint of step {step}")
    return [one_hot_of_step[int(step)] for step in chosen or steps]


def _strengths(steps: Steps, strengths: Sequence[float] | None) -> list[Coefficients]:
    """Each checkpoint of an adapter with each strength; what is left to one is the base model's."""
    if steps[0] != 0 or len(steps) < 2:
        raise StudySpecError("Grid: profile: strength is for adapters; add space: {strength: true}")
    for strength in strengths or ():
        if strength < 0:
            raise StudySpecError(f"values: expected strengths of at least 0, got {strength}")
    return [
        profiles.strength_coefficients(steps, step, strength)
        for step in steps[1:]
        for strength in strengths or _STRENGTHS
    ]


PROFILES: Mapping[ProfileName, Callable[[Steps, Sequence[float] | None], list[Coefficients]]] = {
    "ema": profiles.plain_averages,
    "power": _powers,
    "uniform": _uniforms,
    "extrapolated": _extrapolated,
    "single": _singles,
    "strength": _strengths,
}
"""Profile → a function of the training steps ``[K]`` and of the values of its number, ``None`` for the usual ones. It
lists ``[K]`` coefficients."""


class _Grid(Optimizer):  # type: ignore[misc]
    """Asks the points of its configuration in their order; then it is finished, and asks the best of them again."""

    def __init__(self, *, config: ProfileGrid | PlaneGrid, **options: Any) -> None:
        super().__init__(**options)
        self._to_ask = deque(config.points(steps_of(self.parametrization)))
        self._with_error = isinstance(config, ProfileGrid)  # people compare its few models, as the epochs of a LoRA

    @property
    def finished(self) -> bool:
        """Whether every point of the grid was asked."""
        return not self._to_ask

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        value = self.recommend().value if self.finished else self._to_ask.popleft()
        asked = self.parametrization.spawn_child(new_value=value)
        if self._with_error:
            ask_with(asked, Candidate(asked.value, error=True))
        return asked


class ProfileGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over the averages of one family, in the registry as ``Grid``; ``EMAGrid`` is that of ``ema``.

    Args:
        profile: the family; what its number is, and what is tried without ``values``:

            * ``ema``: the rate per training step (Liu et al. 2024, EMA* in Section 5.1 and Table 10); the paper's
              seven, or seven others that the window can tell apart. Then, in any case, the uniform averages of the last
              1, 3, 10 … and all checkpoints: on some models one of these is better than any EMA. The best is EMA*.
            * ``power``: the relative width of EDM2's power-function EMA (Karras et al. 2024).
            * ``uniform``: how many of the last checkpoints; 2, 4, 8 … and all.
            * ``extrapolated``: how far beyond the average of the last N checkpoints, along the line from that of the N
              before them, in distances between the two (Extra-Merge); for N = 1, 2, 4 … and a half.
            * ``single``: the training step of a checkpoint; all of them.
            * ``strength``: of an adapter, for each of its checkpoints; 0.25 to 1.5.
        values: of that number.
    """

    def __init__(self, profile: ProfileName = "ema", *, values: Numbers | None = None) -> None:
        super().__init__(_Grid, locals(), as_config=True)

    def points(self, steps: Steps) -> list[Coefficients]:
        """``[K]`` coefficients of each average, in the order in which they are asked.

        Raises:
            StudySpecError: a value is out of range.
        """
        options = self.config()
        values = options["values"]
        if values is not None and not np.isfinite(values).all():
            raise StudySpecError(f"values: expected finite numbers, got {values}")
        return PROFILES[options["profile"]](steps, values)


class PlaneGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over the plane through three models, in the registry as ``Landscape``; it searches nothing.

    Args:
        corners: three models, each a training step or ``ema:RATE``; by default the fastest, the middle and the slowest
            of the window's EMA rates.
        size: points on each side.
    """

    def __init__(
        self,
        *,
        corners: Annotated[Sequence[int | str], Field(min_length=3, max_length=3)] | None = None,
        size: Annotated[int, Field(ge=2, le=501)] = DEFAULT_SIZE,
    ) -> None:
        super().__init__(_Grid, locals(), as_config=True)  # Nevergrad takes an optimizer's options in this form

    def points(self, steps: Steps) -> list[Coefficients]:
        """``[K]`` coefficients of each point, from coarse to fine."""
        options = self.config()
        plane = Plane.through(options["corners"], steps)
        _, points = plane_grid(options["size"])
        return [plane.at(x, y) for x, y in points]
