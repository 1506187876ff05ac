"""The results of the benchmark over seeds: images needed to reach a value, final values and gains, with intervals.

Every interval is a 95 % interval from a bootstrap over seeds, widened, since a plain bootstrap over five seeds is far
too short; only differences from the best have Student's or Welch's. The images needed
to reach a value are those at which the mean over seeds reaches it. If a mean, observed or resampled, never reaches it,
it needs more than the budget. So no seed is ever dropped.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from contest.answers import Measured
from contest.entries import Cell, Contender
from lcsc_opt.base.jackknife import LEVEL
from lcsc_opt.database.history import Floats
from lcsc_opt.views.ranking import Difference

RESAMPLES, RESAMPLING_SEED = 10_000, 0
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Curves:
    """One contender in one cell. Axes: S seeds, M limits.

    Attributes:
        label: the contender's.
        seeds: ``[S]``.
        limits: ``[M]`` numbers of images.
        held_out: ``[S, M]``, FID of the answer after so many images. NaN before there is one; after the end of a search
            its last answer.
        cross_check: ``[S, M]``, FID of the same answer in other features; NaN if there are none.
        searched: ``[S, M]``, FID of the same answer on the search's noise.
        images: ``[S, M]``, how many were sampled, at most the limit.
        model_calls: ``[S, M]``.
        seconds: ``[S, M]`` of evaluations.
        chosen: ``[S]``, held-out FID of the answer of ``lcsc run``, which chooses among several; NaN if it did not.
        random: whether other seeds would have given other searches.
    """

    label: str
    seeds: tuple[int, ...]
    limits: Floats
    held_out: Floats
    cross_check: Floats
    searched: Floats
    images: Floats
    model_calls: Floats
    seconds: Floats
    chosen: Floats
    random: bool = True

    @property
    def final(self) -> Floats:
        """``[S]`` held-out FID at the end of the search."""
        return np.asarray(self.held_out[:, -1])

    @property
    def end(self) -> float:
        """Images after which all searches had ended, as one of the limits."""
        spent = float(self.images[:, -1].max())
        return float(self.limits[np.searchsorted(self.limits, spent)])


def curves_of(
    contender: Contender,
    studies: Mapping[int, Sequence[Measured]],
    limits: Sequence[int],
    chosen: Mapping[int, float | None],
) -> Curves:
    """The answers of several seeds on common limits.

    Args:
        contender: the contender of these answers.
        studies: seed → answers of a finished search, at least one.
        limits: of the cell.
        chosen: seed → held-out FID of the answer of ``lcsc run``.
    """
    seeds = tuple(sorted(studies))
    columns = {
        name: np.stack([_column(studies[seed], name, limits) for seed in seeds])
        for name in ("held_out", "cross_check", "searched", "images", "model_calls", "seconds")
    }
    final = [chosen.get(seed) for seed in seeds]
    return Curves(
        label=contender.label,
        random=contender.random,
        seeds=seeds,
        limits=np.array(limits, dtype=np.float64),
        chosen=np.array([np.nan if value is None else value for value in final]),
        **columns,
    )


def _column(points: Sequence[Measured], name: str, limits: Sequence[int]) -> Floats:
    known = {point.answer.limit: _value(point, name) for point in points}
    values, last = [], math.nan
    for limit in limits:
        last = known.get(limit, last)
        values.append(last)
    return np.array(values, dtype=np.float64)


def _value(point: Measured, name: str) -> float:
    value = getattr(point, name) if name in ("held_out", "cross_check") else getattr(point.answer, name)
    return math.nan if value is None else float(value)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A number with its interval; ``low`` and ``high`` are ``None`` for a single seed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Reach:
    """The median over seeds, ``None`` if half of the seeds or more did not reach the value; and how many did."""

    median: float | None
    reached: int
    seeds: int


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Images needed to reach a value; infinite if it is not reached within the budget.

    Attributes:
        mean: images at which the mean over seeds reaches it. This number is quoted.
        seeds: the median over seeds of the images at which each seed reaches it.
    """

    mean: Interval
    seeds: Reach


def mean_interval(values: Floats) -> Interval:
    """The mean over seeds."""
    mean = float(values.mean())
    return Interval(mean) if len(values) < 2 else Interval(mean, *bootstrap_interval([values]))


