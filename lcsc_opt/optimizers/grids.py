"""Grids of baselines, such as ``EMAGrid`` for EMA*; ``GreedySoup``; and ``PlaneGrid`` for landscapes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import nevergrad as ng
import numpy as np
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer

from lcsc_opt.base.errors import StudySpecError
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
from lcsc_opt.coefficients.profiles import (
    DECAYS,
    POWER_EMA_SIGMAS,
    decay_coefficients,
    plain_averages,
    power_ema_coefficients,
    uniform_coefficients,
)
from lcsc_opt.optimizers.parametrization import check_number, check_numbers, failed, steps_of


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


def _check_windows(windows: Any) -> None:
    check_numbers("windows", windows)
    for window in windows or ():
        check_number("windows", window, least=1, whole=True)


def _windows(asked: Sequence[int] | None, count: int) -> list[int]:
    """The windows that were asked for, each at most ``count``; by default 2, 4, 8 … and all."""
    return sorted({min(window, count) for window in asked or [*(2**power for power in range(1, count)), count]})


class UniformGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over the uniform averages of the last checkpoints.

    Args:
        windows: of how many; more than there are is all of them. By default 2, 4, 8 … and all.
        steps: ``[K]`` training steps; by default those of the parametrization's space.
    """

    def __init__(self, *, windows: Sequence[int] | None = None, steps: Sequence[int] | None = None) -> None:
        _check_windows(windows)
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each window."""
        return [decay_coefficients(len(steps), last) for last in _windows(self.config()["windows"], len(steps))]


class DecayGrid(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over merges that imitate a decay of the learning rate (WSM), by :func:`decay_coefficients`.

    Args:
        decays: ``linear``, which is the uniform average, and ``1-sqrt``.
        windows: over how many of the last checkpoints, as for :class:`UniformGrid`.
        steps: ``[K]`` training steps; by default those of the parametrization's space.
    """

    def __init__(
        self,
        *,
        decays: Sequence[str] = DECAYS,
        windows: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(decays, Sequence) or isinstance(decays, str) or not decays or set(decays) - set(DECAYS):
            raise StudySpecError(f"decays: expected a list of {', '.join(DECAYS)}, got {decays!r}")
        _check_windows(windows)
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each window, for one decay after the other."""
        count, options = len(steps), self.config()
        windows = _windows(options["windows"], count)
        return [decay_coefficients(count, last, decay) for decay in options["decays"] for last in windows]


class EachCheckpoint(ConfiguredOptimizer):  # type: ignore[misc]
    """A grid over the checkpoints themselves.

    Args:
        steps: ``[K]`` training steps; by default those of the parametrization's space.
    """

    def __init__(self, *, steps: Sequence[int] | None = None) -> None:
        super().__init__(_ProfileGrid, locals(), as_config=True)

    def profiles(self, steps: tuple[int, ...]) -> list[Coefficients]:
        """``[K]`` coefficients of each checkpoint, one of them 1."""
        return list(np.eye(len(steps)))


class _GreedySoup(Optimizer):  # type: ignore[misc]
    """One running :class:`GreedySoup`. What it asks next depends on every loss before, so it waits for each of them."""

    no_parallelization = True

    def __init__(self, *arguments: Any, config: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        steps = None if config is None else config.config()["steps"]
        self._count = len(steps_of(self.parametrization, steps))
        self._to_ask: deque[tuple[int, ...]] = deque((index,) for index in range(self._count))  # whose averages
        self._single: list[tuple[float, int]] = []  # loss and index of each checkpoint that has not joined yet
        self._soup: tuple[int, ...] = ()
        self._loss = np.inf

    @property
    def finished(self) -> bool:
        """Whether every checkpoint was tried alone and in the soup."""
        return not self._to_ask

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        if self.finished:
            return self.parametrization.spawn_child(new_value=self.recommend().value)
        chosen = np.isin(np.arange(self._count), self._to_ask[0])
        return self.parametrization.spawn_child(new_value=uniform_coefficients(chosen))

    def _internal_tell_candidate(self, candidate: ng.p.Parameter, loss: float) -> None:
        if self.finished:
            return
        tried = self._to_ask.popleft()
        if not self._soup and not failed(candidate):
            self._single.append((loss, tried[0]))
        elif not failed(candidate) and loss <= self._loss:
            self._soup, self._loss = tried, loss
        if self._to_ask or not self._single:
            return
        if not self._soup:
            self._single.sort(reverse=True)
            self._loss, best = self._single.pop()
            self._soup = (best,)
        if self._single:
            self._to_ask.append((*self._soup, self._single.pop()[1]))

    def _internal_tell_not_asked(self, candidate: ng.p.Parameter, loss: float) -> None:
        """What another search evaluated is no part of the recipe."""


class GreedySoup(ConfiguredOptimizer):  # type: ignore[misc]
    """The greedy soup (Wortsman et al. 2022, Recipe 1): K single checkpoints, then at most K - 1 averages.

    The best checkpoint begins the soup. The others, sorted by their own loss, join it one after the other, each if the
    average of the soup does not get worse with it.

    Args:
        steps: ``[K]`` training steps; by default those of the parametrization's space.
    """

    def __init__(self, *, steps: Sequence[int] | None = None) -> None:
        super().__init__(_GreedySoup, locals(), as_config=True)


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
