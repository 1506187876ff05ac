"""The report of a study's answer on held-out noise: a row for each metric, the loss first; plain data.

A loss can fall while single images get worse. So the rows after the loss are other metrics. One of them is the
cross-check: a distance in features that the search did not see.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lcsc_opt.base.records import STANDARD_ERROR
from lcsc_opt.database.names import EMA

_OF_SINGLE_IMAGES = ("precision", "near", "hinge")  # the metrics that keep: precision guards
_SINGLE_GROUP_NOISE = 0.02  # of the baseline's value; with one group, which has no spread, a smaller change is noise
_Values = Mapping[int, float]
"""Seed of a group of noise → value."""


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """One metric of a study's answer on held-out noise, compared with the baseline's on the same noise.

    Attributes:
        metric: its name; ``loss`` is the loss.
        sign: 1 if lower is better, -1 if higher is; ``None`` if the objective does not say.
        value: mean over the groups of noise.
        spread: the sample standard deviation over the groups; for one group, or where all have the same value, the
            standard error that was measured with it, or ``None``.
        against: the name of the baseline; ``None`` if it was not measured.
        baseline: the baseline's value.
        baseline_spread: the same of the baseline's.
        gain: how much better the answer is than the baseline, in the metric's unit; negative if it is worse.
        gain_spread: the sample standard deviation of the gain over the groups of noise; for one group, or where it is
            the same in all, the root of both squared standard errors, or ``None``.
        lost: whether the answer is worse by more than ``gain_spread``; with one group, by more than 2 % of the
            baseline's value, and precision by more than its standard error. Never if it is as good as real images.
        real_halves: the value of held-out real images; ``None`` if none are held out.
        cross_check: whether it is the distance in features that the search did not see.
    """

    metric: str
    sign: int | None
    value: float
    spread: float | None = None
    against: str | None = None
    baseline: float | None = None
    baseline_spread: float | None = None
    gain: float | None = None
    gain_spread: float | None = None
    lost: bool = False
    real_halves: float | None = None
    cross_check: bool = False

    @property
    def is_certain(self) -> bool:
        """Whether it gained, and by more than the gain's spread if that is known."""
        return self.gain is not None and self.gain > (self.gain_spread or 0.0)

    def misses(self, bound: float) -> bool:
        """Whether the value is worse than ``bound`` by more than its spread, or by 2 % if that is not known."""
        return (self.sign or 0) * (self.value - bound) > (self.spread or _SINGLE_GROUP_NOISE * bound)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A study's answer on noise that the search never saw.

    Attributes:
        trial: the number of the chosen trial.
        loss: mean over the groups of noise.
        images: images of each group, or ``None`` if that is not stored.
        seeds: the seeds of the groups of noise.
        rows: the loss, and all metrics that are not the loss itself.
        metrics: everything that was measured of the answer, each the mean over the groups of noise.
        warning: one line if the loss is below its baseline, but other metrics did not follow.
    """

    trial: int | None
    loss: float | None
    images: int | None = None
    seeds: tuple[int, ...] = (0,)
    rows: tuple[MetricRow, ...] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    warning: str | None = None

    @classmethod
    def parse(cls, stored: Any) -> HeldOut | None:
        """The study attribute ``held_out``; ``None`` before there is one."""
        if not isinstance(stored, Mapping):
            return None
        return cls(
            trial=stored.get("trial"),
            loss=stored.get("loss"),
            images=stored.get("images"),
            seeds=tuple(int(group["seed"]) for group in stored.get("groups") or ()) or (0,),
            rows=tuple(MetricRow(**row) for row in stored.get("rows") or ()),
            metrics=stored.get("metrics") or {},
            warning=stored.get("warning"),
        )

    @property
    def sample(self) -> tuple[int | None, tuple[int, ...]]:
        """Images and groups of noise: losses compare only where these are the same, since FID depends on both."""
        return self.images, self.seeds

    @property
    def doubted(self) -> tuple[str, ...]:
        """The metrics that did not improve with the loss."""
        return tuple(row.metric for row in _doubted(self.rows))

    def ema(self, grid: HeldOut | None) -> float | None:
        """EMA*'s loss on this noise; ``None`` if it was not measured there.

        Args:
            grid: the report of the EMA grid, which may have fewer images.
        """
        if self.rows and self.rows[0].against == EMA:
            return self.rows[0].baseline
        return grid.loss if grid is not None and grid.sample == self.sample else None


def report_rows(
    report: Mapping[str, Any],
    signs: Mapping[str, int],
    against: str | None = None,
    real_halves: Mapping[str, float] | None = None,
    cross_check: str | None = None,
) -> tuple[MetricRow, ...]:
    """The rows of a held-out report: the loss, the evaluation metrics, then what else was measured.

    Standard errors have no rows. A metric that is the loss times −1 is better where it is higher.

    Args:
        report: with ``groups`` (each with its ``seed``, ``loss`` and ``metrics``), and ``baselines`` of the same form.
        signs: evaluation metric → 1, or -1 if higher is better.
        against: the baseline's name.
        real_halves: metric → value of held-out real images.
        cross_check: the metric in features that the search did not see.
    """
    groups, baseline = report["groups"], (report.get("baselines") or {}).get(against, {}).get("groups", ())
    losses, names = _by_seed(groups, "loss"), list(groups[0]["metrics"])
    negative = {seed: -loss for seed, loss in losses.items()}
    score = next((name for name in names if _by_seed(groups, name) in (losses, negative)), "loss")
    rows = []
    for metric in dict.fromkeys(("loss", *signs, *names)):
        values, before = _by_seed(groups, metric), _by_seed(baseline, metric)
        is_error = metric.endswith(STANDARD_ERROR) and metric.removesuffix(STANDARD_ERROR) in names
        if not values or is_error or (metric not in ("loss", *signs) and values == losses):
            continue
        sign = 1 if metric == "loss" else signs.get(metric, -1 if values == negative else None)
        named = score if metric == "loss" else metric
        errors = [_error(part, named, report.get("images")) for part in (groups, baseline)]
        value, spread = statistics.fmean(values.values()), _spread(values.values()) or errors[0]
        row = MetricRow(metric, sign, value, spread, real_halves=(real_halves or {}).get(metric))
        row = dataclasses.replace(row, cross_check=metric == cross_check)
        rows.append(_compared(row, values, before, errors, against) if before else row)
    return tuple(rows)


def _compared(
    row: MetricRow,
    values: _Values,
    before: _Values,
    errors: Sequence[float | None],
    against: str | None,
) -> MetricRow:
    """The row with the baseline and the gain, whose spread is that of differences on the same noise."""
    baseline, sign, real = statistics.fmean(before.values()), row.sign, row.real_halves
    row = dataclasses.replace(
        row, against=against, baseline=baseline, baseline_spread=_spread(before.values()) or errors[1]
    )
    if sign is None:
        return row
    gain = sign * (baseline - row.value)
    spread = _spread(sign * (before[seed] - values[seed]) for seed in values if seed in before)
    if not spread and None not in errors:
        spread = math.hypot(*filter(None, errors))
    noise = _SINGLE_GROUP_NOISE * abs(baseline) if spread is None else spread
    as_good_as_real = real is not None and sign * row.value <= sign * real
    return dataclasses.replace(row, gain=gain, gain_spread=spread, lost=gain < -noise and not as_good_as_real)


def _error(groups: Sequence[Mapping[str, Any]], metric: str, images: int | None) -> float | None:
    """The mean of a metric's standard errors over the groups; of precision, a share, that of one group is binomial."""
    known = list(_by_seed(groups, f"{metric}{STANDARD_ERROR}").values())
    shares = _by_seed(groups, metric).values() if metric.partition("@")[0] == "precision" else ()
    if not known and images and len(groups) == 1 and all(0 <= share <= 1 for share in shares):
        known = [math.sqrt(share * (1 - share) / images) for share in shares]
    return statistics.fmean(known) if known else None