def bootstrap_interval(samples: Sequence[Floats]) -> tuple[float, float]:
    """An interval for the sum of the means of independent samples, each of at least two values.

    The percentile bootstrap's interval, widened around the observed sum by the factor :func:`widening`: over three or
    five seeds the percentile interval is far too short (Hesterberg 2015, What Teachers Should Know About the Bootstrap,
    Section 4). For one sample of a normal variable the result is close to Student's interval.
    """
    low, high = percentile_interval(samples)
    observed = sum(float(sample.mean()) for sample in samples)
    factor = widening(samples)
    return observed + factor * (low - observed), observed + factor * (high - observed)


def percentile_interval(samples: Sequence[Floats]) -> tuple[float, float]:
    """The plain percentile bootstrap of the sum of means."""
    rng = np.random.default_rng(RESAMPLING_SEED)
    total = np.zeros(RESAMPLES)
    for sample in samples:
        total += sample[rng.integers(len(sample), size=(RESAMPLES, len(sample)))].mean(axis=1)
    low, high = np.quantile(total, TAILS)
    return float(low), float(high)


def widening(samples: Sequence[Floats]) -> float:
    """The factor by which an interval over so few values must be longer than the bootstrap's.

    Resampling uses the variance of the sample, and the variable's is larger by n / (n - 1). It also uses the normal
    distribution in place of Student's, which for several samples has the degrees of freedom of Welch (1947).
    """
    exact = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    resampled = np.array([sample.var() / len(sample) for sample in samples])
    if not resampled.sum() > 0:
        return 1.0
    freedom = float(exact.sum() ** 2 / sum(v**2 / (len(s) - 1) for v, s in zip(exact, samples, strict=True)))
    normal = statistics.NormalDist().inv_cdf(TAILS[1])
    return float(stdtrit(freedom, TAILS[1])) / normal * math.sqrt(exact.sum() / resampled.sum())


def first_reached(limits: Floats, values: Floats, target: Floats | float) -> Floats:
    """``[R]``, the first limit at which each row of ``values`` ``[R, M]`` is at most its target; else infinite.

    A mean of equal numbers may differ from them by its rounding, so as much is allowed.
    """
    reached = values <= np.reshape(target, (-1, 1)) * (1 + 1e-12)
    first = limits[np.argmax(reached, axis=1)]
    return np.where(reached.any(axis=1), first, np.inf)


def crossing(curves: Curves, target: Floats) -> Crossing:
    """Images until the held-out FID is at most the mean of ``target`` ``[T]``, whose seeds are resampled, too."""
    goal = float(target.mean())
    single = first_reached(curves.limits, curves.held_out, goal)
    found = np.isfinite(single)
    median = statistics.median(single.tolist())
    reach = Reach(None if math.isinf(median) else median, int(found.sum()), len(single))
    [mean] = first_reached(curves.limits, curves.held_out.mean(axis=0)[None], goal)
    if len(curves.seeds) < 2:
        return Crossing(Interval(float(mean)), reach)
    rng = np.random.default_rng(RESAMPLING_SEED)
    resampled = first_reached(curves.limits, _resampled(curves.held_out, rng), _resampled(target[:, None], rng)[:, 0])
    low, high = np.quantile(resampled, TAILS, method="inverted_cdf")
    return Crossing(Interval(float(mean), float(low), float(high)), reach)


def _resampled(values: Floats, rng: np.random.Generator) -> Floats:
    """``[S, M]`` → ``[R, M]`` means over resampled seeds, moved away from the observed mean because seeds are few."""
    mean = values.mean(axis=0)
    if len(values) < 2:
        return np.broadcast_to(mean, (RESAMPLES, len(mean)))
    drawn = values[_draws(len(values), rng)].mean(axis=1)
    stretch = widening([np.arange(len(values), dtype=np.float64)])  # of so many seeds, whatever their values
    return np.asarray(mean + stretch * (drawn - mean))


