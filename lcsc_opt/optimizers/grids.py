"""Grids of baselines, such as ``EMAGrid`` for EMA*; ``GreedySoup``; and ``PlaneGrid`` for landscapes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import nevergrad as ng
import numpy as np
import numpy.typing as npt
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer
from pydantic import Field

from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.plane import DEFAULT_SIZE, LARGEST_SIZE, SMALLEST_SIZE, Plane, plane_grid
from lcsc_opt.coefficients.profiles import (
    POWER_EMA_SIGMAS,
    decay_coefficients,
    extrapolated_average,
    normalize,
    plain_averages,
    power_ema_coefficients,
)
from lcsc_opt.coefficients.tuning import RANGE, TunedSpace
from lcsc_opt.optimizers.parametrization import Count, Numbers, failed, steps_of, tuned_space_of

_Point = npt.NDArray[np.float64]
"""``[K + m]``: coefficients and tuned numbers, see :mod:`lcsc_opt.coefficients.tuning`."""

_COARSE_VALUES = 5  # of each tuned number, for each profile
_SMALLEST_STEP = 1 / 32  # of the range of a tuned number, around the best point
_LATTICE = 1024  # values of a tuned number

_EXTRAPOLATIONS = (0.0, 0.25, 0.5, 1.0, 2.0)
_Extrapolation = Annotated[float, Field(allow_inf_nan=False, ge=-0.5, le=10)]  # −0.5 is the average of both windows
_Windows = Annotated[Sequence[Count], Field(min_length=1)]


class _ProfileGrid(Optimizer):  # type: ignore[misc]
    """Asks the profiles of its configuration in their order; then it is finished, and asks the best of them again.

    With tuned numbers it asks each profile with several values of each number, and then searches around the best.
    """

    def __init__(self, *arguments: Any, config: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        grid = config or EMAGrid()
        profiles = grid.profiles(steps_of(self.parametrization))
        tuned_space = tuned_space_of(self.parametrization)
        self._point_of: dict[str, _Point] = {}  # by uid; a candidate's value is rounded differently
        self._bracketing: _Bracketing | None = None
        if tuned_space is None:
            self._to_ask = deque(profiles)
        else:
            grid_points = _with_numbers(profiles, tuned_space)
            self._to_ask = deque(grid_points)
            self._bracketing = _Bracketing(tuned_space, grid_points)

    @property
    def finished(self) -> bool:
        """Whether every point of the grid was asked."""
        if self._to_ask:
            return False
        return self._bracketing is None or self._bracketing.finished

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        if self._to_ask:
            value = self._to_ask.popleft()
        elif self.finished or self._bracketing is None:
            value = self.recommend().value
        else:
            value = self._bracketing.next()
        candidate = self.parametrization.spawn_child(new_value=value)
        self._point_of[candidate.uid] = value
        return candidate

    def _internal_tell_candidate(self, candidate: ng.p.Parameter, loss: float) -> None:
        point = self._point_of.pop(candidate.uid, None)
        if self._bracketing is not None and point is not None:
            self._bracketing.tell(point, np.inf if failed(candidate) else loss)


def _with_numbers(profiles: Sequence[Coefficients], space: TunedSpace) -> list[_Point]:
    """The points of each profile with evenly spaced values of each number, while the others have their start."""
    points: dict[bytes, _Point] = {}
    for profile in profiles:
        start = space.point(profile)
        for index in range(len(space.numbers)):
            for unit in np.linspace(0, RANGE, _COARSE_VALUES):
                point = start.copy()
                space.units_of(point)[index] = _on_lattice(unit)
                points.setdefault(point.tobytes(), point)
    return list(points.values())


def _on_lattice(unit: float) -> float:
    """A tuned number's unit within its range, rounded so that sums of the same steps are the same number."""
    share = round(unit / RANGE * _LATTICE) / _LATTICE
    return min(max(0.0, share), 1.0) * RANGE


