"""Sum-to-one algebra: EMA profiles, and checks and measures of coefficients.

Coefficients are ``[K]`` float64, of any sign, and sum to one (within 1e-12); with a row for each of S layer groups,
``[S, K]``, each row sums to one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence, Sized
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Coefficients

Averages = TypeVar("Averages", bound=Callable[..., Any])

PAPER_EMA_RATES = (0.999, 0.9995, 0.9999, 0.999943, 0.99995, 0.99997, 0.99999)
"""The seven rates per training step of Liu et al. 2024, Table 10."""

POWER_EMA_SIGMAS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25)
"""Relative widths of EDM2's power-function profile, over the range that Karras et al. 2024 sweep."""

LARGEST_SIGMA_REL = 1 / math.sqrt(12)  # the uniform average, exponent zero
NEAR_ZERO = 1e-3  # division by a sum below this would blow up every coefficient
_SUM_TOLERANCE = 1e-9  # of the sum of coefficients that a user gives
_FEW_ROWS = 8  # which are summed one by one
_COARSE = 1e-13  # a tenth of the rounding error that is allowed in a sum


def starts_of(steps: Sequence[int]) -> npt.NDArray[np.float64]:
    """``[K]``: the training step after which each checkpoint's begin: it stands for the steps since the one before.

    What is before the first checkpoint is not known: it gets as many steps as the next one.
    """
    ends = np.array(steps, dtype=np.float64)
    return np.concatenate([[2 * ends[0] - ends[1]], ends[:-1]])


def check_steps(steps: Sequence[int]) -> tuple[int, ...]:
    """The training steps of a trajectory, checked: at least two, whole, not negative, strictly increasing.

    Raises:
        StudySpecError: fewer than two, or one that is not whole, negative or out of order.
    """
    if len(steps) < 2:
        raise StudySpecError(f"steps: expected at least 2 checkpoints to combine, got {len(steps)}")
    checked: list[int] = []
    previous = -1
    for index, value in enumerate(steps):
        step = value if type(value) is int else _whole_number(value)
        if step is None or step <= previous:
            raise StudySpecError(f"steps[{index}]: expected a whole number above {previous}, got {value!r}")
        checked.append(step)
        previous = step
    return tuple(checked)


def _whole_number(given: Any) -> int | None:
    """A number without a fraction, also one of numpy, as an ``int``; ``None`` for everything else, also for text."""
    try:
        number = int(given)
    except (TypeError, ValueError, OverflowError):  # neither a number nor text of one, NaN, infinity
        return None
    if number == given:  # neither "5" nor 5.5 is
        return number
    return None


def ema_coefficients(steps: Sequence[int], rate: float) -> Coefficients:
    """The coefficients that an exponential moving average would have given the checkpoints.

    Liu et al. 2024, Eq. 6, with ``rate`` per training step: the checkpoint saved at step n_i stands for the steps
    since n_{i-1}, so a_i = rate^(n_K - n_i) - rate^(n_K - n_{i-1}); the first takes the rest, rate^(n_K - n_1).
    Rate 0 gives the last checkpoint. One of step 0, which no training has changed, has no part where two follow.

    Returns:
        ``[K]``, sum to one.

    Raises:
        StudySpecError: ``rate`` is out of range, or :func:`check_steps` refuses the steps.
    """
    return np.asarray(ema_profiles(steps, [rate])[0])


def of_trained(averages: Averages) -> Averages:
    """Decorates a function of the steps that gives averages, ``[K]`` each: a checkpoint of step 0 has no part in them.

    It is the base model of adapters, or a network before its training. Where two others do not follow, it counts as
    one of them.
    """

    @functools.wraps(averages)
    def padded(steps: Sequence[int], *arguments: Any) -> Any:
        if not _begins_untrained(steps):
            return averages(steps, *arguments)
        given = averages(steps[1:], *arguments)
        if isinstance(given, list):
            return [np.append(0.0, average) for average in given]
        return np.insert(given, 0, 0.0, axis=-1)

    return cast("Averages", padded)


