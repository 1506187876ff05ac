"""Grids: ``EMAGrid`` and ``PowerEMAGrid`` for the baselines EMA* and power-EMA*, and ``Landscape`` for a plane."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import nevergrad as ng
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer

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
from lcsc_opt.coefficients.profiles import POWER_EMA_SIGMAS, plain_averages, power_ema_coefficients
from lcsc_opt.optimizers.parametrization import check, check_numbers, is_number, is_whole, steps_of


class _ProfileGrid(Optimizer):  # type: ignore[misc]
    """Asks the profiles of its configuration in their order; then it is finished, and asks the best of them again."""

    def __init__(
        self,
        parametrization: ng.p.Parameter | int,
        budget: int | None = None,
        num_workers: int = 1,
        config: Any = None,
    ) -> None:
        super().__init__(parametrization, budget=budget, num_workers=num_workers)
        config = EMAGrid() if config is None else config
        self._to_ask = deque(config.profiles(steps_of(self.parametrization, config.steps)))

    @property
    def finished(self) -> bool:
        """Whether every point of the grid was asked."""
        return not self._to_ask

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        value = self.recommend().value if self.finished else self._to_ask.popleft()
        return self.parametrization.spawn_child(new_value=value)


class EMAGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over plain averages of the checkpoints, whose best is called EMA*.

    They are EMAs (Liu et al. 2024, EMA* in Section 5.1 and Table 10), then uniform averages of the last checkpoints,
    and the last one: on some models one of these is better than any EMA.

    Args:
        rates: per training step; by default the paper's seven, or seven others that the window can tell apart.
        steps: ``[K]`` training steps; by default those of the parametrization's space.
    """

    def __init__(self, *, rates: Sequence[float] | None = None, steps: Sequence[int] | None = None) -> None:
        check_numbers("rates", rates)
        super().__init__(_ProfileGrid, locals(), as_config=True)
        self.rates = rates
        self.steps = steps

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each rate, then of the uniform averages."""
        return plain_averages(steps, self.rates)


class PowerEMAGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over the widths of EDM2's power-function EMA (Karras et al. 2024).

    Args:
        sigma_rels: relative standard deviations of the profile.
        steps: ``[K]`` training steps; by default those of the parametrization's space.
    """

    def __init__(self, *, sigma_rels: Sequence[float] = POWER_EMA_SIGMAS, steps: Sequence[int] | None = None) -> None:
        check_numbers("sigma_rels", sigma_rels)
        super().__init__(_ProfileGrid, locals(), as_config=True)
        self.sigma_rels = sigma_rels
        self.steps = steps

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each width."""
        return [power_ema_coefficients(steps, sigma_rel) for sigma_rel in self.sigma_rels]


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
        if corners is not None:
            check_corners(corners)
        check(
            is_whole(size) and SMALLEST_SIZE <= size <= LARGEST_SIZE,
            "size",
            f"a whole number from {SMALLEST_SIZE} to {LARGEST_SIZE}",
            size,
        )
        check(is_number(margin) and margin >= 0, "margin", "a number from 0", margin)
        super().__init__(_ProfileGrid, locals(), as_config=True)
        self.corners = corners
        self.size = size
        self.margin = margin
        self.steps = steps

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each point, from coarse to fine."""
        plane = Plane.through(default_corners(steps) if self.corners is None else self.corners, steps)
        return [plane.at(float(x), float(y)) for x, y in grid_positions(self.size, self.margin)]
