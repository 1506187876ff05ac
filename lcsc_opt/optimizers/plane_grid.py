"""``Landscape``: a grid over the plane through three models (Liu et al. 2024, Fig. 3 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nevergrad.optimization.base import ConfiguredOptimizer

from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.plane import (
    DEFAULT_MARGIN,
    DEFAULT_SIZE,
    LARGEST_SIZE,
    SMALLEST_SIZE,
    Corner,
    Plane,
    check_corners,
    default_corners,
    grid_positions,
)
from lcsc_opt.optimizers.ema_grid import ProfileGrid
from lcsc_opt.optimizers.options import check, is_number, is_whole


class Landscape(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over the plane through three models; it is no search.

    Args:
        corners: three training steps, or ``ema:RATE``; by default the fastest, the middle and the slowest one of the
            window's EMA rates.
        size: points on each side.
        margin: how far the grid reaches beyond the corners, in units of their distance.
        steps: ``[K]`` training steps; by default those of the parametrization's space.
    """

    def __init__(
        self,
        *,
        corners: Sequence[Corner] | None = None,
        size: int = DEFAULT_SIZE,
        margin: float = DEFAULT_MARGIN,
        steps: Sequence[int] | None = None,
    ) -> None:
        _check_settings(corners, size, margin)
        super().__init__(ProfileGrid, locals(), as_config=True)
        self.corners = corners
        self.size = size
        self.margin = margin
        self.steps = steps

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each point, from coarse to fine."""
        plane = Plane.through(default_corners(steps) if self.corners is None else self.corners, steps)
        return [plane.at(float(x), float(y)) for x, y in grid_positions(self.size, self.margin)]


def _check_settings(corners: Any, size: Any, margin: Any) -> None:
    if corners is not None:
        check_corners(corners)
    sizes = f"a whole number from {SMALLEST_SIZE} to {LARGEST_SIZE}"
    check(is_whole(size) and SMALLEST_SIZE <= size <= LARGEST_SIZE, "size", sizes, size)
    check(is_number(margin) and margin >= 0, "margin", "a number from 0", margin)
