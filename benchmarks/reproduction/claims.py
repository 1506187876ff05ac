"""Ratios of losses over seeds, their intervals, and whether a claim holds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from scipy.special import stdtrit

from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.database.history import Standing, ema_grid
from lcsc_opt.database.metric_rows import MetricRow
from lcsc_opt.database.names import EMA
from reproduction.table import Claim, Where

HOLDS, NOT, UNKNOWN = "holds", "fails", "inconclusive"
CONFIDENCE = 0.95
PAPERS = "LCSC"
OPTIMIZERS = (PAPERS, "LCSCQuadratic", "LCSCGradient")

Found = Mapping[int, Standing]
"""Seed → study, of one optimizer at one point."""


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Geometric mean over seeds with a 95 % interval; its ends are ``None`` if there is one seed."""

    mean: float
    low: float | None = None
    high: float | None = None
    seeds: int = 1

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.mean:.3g}{interval}"


def ratio_of(values: Sequence[float]) -> Ratio | None:
    """The ratio over seeds, with Student's interval for the mean of the logarithms.

    ``None`` without values, or if one of them has no logarithm: the others alone would flatter.
    """
    if not values or not all(value > 0 and math.isfinite(value) for value in values):
        return None
    logs = [math.log(value) for value in values]
    mean = statistics.fmean(logs)
    if len(logs) == 1:
        return Ratio(math.exp(mean))
    half = float(stdtrit(len(logs) - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


def inverse(ratio: Ratio | None) -> Ratio | None:
    """One over the ratio: if higher was better, below one is now better."""
    if ratio is None or ratio.low is None or ratio.high is None:
        return None if ratio is None else Ratio(1 / ratio.mean)
    return Ratio(1 / ratio.mean, 1 / ratio.high, 1 / ratio.low, ratio.seeds)


def verdict(ratio: Ratio | None) -> str:
    """Whether the claim holds that the ratio is below one."""
    if ratio is None or ratio.low is None or ratio.high is None:
        return UNKNOWN
    return HOLDS if ratio.high < 1 else NOT if ratio.low > 1 else UNKNOWN


def against_ema(found: Found, *, cross_check: bool = False) -> Ratio | None:
    """Held-out loss over EMA*'s on the same noise; with ``cross_check``, in the second network's features."""
    rows = [row for row in _rows(found) if (row.cross_check if cross_check else row.metric == "loss")]
    return ratio_of([_over(row.value, row.baseline) for row in rows if row.baseline is not None])


def judged(found: Found, metric: str) -> Ratio | None:
    """The answer's value of a metric over EMA*'s, on the same noise; higher is better."""
    rows = [row for row in _rows(found) if row.metric == metric]
    return ratio_of([_over(row.value, row.baseline) for row in rows if row.baseline is not None])


def _rows(found: Found) -> list[MetricRow]:
    """The rows of what each search found, which its report compares with EMA*."""
    rows: list[MetricRow] = []
    for study in found.values():
        if study.report is not None and study.found is not None:
            rows += study.report.rows(study.found.model.name, EMA)
    return rows


def between(better: Found, worse: Found) -> Ratio | None:
    """Held-out loss of ``better`` over ``worse``, seed by seed, for pairs with the same images and noise."""
    ratios = []
    for seed in sorted(better.keys() & worse.keys()):
        one, other = better[seed].found, worse[seed].found
        if one is None or other is None:
            continue
        if (one.images, one.seeds) == (other.images, other.seeds):
            ratios.append(_over(one.loss, other.loss))
    return ratio_of(ratios)


def _over(value: float, reference: float) -> float:
    return value / reference if reference else math.inf


class Points:
    """The results at every point of a study file.

    Args:
        values: short name of a varied key → its values, in the order of the file.
        found: point, as its values → optimizer → seed → study.
        training: point → seconds of training up to its last checkpoint, if known.
    """

    def __init__(
        self,
        values: Mapping[str, Sequence[str]],
        found: Mapping[tuple[str, ...], Mapping[str, Found]],
        training: Mapping[tuple[str, ...], float] | None = None,
    ) -> None:
        self._values, self._found, self._training = values, found, training or {}

    def places(self, key: str) -> range:
        """The positions of the values of a varied key."""
        return range(len(self._values.get(key, ())))

    def value(self, where: Where, key: str) -> str:
        """The value of a varied key at a point."""
        return self._values[key][where[key]]

    def _point(self, where: Where) -> tuple[str, ...]:
        return tuple(
            values[where.get(key, 0)] for key, values in self._values.items() if where.get(key, 0) < len(values)
        )

    def at(self, where: Where, optimizer: str) -> Found:
        """The studies of an optimizer at a point; empty if there are none yet."""
        return self._found.get(self._point(where), {}).get(optimizer, {})

    def training(self, where: Where) -> float | None:
        """Seconds of the training that a point begins from."""
        return self._training.get(self._point(where))

    def speed_up(self, where: Where, standard: Where, optimizer: str) -> float | None:
        """The standard training's seconds ÷ those of a point's training and search, the median over seeds."""
        whole, own = self.training(standard), self.training(where)
        seconds = [study.seconds for study in self.at(where, optimizer).values()]
        return None if whole is None or own is None or not seconds else whole / (own + statistics.median(seconds))

    def over_ema(self, where: Where, worse: Where, optimizer: str) -> Ratio | None:
        """The loss of an optimizer at one point over that of EMA* at another one."""
        ema = ema_grid(list(self.at(worse, EMA_GRID).values()))
        searches = self.at(where, optimizer)
        return None if ema is None else between(searches, dict.fromkeys(searches, ema))

    def ratio(self, claim: Claim, optimizer: str) -> Ratio | None:
        """The measured ratio of a claim."""
        better = self.at(claim.better, optimizer)
        if claim.judge is not None:
            return inverse(judged(better, claim.judge))
        if claim.worse is not None and claim.of_ema:
            return self.over_ema(claim.better, claim.worse, optimizer)
        if claim.worse is None:
            return against_ema(better, cross_check=claim.cross_check)
        return between(better, self.at(claim.worse, optimizer))
