"""Grids of baselines, such as ``EMAGrid`` for EMA*; ``GreedySoup``; and ``PlaneGrid`` for landscapes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import nevergrad as ng
import numpy as np
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer
from pydantic import Field

from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.plane import DEFAULT_SIZE, LARGEST_SIZE, SMALLEST_SIZE, Plane, plane_grid
from lcsc_opt.coefficients.profiles import (
    POWER_EMA_SIGMAS,
    counts_of,
    decay_coefficients,
    extrapolated_average,
    normalize,
    plain_averages,
    power_ema_coefficients,
)
from lcsc_opt.optimizers.parametrization import Count, Numbers, failed, steps_of

_EXTRAPOLATIONS = (0.0, 0.25, 0.5, 1.0, 2.0)
_Extrapolation = Annotated[float, Field(allow_inf_nan=False, ge=-0.5, le=10)]  # −0.5 is the average of both windows
_Windows = Annotated[Sequence[Count], Field(min_length=1)]


class _ProfileGrid(Optimizer):  # type: ignore[misc]
    """Asks the profiles of its configuration in their order; then it is finished, and asks the best of them again."""

    def __init__(self, *arguments: Any, config: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        grid = config or EMAGrid()
        self._to_ask = deque(grid.profiles(steps_of(self.parametrization)))

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
        return [decay_coefficients(len(steps), window, counts=counts_of(steps)) for window in windows]


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
        counts = counts_of(steps)
        return [
            decay_coefficients(len(steps), window, decay, counts=counts)
            for decay in options["decays"]
            for window in windows
        ]


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
        counts = counts_of(steps)
        return [
            extrapolated_average(len(steps), window, extrapolation, counts=counts)
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