@of_trained
def ema_profiles(steps: Sequence[int], rates: Sequence[float]) -> npt.NDArray[np.float64]:
    """``[R, K]``: :func:`ema_coefficients` of each of R rates; raises as that."""
    for rate in rates:
        if not 0 <= rate < 1:
            raise StudySpecError(f"rate: expected at least 0 and below 1, got {rate}")
    check_steps(steps)
    ages = np.subtract(steps[-1], steps, dtype=np.float64)
    cumulative = np.power(np.array(rates, dtype=np.float64)[:, None], ages)  # weights of checkpoints 0..i
    return close_sum(np.diff(cumulative, prepend=0.0))


@of_trained
def plain_averages(steps: Sequence[int], rates: Sequence[float] | None = None) -> list[Coefficients]:
    """``[K]`` of the averages that need no search: EMAs, then uniform averages of the last 1, 3, 10 … and of all.

    The rates of the EMAs are by default those of :func:`window_ema_rates`.

    Raises:
        StudySpecError: a rate is out of range, or :func:`check_steps` refuses the steps.
    """
    averages = [*ema_profiles(steps, rates or window_ema_rates(steps))]
    windows = [*(window for window in (1, 3, 10, 30, 100) if window < len(steps)), len(steps)]
    return averages + [uniform_coefficients(len(steps), window) for window in windows]


def _begins_untrained(steps: Sequence[int]) -> bool:
    """Whether the first checkpoint is one of step 0, and two that were trained follow."""
    return len(steps) > 2 and steps[0] == 0


def uniform_coefficients(total: int, last: int) -> Coefficients:
    """The average of the last N of ``total`` = K checkpoints: ``[K]``, sum to one."""
    return normalize(np.arange(total, 0, -1) <= last)


def extrapolated_average(total: int, last: int, extrapolation: float) -> Coefficients:
    """The uniform average of the last N checkpoints, moved on by what it gained over that of the N before them.

    With the averages a₁ of the last N and a₂ of the N before, it is ``a₁ + λ (a₁ − a₂)``: consecutive averages of a
    training lie near one line (Zhou et al. 2026, Extra-Merge, arXiv 2605.26484).

    Args:
        total: K, the number of checkpoints.
        last: N, at most K / 2.
        extrapolation: λ; zero is a₁.

    Returns:
        ``[K]``, sum to one; those before the last N are negative for a positive λ.
    """
    age = np.arange(total, 0, -1)  # of the last checkpoint 1
    latest = uniform_coefficients(total, last)
    earlier = normalize((age > last) & (age <= 2 * last))
    return close_sum(latest + extrapolation * (latest - earlier))


def strength_coefficients(steps: Sequence[int], step: int, strength: float) -> Coefficients:
    """One checkpoint of an adapter with a strength: ``[K]``, sum to one.

    The first checkpoint, at step 0, stands for the base model (:mod:`lcsc_opt.trajectory.adapters`). Both factors of
    the adapter are multiplied by the root of the strength.
    """
    coefficients = np.zeros(len(steps))
    coefficients[list(steps).index(step)] = math.sqrt(strength)
    coefficients[0] = 1.0 - math.sqrt(strength)
    return close_sum(coefficients)


def strength_of(coefficients: Coefficients) -> float:
    """The strength of a combination of adapters, whose first coefficient is the base model's; of rows the mean."""
    return float(np.square(1.0 - coefficients[..., 0]).mean())


