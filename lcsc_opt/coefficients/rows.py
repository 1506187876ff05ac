"""What the rows of a trajectory are: weights of one step, or averages of a training; and averages made of such rows.

An average of widths that were tracked while training is a row with a profile: how much the weights of each training
time count in it. Combinations of rows reach other profiles (post-hoc EMA, Karras et al. 2024, Section 3.2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import StudySpecError

_Array = npt.NDArray[np.float64]

LARGEST_SIGMA_REL = 1 / math.sqrt(12)  # the uniform average, exponent zero
_JUST_ABOVE = 1e-4  # widths are written with a few digits
_SINGULAR = 1e-14  # pivots of rows whose profiles have length one


class Row(NamedTuple):
    """Which row of a trajectory.

    Attributes:
        step: the training step.
        width: of an average over the training up to this step, the relative standard deviation ``sigma_rel`` of its
            power-function profile; 0 for the weights of the step itself.
    """

    step: int
    width: float = 0.0

    def __str__(self) -> str:
        return f"step {self.step}, width {self.width:g}" if self.width else f"step {self.step}"


class AverageSteps(tuple[int, ...]):
    """The training steps ``[K]`` of rows, with the width of each: a plain tuple of steps for whoever needs no more.

    Attributes:
        widths: ``[K]``, 0 for the weights of a step; at least one is not.
    """

    widths: tuple[float, ...]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> tuple[int, ...]:
        """The steps of these rows; a plain tuple if they are the weights of steps.

        Raises:
            StudySpecError: a width is out of range, without a step above 0, or the rows are not in order.
        """
        rows = list(rows)
        steps = tuple(row.step for row in rows)
        widths = tuple(row.width for row in rows)
        if not any(widths):
            return steps
        for row in rows:
            check_width(row)
        for earlier, later in itertools.pairwise(rows):
            if not earlier < later:
                raise StudySpecError(f"{later} comes after {earlier}: expected rows in order, each once")
        made = cls(steps)
        made.widths = widths
        return made

    def __reduce__(self) -> tuple[object, ...]:
        return AverageSteps.of, (list(rows_of(self)),)


def rows_of(steps: Sequence[int]) -> list[Row]:
    """Each step with its width; without widths, the weights of these steps."""
    widths: Sequence[float] = [0.0] * len(steps)
    if isinstance(steps, AverageSteps):
        widths = steps.widths
    return [Row(step, width) for step, width in zip(steps, widths, strict=True)]


def check_width(row: Row) -> None:
    """Refuse a width that no average over a training can have.

    Raises:
        StudySpecError: it is out of range, or there is no training before the step.
    """
    if not 0 <= row.width <= LARGEST_SIGMA_REL + _JUST_ABOVE:
        raise StudySpecError(
            f"width: expected a sigma_rel above 0 and at most {LARGEST_SIGMA_REL:.4f} (a uniform average), got "
            f"{row.width:g}"
        )
    if row.width and row.step < 1:
        raise StudySpecError(f"width {row.width:g} at step {row.step}: an average needs a step above 0")


def power_exponent(sigma_rel: float) -> float:
    """The exponent e of the profile t^e with this width (Karras et al. 2024, Appendix C.2).

    sigma_rel^2 = (e + 1) / ((e + 2)^2 (e + 3)), solved for its largest real e; 0 for the widest.
    """
    precision = sigma_rel**-2
    return max(float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max()), 0.0)


def power_width(exponent: float) -> float:
    """The width of the profile t^e with this exponent e, at least zero: the inverse of :func:`power_exponent`."""
    return min(math.sqrt(exponent + 1) / ((exponent + 2) * math.sqrt(exponent + 3)), LARGEST_SIGMA_REL)


class Profiles(NamedTuple):
    """N profiles of the form t^e on (start, stop], each with integral one; all fields are ``[N]``.

    A power-function average up to step n is t^e on (0, n]; the weights of step n alone count as the uniform average of
    the last step, e = 0 on (n - 1, n].
    """

    start: _Array
    stop: _Array
    exponent: _Array

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Profiles:
        """The profiles of rows."""
        stop = np.array([row.step for row in rows], dtype=np.float64)
        is_average = np.array([row.width > 0 for row in rows])
        exponent = np.array([power_exponent(row.width) if row.width else 0.0 for row in rows])
        return cls(np.where(is_average, 0.0, stop - 1), stop, exponent)

    def times_power(self, others: Profiles) -> _Array:
        """Inner products with other profiles, ``[N, M]`` (Karras et al. 2024, Eq. 151, with any start).

        All powers are of ratios below one, so that none overflows.
        """
        first = Profiles(*(field[:, None] for field in self))
        low = np.maximum(first.start, others.start)
        high = np.minimum(first.stop, others.stop)
        total = first.exponent + others.exponent + 1
        at_high = _height(first, high) * _height(others, high) * high / total
        with np.errstate(divide="ignore", invalid="ignore"):
            below = np.where(low < high, np.power(low / high, total), 1.0)
        return np.asarray(at_high * (1 - below))

    def times_exponential(self, rate: float, end: float) -> _Array:
        """Inner products ``[N]`` with an exponential moving average of this rate per step up to the step ``end``.

        Its profile is continuous, rate^(end - t) on (0, end] with integral one: with few steps of memory it differs
        from sums over steps by half a step.
        """
        from scipy.special import hyp1f1  # takes a while

        decay = -math.log(rate)
        scale = decay / -math.expm1(-decay * end)

        def up_to(bound: _Array) -> _Array:
            # integral of t^e exp(-decay (end - t)) from 0 to bound, divided by bound^(e + 1), by Kummer's formula
            ratio = hyp1f1(1.0, self.exponent + 2, -decay * bound)
            return np.asarray(np.exp(-decay * (end - bound)) * ratio / (self.exponent + 1))

        share = np.power(self.start / self.stop, self.exponent + 1)
        factor = (self.exponent + 1) / (1 - share)
        return np.asarray(scale * factor * (up_to(self.stop) - share * up_to(self.start)))


def _height(profiles: Profiles, at: _Array) -> _Array:
    """The values of profiles at a time in (start, stop]."""
    share = np.power(profiles.start / profiles.stop, profiles.exponent + 1)
    height = (profiles.exponent + 1) / (profiles.stop * (1 - share))
    return np.asarray(height * np.power(at / profiles.stop, profiles.exponent))


def nearest_power(steps: AverageSteps, sigma_rel: float) -> _Array:
    """The combination of rows whose profile is nearest to a power function's, up to the last step, ``[K]``.

    Least squares over profiles (Karras et al. 2024, Algorithm 3), divided by the sum.
    """
    rows = Profiles.of(rows_of(steps))
    target = Profiles.of([Row(steps[-1], sigma_rel)])
    return _solved(rows, rows.times_power(target)[:, 0])


def nearest_exponential(steps: AverageSteps, rate: float) -> _Array:
    """The combination of rows whose profile is nearest to an exponential moving average's, ``[K]``."""
    rows = Profiles.of(rows_of(steps))
    return _solved(rows, rows.times_exponential(rate, float(steps[-1])))


