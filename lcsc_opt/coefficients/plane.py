"""The plane through three models: the coefficients of its points, and where on it other coefficients lie.

A point (x, y) stands for θ₀ + x (θ₁ - θ₀) + y (θ₂ - θ₀), where θ₀, θ₁, θ₂ are the corners (Liu et al. 2024, Fig. 3, 6).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.profiles import check_steps, close_sum, ema_coefficients, window_ema_rates

DEFAULT_SIZE = 21
MARGIN = 0.75  # beyond the corners, in units of their distance; with 21 points on a side, they are points of the grid
SMALLEST_SIZE = 2
LARGEST_SIZE = 501
_THREE_CORNERS = "three steps of checkpoints or EMAs, as in 100,2000,4000 or ema:0.9,ema:0.99,ema:0.999"
_FLAT = 1e-9  # a triangle whose shorter extent divided by its longer one is below this counts as a line

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
            corners: training steps of checkpoints, or ``ema:RATE`` for EMAs with that rate per training step; by
                default the fastest, the middle and the slowest one of the window's EMA rates.
            steps: ``[K]``.

        Raises:
            StudySpecError: a corner is no step or EMA of the trajectory, or the three lie on one line.
        """
        steps = check_steps(steps)
        if corners is None:
            rates = window_ema_rates(steps)
            corners = [f"ema:{rate!r}" for rate in (rates[0], rates[len(rates) // 2], rates[-1])]
        if len(corners) != 3:
            raise StudySpecError(f"corners: expected {_THREE_CORNERS}, got {len(corners)}")
        rows: list[Coefficients] = []
        labels: list[str] = []
        for corner in corners:
            coefficients, label = _corner(corner, steps)
            rows.append(coefficients)
            labels.append(label)
        plane = cls(np.stack(rows), tuple(labels))
        longer, shorter = np.linalg.svd(plane.directions, compute_uv=False)
        if len(steps) < 3 or shorter <= _FLAT * longer:
            raise StudySpecError(f"corners: {', '.join(labels)} lie on one line; choose three that span a plane")
        return plane

    @property
    def directions(self) -> Floats:
        """``[2, K]`` from the first corner to the others; each sums to zero."""
        return np.asarray(self.corners[1:] - self.corners[0])

    def at(self, x: float, y: float) -> Coefficients:
        """``[K]`` of a point."""
        return close_sum(self.corners[0] + x * self.directions[0] + y * self.directions[1])

    def project(self, coefficients: Floats, products: Floats) -> Floats:
        """``[n, 2]``: for each of n models, the nearest point of the plane.

        Args:
            coefficients: ``[n, K]`` or ``[n, S, K]`` of the models; each row sums to one.
            products: ``[2, K]`` or ``[2, S, K]`` of :meth:`products`.
        """
        count = len(self.corners[0])
        inner = products.reshape(2, -1, count)
        moved = (coefficients - self.corners[0]).reshape(len(coefficients), -1, count)
        if moved.shape[1] == 1:  # all layer groups move alike
            inner = inner.sum(axis=1, keepdims=True)
        elif inner.shape[1] == 1:  # one measure of distances for all layer groups
            moved = moved.mean(axis=1, keepdims=True)
        products_of_moved = np.tensordot(inner, moved, axes=([1, 2], [1, 2]))
        products_of_directions = inner.sum(axis=1) @ self.directions.T
        points, *_ = np.linalg.lstsq(products_of_directions, products_of_moved, rcond=None)
        return np.asarray(np.round(points.T, 12) + 0.0)  # no -0, and no 1e-15 at a corner

    def products(self, gram: Floats | None) -> Floats:
        """``[2, K]`` inner products of each direction with each checkpoint, by which distances are measured.

        ``gram`` ``[K, K]`` of the centered checkpoints measures them between weights; without it, they are between
        coefficients. ``[2, S, K]`` from ``[S, K, K]``, with a row for each layer group.
        """
        if gram is None:
            return self.directions
        return np.moveaxis(self.directions @ gram, -2, 0)


def named_model(name: int | str, steps: tuple[int, ...]) -> tuple[Coefficients, str] | None:
    """``[K]`` of a training step or ``ema:RATE``, and its label; ``None`` for anything else, or no such checkpoint."""
    kind, _, rate = str(name).strip().partition(":")
    try:
        if kind == "ema":
            return ema_coefficients(steps, float(rate)), f"EMA {float(rate):.6g}"
        one_hot = np.eye(len(steps))[steps.index(int(name))]
        return one_hot, f"step {int(name):,}"
    except ValueError:
        return None


def _corner(corner: int | str, steps: tuple[int, ...]) -> tuple[Coefficients, str]:
    """``[K]`` of a corner, and its label."""
    model = named_model(corner, steps)
    if model is None:
        raise StudySpecError(f"corners: expected {_THREE_CORNERS}, got {str(corner)!r}")
    return model


def plane_grid(size: int) -> tuple[Floats, list[tuple[float, float]]]:
    """The grid of a landscape, which reaches :data:`MARGIN` beyond the corners.

    Returns:
        ``[size]`` the values of x, and of y. The points that a landscape visits, in this order: the corners, then the
        grid from coarse to fine, so that an interrupted landscape shows the whole plane with less detail.
    """
    axis = np.asarray(np.round(np.linspace(-MARGIN, 1 + MARGIN, size), 12))

    def coarseness(index: tuple[int, ...]) -> int:
        """The largest power of two that divides both indices; more than any for the origin."""
        common = math.gcd(*index)
        return common & -common or 2**30

    order = sorted(np.ndindex(size, size), key=lambda index: -coarseness(index))
    corners = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    points = [(float(axis[column]), float(axis[row])) for row, column in order]
    return axis, corners + [point for point in points if point not in corners]