def average_name(coefficients: Coefficients, steps: Sequence[int], names: Sequence[str] = ()) -> str | None:
    """What people call coefficients that a baseline asks, such as ``EMA 0.9995`` or ``average of the last 10``.

    ``None`` for others, also for ``[S, K]``, and for the ``[K + 1]`` of :func:`trainer_ema`.

    Args:
        coefficients: ``[K]``, sum to one.
        steps: ``[K]`` training steps of the checkpoints.
        names: ``[K]`` what people call each checkpoint; of another number of checkpoints, ``step 300`` and so on.
    """
    if len(names) != len(steps):
        names = [f"step {step}" for step in steps]
    if coefficients.shape != (len(steps),) or len(steps) < 2:
        return None
    if _begins_untrained(steps) and coefficients[0] == 0:
        return average_name(coefficients[1:], steps[1:], names[1:])
    is_used = np.abs(coefficients) > _COARSE
    count_used = int(np.count_nonzero(is_used))
    if np.allclose(coefficients, is_used / count_used, atol=_COARSE):
        if count_used == 1 and is_used[-1]:
            return "last checkpoint"
        if count_used == 1:
            return names[int(is_used.argmax())]
        if count_used == len(steps):
            return f"average of all {count_used}"
        if is_used[-count_used:].all():
            return f"average of the last {count_used}"
        return _strength_name(coefficients, steps, names) or f"average of {count_used}"
    return (
        _ema_name(coefficients, steps)
        or _power_ema_name(coefficients, steps)
        or _strength_name(coefficients, steps, names)
        or _extrapolated_name(coefficients, count_used)
    )


def _strength_name(coefficients: Coefficients, steps: Sequence[int], names: Sequence[str]) -> str | None:
    """``step 300, strength 0.75``, of :func:`strength_coefficients`; ``None`` for coefficients that are none."""
    used = np.flatnonzero(np.abs(coefficients) > _COARSE)
    if steps[0] != 0 or len(used) != 2 or used[0] != 0 or coefficients[used[1]] < 0:
        return None
    return f"{names[used[1]]}, strength {coefficients[used[1]] ** 2:.4g}"


def _ema_name(coefficients: Coefficients, steps: Sequence[int]) -> str | None:
    """``EMA 0.9995``: the one that gives the last checkpoint the same weight, if all others have that EMA's, too."""
    weight_before_last = float(coefficients[:-1].sum())  # has more digits than one minus the last weight
    last_interval = steps[-1] - steps[-2]
    rate = max(weight_before_last, 0.0) ** (1 / last_interval)  # Liu et al. 2024, Eq. 6, solved for the last weight
    if rate < 1 and np.allclose(coefficients, ema_coefficients(steps, rate)):
        return f"EMA {rate:.6g}"
    return None


def _power_ema_name(coefficients: Coefficients, steps: Sequence[int]) -> str | None:
    """``power EMA 0.15``, found as :func:`_ema_name` finds an EMA."""
    weight_before_last = float(coefficients[:-1].sum())  # has more digits than one minus the last weight
    if steps[-2] == 0 or not 0 < weight_before_last < 1:
        return None
    # the profile t^e puts (n_{K-1} / n_K)^(e + 1) of its weight before the last interval
    exponent = math.log(weight_before_last) / math.log(steps[-2] / steps[-1]) - 1
    sigma_rel = power_width(max(exponent, 0.0))  # of a uniform average it may be rounded to just below zero
    if np.allclose(coefficients, power_ema_coefficients(steps, sigma_rel)):
        return f"power EMA {sigma_rel:.6g}"
    return None


def _extrapolated_name(coefficients: Coefficients, count_used: int) -> str | None:
    """``last 4, extrapolated by 0.5``, of :func:`extrapolated_average`; ``None`` for coefficients that are none.

    Args:
        coefficients: ``[K]``.
        count_used: how many of them are not zero: an extrapolation from N checkpoints uses the last 2 N.
    """
    if count_used % 2:
        return None
    last = count_used // 2
    extrapolation = -float(coefficients[-count_used:-last].sum())  # the N before the last N have the weight -λ
    if extrapolation < 0:  # between two averages, and no way beyond the latest
        return None
    if not np.allclose(coefficients, extrapolated_average(len(coefficients), last, extrapolation)):
        return None
    window = "last checkpoint" if last == 1 else f"last {last}"
    return f"{window}, extrapolated by {extrapolation:.6g}"