class _Bracketing:
    """Searches the numbers of the best point, by steps up and down that are halved until they are small.

    Args:
        space: of the points.
        grid: the points that are asked first; a step between two of them is as wide as their values are apart.
    """

    def __init__(self, space: TunedSpace, grid: Sequence[_Point]) -> None:
        self._space = space
        self._first = grid[0]
        self._grid = frozenset(point.tobytes() for point in grid)
        self._asked = set(self._grid)
        self._told: set[bytes] = set()
        self._best: tuple[float, _Point] | None = None

    @property
    def finished(self) -> bool:
        """Whether the smallest steps from the best point were told, whatever else is still evaluated."""
        if self._best is None or not self._grid <= self._told:
            return False
        return self._next_to(self._best[1], self._told) is None

    def next(self) -> _Point:
        """The next point. While results are missing it may be nearer to the best than is needed, or the best again."""
        if self._best is None:  # nothing was told yet
            return self._first
        point = self._next_to(self._best[1], self._asked, smallest=_SMALLEST_STEP / 16)
        if point is None:
            return self._best[1]
        self._asked.add(point.tobytes())
        return point

    def tell(self, point: _Point, loss: float) -> None:
        """The loss of a point that was asked; infinite if it failed."""
        self._told.add(point.tobytes())
        if self._best is None or loss < self._best[0]:
            self._best = (loss, point)

    def _next_to(self, best: _Point, known: set[bytes], smallest: float = _SMALLEST_STEP) -> _Point | None:
        """The first neighbour, by the widest step, that is not among the known points; ``None`` if all are."""
        step = RANGE / (_COARSE_VALUES - 1) / 2
        while step >= smallest * RANGE:
            for index in range(len(self._space.numbers)):
                for signed_step in (step, -step):
                    point: _Point = best.copy()
                    units = self._space.units_of(point)
                    units[index] = _on_lattice(units[index] + signed_step)
                    if point.tobytes() not in known:
                        return point
            step /= 2
        return None


class EMAGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over plain averages of the checkpoints, whose best is called EMA*.

    They are EMAs (Liu et al. 2024, EMA* in Section 5.1 and Table 10), then uniform averages of the last checkpoints,
    and the last one: on some models one of these is better than any EMA.

    Args:
        rates: per training step; by default the paper's seven, or seven others that the window can tell apart.
    """

    def __init__(self, *, rates: Numbers | None = None) -> None:
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each rate, then of the uniform averages."""
        return plain_averages(steps, self.config()["rates"])


class PowerEMAGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over the widths of EDM2's power-function EMA (Karras et al. 2024).

    Args:
        sigma_rels: relative standard deviations of the profile.
    """

    def __init__(self, *, sigma_rels: Numbers = POWER_EMA_SIGMAS) -> None:
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each width."""
        return [power_ema_coefficients(steps, sigma_rel) for sigma_rel in self.config()["sigma_rels"]]


def _windows(windows: Sequence[int] | None, count: int) -> list[int]:
    """The windows of a setting, each at most ``count``; by default 2, 4, 8 … and all."""
    if not windows:
        windows = [2**power for power in range(1, count)] + [count]
    return sorted({min(window, count) for window in windows})


class UniformGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over the uniform averages of the last checkpoints.

    Args:
        windows: numbers of checkpoints; a larger one than all of them means all. By default 2, 4, 8 … and all.
    """

    def __init__(self, *, windows: _Windows | None = None) -> None:
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each window."""
        windows = _windows(self.config()["windows"], len(steps))
        return [decay_coefficients(len(steps), window) for window in windows]


class DecayGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over merges that imitate a decay of the learning rate (WSM), by :func:`decay_coefficients`.

    Args:
        decays: ``linear``, which is the uniform average, and ``1-sqrt``.
        windows: numbers of last checkpoints, as for :class:`UniformGrid`.
    """

    def __init__(
        self,
        *,
        decays: Annotated[Sequence[Literal["linear", "1-sqrt"]], Field(min_length=1)] = ("linear", "1-sqrt"),
        windows: _Windows | None = None,
    ) -> None:
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each window, for one decay after the other."""
        options = self.config()
        windows = _windows(options["windows"], len(steps))
        return [decay_coefficients(len(steps), window, decay) for decay in options["decays"] for window in windows]


class ExtraMergeGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over extrapolations along the line through two consecutive averages, by :func:`extrapolated_average`.

    Args:
        windows: numbers of checkpoints in an average; at most half of all. By default 1, 2, 4 … and a half.
        extrapolations: how far beyond the later average, in distances between the two; zero is that average itself.
    """

    def __init__(
        self,
        *,
        windows: _Windows | None = None,
        extrapolations: Annotated[Sequence[_Extrapolation], Field(min_length=1)] = _EXTRAPOLATIONS,
    ) -> None:
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each extrapolation, for one window after the other."""
        options = self.config()
        half = len(steps) // 2
        if half == 0:
            return [normalize(np.ones(len(steps)))]
        windows = options["windows"] or [2**power for power in range(half) if 2**power < half] + [half]
        return [
            extrapolated_average(len(steps), window, extrapolation)
            for window in sorted({min(window, half) for window in windows})
            for extrapolation in options["extrapolations"]
        ]


class EachCheckpoint(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over the checkpoints themselves."""

    def __init__(self) -> None:
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each checkpoint, one of them 1."""
        return list(np.eye(len(steps)))


class _GreedySoup(Optimizer):  # type: ignore[misc]
    """One running :class:`GreedySoup`. What it asks next depends on every loss before, so it waits for each of them."""

    no_parallelization = True

    def __init__(self, *arguments: Any, config: Any = None, **options: Any) -> None:  # noqa: ARG002 - it has no options
        super().__init__(*arguments, **options)
        self._count = len(steps_of(self.parametrization))
        # Checkpoints by their index: averages to ask next, first of each checkpoint alone.
        self._to_ask: deque[tuple[int, ...]] = deque((index,) for index in range(self._count))
        self._candidates: list[tuple[float, int]] = []  # loss and index of each checkpoint that was not yet added
        self._soup: tuple[int, ...] = ()
        self._soup_loss = np.inf

    @property
    def finished(self) -> bool:
        """Whether every checkpoint was tried alone and in the soup."""
        return not self._to_ask

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        if self.finished:
            return self.parametrization.spawn_child(new_value=self.recommend().value)
        is_member = np.isin(np.arange(self._count), self._to_ask[0])
        return self.parametrization.spawn_child(new_value=normalize(is_member))

    def _internal_tell_candidate(self, candidate: ng.p.Parameter, loss: float) -> None:
        if self.finished:
            return
        members = self._to_ask.popleft()
        if not failed(candidate):
            if not self._soup:
                self._candidates.append((loss, members[0]))
            elif loss <= self._soup_loss:
                self._soup = members
                self._soup_loss = loss
        if not self._to_ask:
            self._choose_next()

    def _choose_next(self) -> None:
        """Begin the soup with the best checkpoint, if all of them were tried alone; then add the next best one."""
        if not self._soup and self._candidates:
            self._candidates.sort(reverse=True)
            self._soup_loss, best = self._candidates.pop()
            self._soup = (best,)
        if self._candidates:
            _, next_best = self._candidates.pop()
            self._to_ask.append((*self._soup, next_best))

    def _internal_tell_not_asked(self, candidate: ng.p.Parameter, loss: float) -> None:
        """Ignore what another search evaluated: the recipe evaluates every checkpoint itself."""


class GreedySoup(ConfiguredOptimizer):  # type: ignore[misc]
    """The greedy soup (Wortsman et al. 2022, Recipe 1): K single checkpoints, then at most K - 1 averages.

    The soup begins with the best checkpoint. The others are tried one by one, sorted by their own loss, and each is
    added if the average of the soup does not get worse with it.
    """

    def __init__(self) -> None:
        super().__init__(_GreedySoup, locals(), as_config=True)


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
        size: Annotated[int, Field(ge=SMALLEST_SIZE, le=LARGEST_SIZE)] = DEFAULT_SIZE,
    ) -> None:
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each point, from coarse to fine."""
        options = self.config()
        plane = Plane.through(options["corners"], steps)
        _, points = plane_grid(options["size"])
        return [plane.at(x, y) for x, y in points]