def _by_seed(groups: Sequence[Mapping[str, Any]], metric: str) -> _Values:
    """Seed of the group of noise → value; empty if a group does not have the metric."""
    found = {group["seed"]: group["loss"] if metric == "loss" else group["metrics"].get(metric) for group in groups}
    known = {seed: float(value) for seed, value in found.items() if value is not None}
    return known if len(known) == len(found) else {}


def _spread(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.stdev(known) if len(known) > 1 else None


def _doubted(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The rows that did not improve with the loss, the cross-check first; none if the loss is not below the baseline's.

    With several groups of noise, a gain of the cross-check within its spread does not count.
    """
    if not rows or rows[0].gain is None or rows[0].gain <= 0:
        return []
    cheated = [row for row in rows if row.cross_check and row.gain is not None and not row.is_certain]
    return [*cheated, *(row for row in rows[1:] if row.lost and not row.cross_check)]


def warning_of(rows: Sequence[MetricRow], *, kept: Mapping[str, float | None] | None = None) -> str | None:
    """One line if a metric of ``kept`` is beyond its bound; or if the loss gained, and other metrics did not."""
    for row in rows:
        bound = (kept or {}).get(row.metric)
        if row.metric in (kept or {}) and (row.lost if bound is None else row.misses(bound)):
            asked = f"against {row.baseline:.4g}" if bound is None else f"the bound is {bound:.4g}"
            what = f"{row.metric} {row.value:.4g}, {asked}, beyond its error"
            return f"keep: {row.metric} did not hold: {what}; search on, or with more images in an evaluation"
    if not (doubts := _doubted(rows)):
        return None
    doubt = "what it gained there it lost here; compare the images of both before you use it"
    if not rows[0].is_certain:
        doubt = "neither is a certain gain; measure with more --groups, or search on"
    elif doubts[0].cross_check:
        doubt = "this may please the loss's own features and no eye; compare the images of both before you use it"
    elif not kept and any(row.metric.partition("@")[0] in _OF_SINGLE_IMAGES for row in doubts):
        doubt += ", or search with keep: precision"
    loss, *others = (f"{row.metric} {row.baseline:.4g} → {row.value:.4g}" for row in (rows[0], *doubts))
    return f"against {rows[0].against} the {loss}, but {' and '.join(others)}: {doubt}"