def last_alone(count: int) -> Coefficients:
    """``[count]``: the last checkpoint, and nothing of the others."""
    coefficients = np.zeros(count)
    coefficients[-1] = 1.0
    return coefficients


def trainer_ema(count: int, index: int = 0) -> Coefficients:
    """``[count + 1 + index]``: stands for an average that the trainer kept itself, as if it were one more checkpoint.

    It is no combination of the ``count`` = K checkpoints, since it holds all steps in between.

    Args:
        count: K.
        index: which of the trainer's averages, from 0.
    """
    return last_alone(count + 1 + index)


def index_of_trainer_ema(coefficients: npt.ArrayLike, count: int) -> int | None:
    """Which average of the trainer's :func:`trainer_ema` has made these coefficients for; ``None`` for all others."""
    numbers = np.asarray(coefficients)
    if numbers.ndim != 1 or len(numbers) <= count or not np.array_equal(numbers, last_alone(len(numbers))):
        return None
    return len(numbers) - count - 1


def is_saved(coefficients: Coefficients) -> bool:
    """Whether a model is as its trainer saved it: one checkpoint in all rows, or that of :func:`trainer_ema`."""
    rows = np.atleast_2d(coefficients)
    first = rows[0]
    return bool((rows == first).all() and np.count_nonzero(first) == 1 and first.max() == 1.0)


def power_ema_coefficients(steps: Sequence[int], sigma_rel: float) -> Coefficients:
    """The coefficients of the power-function profile of EDM2 (Karras et al. 2024, Eq. 3 and Algorithm 2).

    The weight of training time t is proportional to t^e; ``sigma_rel`` is the profile's standard deviation relative to
    the length of the training, above 0 and at most 1/sqrt(12) (the uniform average): sigma_rel^2 = (e + 1) / ((e + 2)^2
    (e + 3)), solved for its largest real e (Appendix C.2). As with :func:`ema_coefficients`, the first checkpoint takes
    all that came before it.

    Returns:
        ``[K]``, non-negative, sum to one.

    Raises:
        StudySpecError: ``sigma_rel`` is out of range, or :func:`check_steps` refuses the steps.
    """
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL:
        raise StudySpecError(
            f"sigma_rel: expected above 0 and at most {LARGEST_SIGMA_REL:.4f} (a uniform average), got {sigma_rel}"
        )
    exponent = power_exponent(sigma_rel)
    times = np.asarray(check_steps(steps), dtype=np.float64) / steps[-1]
    return close_sum(np.diff(np.power(times, exponent + 1), prepend=0.0))  # of cumulative weights


def power_exponent(sigma_rel: float) -> float:
    """The exponent e of the profile t^e with this width (Karras et al. 2024, Appendix C.2).

    sigma_rel^2 = (e + 1) / ((e + 2)^2 (e + 3)), solved for its largest real e; 0 for the widest.
    """
    precision = sigma_rel**-2
    return max(float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max()), 0.0)


def power_width(exponent: float) -> float:
    """The width of the profile t^e with this exponent e, at least zero: the inverse of :func:`power_exponent`."""
    sigma_rel = math.sqrt(exponent + 1) / ((exponent + 2) * math.sqrt(exponent + 3))
    return min(sigma_rel, LARGEST_SIGMA_REL)  # rounding could make that of exponent zero larger


