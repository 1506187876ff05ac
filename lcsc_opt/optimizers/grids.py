"""Grids: ``EMAGrid`` and ``PowerEMAGrid`` for the baselines EMA* and power-EMA*, and ``PlaneGrid`` for landscapes."""

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
    plane_grid,
)
from lcsc_opt.coefficients.profiles import POWER_EMA_SIGMAS, plain_averages, power_ema_coefficients
from lcsc_opt.optimizers.parametrization import check_number, check_numbers, steps_of


class _ProfileGrid(Optimizer):  # type: ignore[misc]
    """Asks the profiles of its configuration in their order; then it is finished, and asks the best of them again."""

    def __init__(self, *arguments: Any, config: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        config = EMAGrid() if config is None else config
        self._to_ask = deque(config.profiles(steps_of(self.parametrization, config.config()["steps"])))

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

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each rate, then of the uniform averages."""
        return plain_averages(steps, self.config()["rates"])


class PowerEMAGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over the widths of EDM2's power-function EMA (Karras et al. 2024).

    Args:
        sigma_rels: relative standard deviations of the profile.
        steps: ``[K]`` training steps; by default those of the parametrization's space.
    """

    def __init__(self, *, sigma_rels: Sequence[float] = POWER_EMA_SIGMAS, steps: Sequence[int] | None = None) -> None:
        check_numbers("sigma_rels", sigma_rels)
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each width."""
        return [power_ema_coefficients(steps, sigma_rel) for sigma_rel in self.config()["sigma_rels"]]


class PlaneGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over the plane through three models, in the registry as ``Landscape``; it is no search.

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
        check_number("size", size, least=SMALLEST_SIZE, most=LARGEST_SIZE, whole=True)
        check_number("margin", margin, least=0)
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each point, from coarse to fine."""
        options = self.config()
        plane = Plane.through(options["corners"], steps)
        return [plane.at(float(x), float(y)) for x, y in plane_grid(options["size"], options["margin"])[1]]
