"""The plane through three models: (x, y) is θ₀ + x (θ₁ - θ₀) + y (θ₂ - θ₀) (Liu et al. 2024, Fig. 3, 6)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.profiles import check_steps, close_sum, ema_coefficients, window_ema_rates

DEFAULT_SIZE = 21  # points on a side
MARGIN = 0.75  # beyond the corners, in units of their distance; with 11 or 21 points on a side, they are among them

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """The plane through three models; ``corners`` ``[3, K]`` with their ``labels``, the first one is (0, 0)."""

    corners: Floats
    labels: tuple[str, ...]

    @classmethod
    def through(cls, corners: Sequence[int | str] | None, steps: Sequence[int]) -> Plane:
        """The plane through three corners of a trajectory with these steps.

        Args:
            corners: three training steps of checkpoints, or ``ema:RATE`` for EMAs with that rate per training step;
                ``None`` for the fastest, the middle and the slowest one of the window's EMA rates.
            steps: ``[K]``.

        Raises:
            StudySpecError: a corner is no step or EMA of the trajectory.
        """
        steps = check_steps(steps)
        if corners is None:
            rates = window_ema_rates(steps)
            corners = [f"ema:{rate!r}" for rate in (rates[0], rates[len(rates) // 2], rates[-1])]
        rows, labels = zip(*(_named_model(corner, steps) for corner in corners), strict=True)
        return cls(np.stack(rows), labels)

    @property
    def directions(self) -> Floats:
        """``[2, K]`` from the first corner to the others; each sums to zero."""
        return np.asarray(self.corners[1:] - self.corners[0])

    def at(self, x: float, y: float) -> Coefficients:
        """``[K]`` of a point."""
        return close_sum(self.corners[0] + x * self.directions[0] + y * self.directions[1])

    def project(self, coefficients: Floats) -> Floats:
        """``[n, 2]``: for each of n models, ``[n, K]``, the point (x, y) whose coefficients are nearest to its own."""
        moved = coefficients - self.corners[0]
        points, *_ = np.linalg.lstsq(self.directions.T, moved.T, rcond=None)  # the directions are not orthogonal
        return np.asarray(points.T)


def _named_model(name: int | str, steps: tuple[int, ...]) -> tuple[Coefficients, str]:
    """``[K]`` of a training step or ``ema:RATE``, and its label.

    Raises:
        StudySpecError: anything else, a step without a checkpoint, or a rate that is none.
    """
    kind, _, rate = str(name).strip().partition(":")
    try:
        if kind == "ema":
            return ema_coefficients(steps, float(rate)), f"EMA {float(rate):.6g}"
        one_hot = np.eye(len(steps))[steps.index(int(name))]
        return one_hot, f"step {int(name):,}"
    except ValueError as error:  # of int, float and index; StudySpecError is one, too
        raise StudySpecError(f"corners: expected the step of a checkpoint or ema:RATE, got {str(name)!r}") from error


def plane_grid(size: int) -> tuple[Floats, list[tuple[float, float]]]:
    """The ``[size]`` values of x, which are those of y, and all points (x, y).

    Points are from coarse to fine, so that the first ones already show the whole plane.
    """
    axis = np.asarray(np.round(np.linspace(-MARGIN, 1 + MARGIN, size), 12))  # rounded: corners are exactly 0 and 1
    points: list[tuple[float, float]] = []
    for stride in (8, 4, 2, 1):
        coarse = axis[::stride].tolist()
        points += itertools.product(coarse, coarse)
    return axis, list(dict.fromkeys(points))  # a finer grid has the points of coarser ones, too