def _draws(seeds: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """``[R, S]``, which seeds each resampling takes."""
    return rng.integers(seeds, size=(RESAMPLES, seeds))


def ratio(values: Floats, reference: Floats) -> Interval:
    """Mean over seeds as a share of the mean of ``reference``. Both are resampled; logarithms are widened."""
    observed = math.log(values.mean() / reference.mean())
    if min(len(values), len(reference)) < 2:
        return Interval(math.exp(observed))
    rng = np.random.default_rng(RESAMPLING_SEED)
    above, below = (sample[_draws(len(sample), rng)].mean(axis=1) for sample in (values, reference))
    low, high = np.quantile(np.log(above / below), TAILS)
    factor = widening([np.log(values), np.log(reference)])
    return Interval(*(math.exp(observed + factor * (end - observed)) for end in (observed, low, high)))


@dataclasses.dataclass(frozen=True)
class Result:
    """One contender in one cell. Unknown values are ``None``.

    Attributes:
        label: the contender's.
        seeds: how many.
        images: that were sampled, mean over seeds.
        model_calls: mean over seeds.
        seconds: of evaluations, mean over seeds.
        searched: FID of the answer on the search's noise.
        held_out: FID of the answer.
        chosen: FID of the answer of ``lcsc run``, which chooses among several trials on other noise.
        cross_check: FID of the answer in features that the search did not see.
        to_ema: images needed to be as good as EMA*.
        to_paper: images needed to be as good as Algorithm 1 at its end.
        at_tenth: FID after a tenth of Algorithm 1's images, as a share of Algorithm 1's FID at its end.
        gain: 1 - FID / EMA*'s FID, in the features of the search.
        transfer: the same gain in the cross-check, as a share of ``gain``.
        difference: of the held-out FID from the best contender's.
        verdict: in words.
    """

    label: str
    seeds: int
    images: float
    model_calls: float
    seconds: float
    searched: float
    held_out: Interval
    chosen: Interval | None
    cross_check: Interval | None
    to_ema: Crossing | None
    to_paper: Crossing | None
    at_tenth: Interval | None
    gain: Interval | None
    transfer: Interval | None
    difference: Difference | None
    verdict: str


def results(cell: Cell, contenders: Sequence[Curves], *, ema: str, paper: str) -> list[Result]:
    """Every contender of a cell, the lowest held-out FID at the end first.

    Args:
        cell: its budget is Algorithm 1's.
        contenders: each with at least one finished search.
        ema: the label of the EMA grid.
        paper: the label of Algorithm 1.
    """
    known = {curves.label: curves for curves in contenders}
    ordered = sorted(contenders, key=lambda curves: float(curves.final.mean()))
    return [_result(cell, curves, ordered[0], known.get(ema), known.get(paper)) for curves in ordered]


def _result(cell: Cell, curves: Curves, best: Curves, ema: Curves | None, paper: Curves | None) -> Result:
    tenth = curves.held_out[:, int(np.searchsorted(curves.limits, cell.images // 10))]
    compared = None if curves is best else Difference.of(_by_seed(curves, best), _by_seed(best, curves))
    gain, transfer = (None, None) if ema is None or ema is curves else _gains(curves, ema)
    return Result(
        label=curves.label,
        seeds=len(curves.seeds),
        images=float(curves.images[:, -1].mean()),
        model_calls=float(curves.model_calls[:, -1].mean()),
        seconds=float(curves.seconds[:, -1].mean()),
        searched=float(curves.searched[:, -1].mean()),
        held_out=mean_interval(curves.final),
        chosen=_known_interval(curves.chosen),
        cross_check=_known_interval(curves.cross_check[:, -1]),
        to_ema=None if ema is None else crossing(curves, ema.final),
        to_paper=None if paper is None else crossing(curves, paper.final),
        at_tenth=None if paper is None or np.isnan(tenth).any() else ratio(tenth, paper.final),
        gain=None if gain is None else mean_interval(gain),
        transfer=None if transfer is None else mean_interval(transfer),
        difference=compared,
        verdict="best" if compared is None else compared.verdict,
    )


def _by_seed(curves: Curves, other: Curves) -> dict[int, float]:
    """Seed → FID at the end. A search without chance has the same FID for each seed of ``other``."""
    if not curves.random and other.random:
        return dict.fromkeys(other.seeds, float(curves.final[0]))
    return dict(zip(curves.seeds, curves.final.tolist(), strict=True))


def _gains(curves: Curves, ema: Curves) -> tuple[Floats, Floats | None]:
    """``[S]``: the gain of the answer, as a share of EMA*'s FID; and ``[S]``: the cross-check's gain over that gain.

    The second is ``None`` unless every seed has a gain and a cross-check.
    """
    gain = 1 - curves.final / ema.final.mean()
    cross_check = 1 - curves.cross_check[:, -1] / ema.cross_check[:, -1].mean()
    known = (gain > 0).all() and not np.isnan(cross_check).any()
    return gain, cross_check / gain if known else None


def _known_interval(values: Floats) -> Interval | None:
    return None if np.isnan(values).any() else mean_interval(values)
