"""Numbers of the sampler that are searched together with the coefficients, such as the scale of guidance.

An optimizer moves one flat vector, a *point*: the coefficients ``[K]`` or ``[S, K]``, then the m numbers in units in
which all ranges have the same length, :data:`RANGE`. So one step size serves for all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.records import NOTHING_TUNED, Coefficients
from lcsc_opt.coefficients.profiles import normalize
from lcsc_opt.coefficients.spaces import CoefficientSpace, in_rows_of

_Array = npt.NDArray[np.float64]

RANGE = 0.4
"""The length of each range in a point: a step of 0.02, the default for coefficients, is 5 % of a range."""


@dataclasses.dataclass(frozen=True)
class TunedNumber:
    """A bounded number of the sampler.

    Attributes:
        name: as the sampler calls it.
        low: its smallest value.
        high: its largest value.
        start: where a search starts.
        differentiable: whether a gradient has its derivative.
        logarithmic: whether equal steps are equal ratios, as suits noise levels; ``low`` is above 0 then.
    """

    name: str
    low: float
    high: float
    start: float
    differentiable: bool = True
    logarithmic: bool = False

    def to_unit(self, value: float) -> float:
        """Its place in a point: 0 for the smallest value, :data:`RANGE` for the largest."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low) * RANGE
        return (value - self.low) / (self.high - self.low) * RANGE

    def to_value(self, unit: float) -> float:
        """The inverse of :meth:`to_unit`; beyond a bound, the bound."""
        share = unit / RANGE
        if self.logarithmic:
            value = self.low * math.exp(share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def slope(self, unit: float) -> float:
        """How the value changes with its share of the range: :data:`RANGE` times the derivative of :meth:`to_value`."""
        if self.logarithmic:
            return self.to_value(unit) * math.log(self.high / self.low)
        return self.high - self.low


@dataclasses.dataclass(frozen=True, eq=False)
class TunedSpace:
    """A coefficient space together with tuned numbers: the free vector is flat, and so is the point.

    It maps like a :class:`~lcsc_opt.coefficients.spaces.CoefficientSpace`, with points in place of coefficients. Free
    numbers outside of their range are reflected at its bounds, so that optimizers with a normal distribution do not
    crowd there.

    Attributes:
        coefficients: the space of the coefficients.
        numbers: m of them.
    """

    coefficients: CoefficientSpace
    numbers: tuple[TunedNumber, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps of the checkpoints."""
        return self.coefficients.steps

    @property
    def shape(self) -> tuple[int, ...]:
        """``[d + m]``; with rows ``[S d + m]``."""
        return (self._free_size + len(self.numbers),)

    def to_coefficients(self, free: _Array) -> _Array:
        """``[d + m]`` → the point ``[K + m]``."""
        coefficients = self.coefficients.to_coefficients(free[: self._free_size].reshape(self.coefficients.shape))
        return np.concatenate([coefficients.ravel(), _reflected(free[self._free_size :] + self._start)])

    def to_free(self, coefficients: _Array) -> _Array:
        """The point ``[K + m]`` → ``[d + m]``."""
        free = self.coefficients.to_free(self.coefficients_of(coefficients))
        return np.concatenate([free.ravel(), self.units_of(coefficients) - self._start])

    def to_free_gradient(self, free: _Array, gradient: _Array) -> _Array:
        """``[K + m]`` → ``[d + m]``, where the numbers are not beyond their bounds."""
        inner_free = free[: self._free_size].reshape(self.coefficients.shape)
        inner = self.coefficients.to_free_gradient(inner_free, self.coefficients_of(gradient))
        return np.concatenate([inner.ravel(), self.units_of(gradient)])

    def point(self, coefficients: Coefficients, tuned: Mapping[str, float] = NOTHING_TUNED) -> _Array:
        """``[K + m]``: coefficients and numbers; those that ``tuned`` lacks have their start. Equal rows may be one."""
        shape = self._coefficient_shape
        coefficients = in_rows_of(self.coefficients, coefficients)
        units = [number.to_unit(tuned.get(number.name, number.start)) for number in self.numbers]
        return np.concatenate([np.broadcast_to(coefficients, shape).ravel(), units])

    def coefficients_of(self, point: _Array) -> Coefficients:
        """``[K]`` or ``[S, K]``."""
        return point[: -len(self.numbers)].reshape(self._coefficient_shape)

    def units_of(self, point: _Array) -> _Array:
        """``[m]``, the numbers in units of a point."""
        return point[-len(self.numbers) :]

    def tuned_of(self, point: _Array) -> dict[str, float]:
        """Name → value."""
        units = self.units_of(point).tolist()
        return {number.name: number.to_value(unit) for number, unit in zip(self.numbers, units, strict=True)}

    def closed(self, point: _Array) -> _Array:
        """The point with coefficients divided by the sum of their row, and numbers reflected into their ranges."""
        coefficients = normalize(self.coefficients_of(point))
        return np.concatenate([coefficients.ravel(), _reflected(self.units_of(point))])

    def point_gradient(self, point: _Array, gradient: _Array) -> _Array:
        """``[K + m]``: the gradient at a point, from an evaluation's, whose numbers are in their own units."""
        units = self.units_of(point).tolist()
        slopes = [number.slope(unit) for number, unit in zip(self.numbers, units, strict=True)]
        return np.concatenate([gradient[: -len(self.numbers)], self.units_of(gradient) * slopes / RANGE])

    @property
    def _free_size(self) -> int:
        return int(np.prod(self.coefficients.shape))

    @property
    def _coefficient_shape(self) -> tuple[int, ...]:
        return (*self.coefficients.shape[:-1], len(self.steps))

    @property
    def _start(self) -> _Array:
        return np.array([number.to_unit(number.start) for number in self.numbers])


def tuned_text(tuned: Mapping[str, float]) -> str:
    """``guidance 2.31, s_churn 0.4``; empty if nothing is tuned."""
    return ", ".join(f"{name} {value:.6g}" for name, value in tuned.items())


def _reflected(units: _Array) -> _Array:
    """Units folded into [0, :data:`RANGE`]; those inside stay as they are."""
    folded = np.mod(units, 2 * RANGE)
    folded = np.minimum(folded, 2 * RANGE - folded)
    inside = (units >= 0) & (units <= RANGE)
    return np.where(inside, units, folded)