def _solved(rows: Profiles, products: _Array) -> _Array:
    """Solve Gram @ x = products, with the sum one.

    Each row is scaled to length one first: profiles of early steps are much higher than those of late ones. It is
    Gaussian elimination by single numpy operations and no BLAS, so that a study asks the same bits on every machine.
    """
    gram = rows.times_power(rows)
    lengths = np.sqrt(np.diag(gram))
    matrix = gram / (lengths[:, None] * lengths)
    right = products / lengths
    for column in range(len(matrix)):
        pivot = column + int(np.abs(matrix[column:, column]).argmax())
        if abs(matrix[pivot, column]) < _SINGULAR:
            raise StudySpecError("these rows cannot be told apart: two of them have nearly the same step and width")
        order = [pivot, column]
        matrix[[column, pivot]] = matrix[order]
        right[[column, pivot]] = right[order]
        below = matrix[column + 1 :, column] / matrix[column, column]
        matrix[column + 1 :] -= below[:, None] * matrix[column]
        right[column + 1 :] -= below * right[column]
    solution = np.zeros(len(matrix))
    for row in range(len(matrix) - 1, -1, -1):
        solved_part = (matrix[row, row + 1 :] * solution[row + 1 :]).sum()
        solution[row] = (right[row] - solved_part) / matrix[row, row]
    coefficients = solution / lengths
    return np.asarray(coefficients / coefficients.sum())