def window_ema_rates(steps: Sequence[int]) -> tuple[float, ...]:
    """EMA rates that this window of checkpoints can tell apart.

    A rate averages over about 1 / (1 - rate) steps. The paper's seven rates (Table 10) reach from 1,000 to 100,000
    steps, in windows of 20,000 to 50,000. In a window below a fifth of the slowest rate's length, all slow rates would
    leave nearly the whole weight on the first checkpoint. There, the same lengths are rescaled on a logarithmic axis,
    to reach from the mean interval between checkpoints to half of the window, or to one and a half intervals if that
    is longer.

    Returns:
        Seven rates, increasing; the paper's where the window is long enough.

    Raises:
        StudySpecError: :func:`check_steps` refuses the steps.
    """
    steps = check_steps(steps)
    window = steps[-1] - steps[0]
    intervals = len(steps) - 1
    mean_interval = window / intervals
    lengths = 1 / (1 - np.array(PAPER_EMA_RATES))
    if lengths[-1] <= 5 * window:
        return PAPER_EMA_RATES
    longest = max(window / 2, mean_interval * 1.5)
    position = np.log(lengths / lengths[0]) / np.log(lengths[-1] / lengths[0])  # of each length, from 0 to 1
    adapted = mean_interval * (longest / mean_interval) ** position
    return tuple(float(1 - 1 / length) for length in adapted)


def normalize(coefficients: npt.ArrayLike) -> Coefficients:
    """Divide by the sum (Liu et al. 2024, Alg. 1, line 10): ``[K]``, or each row of ``[S, K]``.

    Raises:
        StudySpecError: a sum is not finite, or too near zero to divide by it.
    """
    values = np.asarray(coefficients, dtype=np.float64)
    rows = np.atleast_2d(values)
    totals = exact_sums(rows)
    divisible = np.isfinite(totals) & (np.abs(totals) >= NEAR_ZERO)
    if not divisible.all():
        total = totals[~divisible][0]
        raise StudySpecError(f"coefficients sum to {total:.3g}, which cannot be scaled to one")
    return close_sum((rows / totals[:, None]).reshape(values.shape))


def exact_sum(numbers: npt.NDArray[np.float64]) -> float:
    """The sum of ``[n]``, rounded once; NaN or infinite if a number is, or if float64 cannot hold the sum."""
    try:
        return math.fsum(numbers.tolist())
    except OverflowError:
        return math.inf
    except ValueError:  # infinity and minus infinity
        return math.nan


