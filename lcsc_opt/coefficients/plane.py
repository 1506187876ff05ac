"""The plane through three models: the coefficients of its points, and where on it other coefficients lie.

A point (x, y) stands for θ₀ + x (θ₁ - θ₀) + y (θ₂ - θ₀), where θ₀, θ₁, θ₂ are the corners (Liu et al. 2024, Fig. 3, 6).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.profiles import check_steps, close_sum, ema_coefficients, window_ema_rates

LANDSCAPE = "Landscape"
"""The name of the optimizer that visits a plane; it is also a part of the name of every landscape study."""

PLANE_ATTRIBUTE = "plane"
"""The attribute of a landscape study with ``products``, see :meth:`Plane.products`; ``None`` without weights."""

DEFAULT_SIZE = 21
DEFAULT_MARGIN = 0.75  # with 21 points on a side, the corners are points of the grid
SMALLEST_SIZE, LARGEST_SIZE = 2, 501
_EMA = "ema:"
_FLAT = 1e-9  # a triangle whose shorter extent divided by its longer one is below this counts as a line

Corner = int | str
"""The training step of a checkpoint, or ``ema:RATE`` for the EMA with that rate per training step."""

Floats = npt.NDArray[np.float64]


def _check_corners(corners: Any) -> tuple[Corner, ...]:
    """Three corners; a :class:`StudySpecError` unless they are training steps or EMA rates from zero and below one."""
    listed = isinstance(corners, Sequence) and not isinstance(corners, str)
    if not listed or len(corners) != 3 or not all(type(one) is int or _rate(one) is not None for one in corners):
        raise StudySpecError(
            f"corners: expected three training steps or EMAs, as in 100,2000,4000 or ema:0.9,ema:0.99,ema:0.999, "
            f"got {corners!r}"
        )
    return tuple(corners)


def _rate(corner: Any) -> float | None:
    """The rate of ``ema:RATE``; ``None`` for everything else."""
    try:
        rate = float(corner.removeprefix(_EMA)) if isinstance(corner, str) and corner.startswith(_EMA) else -1.0
    except ValueError:
        return None
    return rate if 0 <= rate < 1 else None


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """The plane through three models; ``corners`` ``[3, K]``, the first one is the point (0, 0)."""

    corners: Floats

    @staticmethod
    def default_corners(steps: Sequence[int]) -> tuple[Corner, ...]:
        """The fastest, the middle and the slowest one of the window's EMA rates."""
        rates = window_ema_rates(steps)
        return tuple(f"{_EMA}{rate!r}" for rate in (rates[0], rates[len(rates) // 2], rates[-1]))

    @staticmethod
    def label(corner: Corner) -> str:
        """A corner's name in figures."""
        rate = _rate(corner)
        return f"step {corner:,}" if rate is None else f"EMA {rate:.6g}"

    @classmethod
    def through(cls, corners: Any, steps: Sequence[int]) -> Plane:
        """The plane through three corners of a trajectory with these steps; ``None`` takes the default ones.

        Raises:
            StudySpecError: a corner is not there, or the three lie on one line.
        """
        checked, steps = _check_corners(cls.default_corners(steps) if corners is None else corners), check_steps(steps)
        rows = []
        for corner in checked:
            rate = _rate(corner)
            if rate is None and corner not in steps:
                nearest = min(steps, key=lambda step: abs(step - int(corner)))
                raise StudySpecError(f"corners: no checkpoint was saved at step {corner}; the nearest one is {nearest}")
            rows.append(ema_coefficients(steps, rate) if rate is not None else np.equal(steps, corner).astype(float))
        plane = cls(np.stack(rows))
        long, short = np.linalg.svd(plane.directions, compute_uv=False)
        if len(steps) < 3 or short <= _FLAT * long:
            names = ", ".join(cls.label(corner) for corner in checked)
            raise StudySpecError(f"corners: {names} lie on one line; choose three that span a plane")
        return plane

    @property
    def directions(self) -> Floats:
        """``[2, K]`` from the first corner to the others; each sums to zero."""
        return np.asarray(self.corners[1:] - self.corners[0])

    def at(self, x: float, y: float) -> Coefficients:
        """``[K]`` of a point."""
        return close_sum(self.corners[0] + x * self.directions[0] + y * self.directions[1])

    def project(self, coefficients: Floats, products: Floats | None = None) -> Floats:
        """``[n, 2]``: for each of n models, the nearest point of the plane.

        Args:
            coefficients: ``[n, K]`` or ``[n, S, K]`` of the models; each row sums to one.
            products: ``[2, K]`` or ``[2, S, K]`` inner products of each direction in weight space with each checkpoint,
                from :meth:`products`. With them, distances are measured between weights, without them between
                coefficients.
        """
        count = len(self.corners[0])
        inner = (self.directions if products is None else products).reshape(2, -1, count)
        moved = (coefficients - self.corners[0]).reshape(len(coefficients), -1, count)
        if moved.shape[1] == 1:  # all layer groups move alike
            inner = inner.sum(axis=1, keepdims=True)
        elif inner.shape[1] == 1:
            moved = moved.mean(axis=1, keepdims=True)
        products_of_moved = np.tensordot(inner, moved, axes=([1, 2], [1, 2]))
        found, *_ = np.linalg.lstsq(inner.sum(axis=1) @ self.directions.T, products_of_moved, rcond=None)
        return np.asarray(np.round(found.T, 12) + 0.0)  # no -0, and no 1e-15 at a corner

    def products(self, gram: Floats) -> Floats:
        """``[2, K]`` for a projection in weight space, from the ``gram`` ``[K, K]`` of the centered checkpoints.

        ``[2, S, K]`` from ``[S, K, K]``, with a row for each layer group.
        """
        return np.moveaxis(self.directions @ gram, -2, 0)


def plane_grid(size: int, margin: float) -> tuple[Floats, Floats]:
    """The grid of a landscape, which reaches ``margin`` beyond the corners.

    Returns:
        ``[size]`` the values of x, and of y. ``[n, 2]`` the points that a landscape visits, in this order: the corners,
        then the grid from coarse to fine, so that an interrupted landscape shows the whole plane with less detail.
    """
    axis = np.asarray(np.round(np.linspace(-margin, 1 + margin, size), 12))

    def coarseness(place: tuple[int, ...]) -> int:  # the largest power of two that divides both indices
        common = math.gcd(*place)
        return common & -common or 2**30

    order = sorted(np.ndindex(size, size), key=lambda place: -coarseness(place))
    corners = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    points = [(float(axis[column]), float(axis[row])) for row, column in order]
    return axis, np.array(corners + [point for point in points if point not in corners])