def exact_sums(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sums of ``[S, K]``, ``[S]``: of few long rows as :func:`exact_sum`, of many short ones right to a bit or two.

    Many are summed column by column with what rounding has lost (Neumaier 1974).
    """
    if len(rows) <= max(rows.shape[-1], _FEW_ROWS):
        return np.array([exact_sum(row) for row in rows])
    total = np.zeros(len(rows))
    lost = np.zeros(len(rows))
    with np.errstate(over="ignore", invalid="ignore"):
        for column in rows.T:
            added = total + column
            is_larger = np.abs(total) >= np.abs(column)
            lost += np.where(is_larger, (total - added) + column, (column - added) + total)
            total = added
        return np.asarray(total + lost)


def close_sum(coefficients: Coefficients) -> Coefficients:
    """Push the rounding error into the largest coefficient of ``[K]``, or of each row of ``[S, K]``.

    The sum is then one to the last bit or two. Some optimizers ask for coefficients of thousands and more, and a number
    of that size cannot be changed by as little as the error; the coefficient nearest to zero then takes the rest.
    """
    closed = np.array(coefficients, dtype=np.float64)
    rows = np.atleast_2d(closed)  # a view: changes are the copy's
    every = np.arange(len(rows))
    rows[every, np.abs(rows).argmax(axis=1)] += 1.0 - exact_sums(rows)
    rest = 1.0 - exact_sums(rows)
    far = every[np.abs(rest) > _COARSE]
    rows[far, np.abs(rows[far]).argmin(axis=1)] += rest[far]
    return closed


def sum_abs(coefficients: Coefficients) -> float:
    """Σ|a|: 1 inside the convex hull of the checkpoints, more outside. Of ``[S, K]``, the mean over rows."""
    with np.errstate(over="ignore"):
        return float(np.abs(coefficients).sum(axis=-1).mean())


def effective_count(coefficients: Coefficients) -> float:
    """How many checkpoints matter, (Σ|a|)² / Σa²: from 1 for a single one to K for equal magnitudes.

    Of ``[S, K]``, the mean over rows.
    """
    magnitude = np.abs(coefficients)
    relative = magnitude / magnitude.max(axis=-1, keepdims=True)  # no square overflows
    return float((relative.sum(axis=-1) ** 2 / np.square(relative).sum(axis=-1)).mean())


def check_coefficients(coefficients: npt.ArrayLike, count: int, *, rows: Sized | None = None) -> Coefficients:
    """Finite float64 coefficients that sum to one: ``[K]``; where there are S ``rows``, also ``[S, K]``.

    Coefficients of a search sum to one within 1e-12 (:func:`close_sum`). The sum of those that a user gives, perhaps
    written with ten digits, may be off by 1e-9.

    Args:
        coefficients: numbers, an array, or a tensor on any device.
        count: K.
        rows: the S layer groups; ``None`` if there are none, and ``[K]`` alone is right.

    Raises:
        StudySpecError: another shape, no numbers, a value that is not finite, or another sum.
    """
    try:
        if hasattr(coefficients, "detach"):  # a tensor; torch is not imported for this
            coefficients = coefficients.detach().cpu()
        values = np.asarray(coefficients, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise StudySpecError(f"Coefficients are not numbers: {error}.") from None
    _check_shape(values.shape, count, None if rows is None else len(rows))
    if not np.isfinite(values).all():
        raise StudySpecError("Coefficients have to be finite; some are NaN or infinite.")
    off = float(np.abs(exact_sums(values.reshape(-1, count)) - 1.0).max())
    if off > _SUM_TOLERANCE:
        raise StudySpecError(
            f"Coefficients have to sum to one; the sum is off by {off:.3g}. Divide them by their sum, in float64."
        )
    return values


def _check_shape(shape: tuple[int, ...], count: int, rows: int | None) -> None:
    """Refuse what is neither ``[K]`` nor, where there are S ``rows``, ``[S, K]``."""
    if shape == (count,) or (rows is not None and shape == (rows, count)):
        return
    expected = f"[{count}], one for each checkpoint"
    if rows is not None:
        expected = f"[{count}] or [{rows}, {count}], one for each checkpoint, in one row or one for each layer group"
    raise StudySpecError(f"Coefficients have shape {list(shape)}; expected {expected}.")


@of_trained
def default_origin(steps: Sequence[int]) -> Coefficients:
    """Where a search starts unless it is told otherwise: the EMA ``[K]`` with the middle one of the window's rates."""
    rates = window_ema_rates(steps)
    return ema_coefficients(steps, rates[len(rates) // 2])


def describe_coefficients(coefficients: Coefficients, steps: Sequence[int]) -> dict[str, float]:
    """A few numbers that say what coefficients ``[K]`` or ``[S, K]`` look like.

    ``sum_abs`` is Σ|a|, ``negative`` the share of it that is negative, ``effective`` the number of checkpoints that
    matter, ``largest`` the largest in magnitude and ``largest_step`` the step it belongs to. Of ``[S, K]``, ``sum_abs``
    and ``effective`` are means over the rows; the others are those of all entries.
    """
    magnitude = np.abs(coefficients)
    largest = np.unravel_index(magnitude.argmax(), magnitude.shape)
    relative = magnitude / magnitude[largest]  # no sum overflows
    return {
        "sum_abs": sum_abs(coefficients),
        "negative": float(relative[coefficients < 0].sum() / relative.sum()),
        "effective": effective_count(coefficients),
        "largest": float(coefficients[largest]),
        "largest_step": int(steps[int(largest[-1])]),
    }
