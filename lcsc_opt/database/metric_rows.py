"""One model against another on the same noise: a row for each metric, with the gain and its interval."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np

from lcsc_opt.base.jackknife import GROUPS, error_of_mean, half_width
from lcsc_opt.base.records import STANDARD_ERROR, ReportedMetrics
from lcsc_opt.database.measurement import UNSEEN, Measurement

FEWEST_HELD_OUT = 50  # real images; a distance to fewer prefers samples that vary less
_TOLERATED = {"outside": 1.0}  # metric → by how much it may get worse: nobody sees one grey level of 255

Interval = tuple[float, float]
"""Its lower and its upper end."""


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """One metric of a model on held-out noise, compared with a baseline's on the same noise.

    Attributes:
        metric: its name; ``loss`` is the loss.
        sign: 1 if lower is better, -1 if higher is; ``None`` if the objective does not say.
        value: mean over the groups of noise.
        against: the name of the baseline; ``None`` if it was not measured.
        baseline: the baseline's value.
        gain: how much better the model is than the baseline, in the metric's unit; negative if it is worse.
        lost: whether the model is worse by more than the error: ``gain_interval`` is below zero; if that is not known,
            whether it is worse. Never of what does not tell.
        real_halves: the value of held-out real images; ``None`` if none are held out.
        cross_check: whether it is the distance in features that the search did not see.
        interval: the 95 % interval of the value, for the noise of sampling so many images; ``None`` if it is not known.
        baseline_interval: the same of the baseline's.
        gain_interval: the same of the gain, on the same noise.
        tells: whether it says which model is better: not the distance to too few held-out images.
    """

    metric: str
    sign: int | None
    value: float
    against: str | None = None
    baseline: float | None = None
    gain: float | None = None
    lost: bool = False
    real_halves: float | None = None
    cross_check: bool = False
    interval: Interval | None = None
    baseline_interval: Interval | None = None
    gain_interval: Interval | None = None
    tells: bool = True

    @property
    def is_judge(self) -> bool:
        """Whether a gain of the loss has to show in it: FID in features, or to real images, that no search saw."""
        return self.cross_check or (self.tells and _is_to_held_out(self.metric))

    @property
    def gain_may_be_chance(self) -> bool:
        """Whether zero lies in the interval of the gain; ``False`` where that is not known."""
        return self.gain_interval is not None and self.gain_interval[0] <= 0 <= self.gain_interval[1]

    def misses(self, bound: float) -> bool:
        """Whether the whole interval is worse than ``bound``; if that is not known, the value.

        ``False`` without a sign: then nobody knows what is worse.
        """
        tolerance = 0.0
        if self.interval is not None:
            tolerance = (self.interval[1] - self.interval[0]) / 2
        return (self.sign or 0) * (self.value - bound) > tolerance


def metric_rows(
    model: Measurement, baseline: Measurement | None = None, *, reported: ReportedMetrics, sign: int = 1
) -> tuple[MetricRow, ...]:
    """A row for the loss or the score, for the metrics of ``reported.signs``, then for all others.

    Nobody knows whether the others are better lower or higher, so they have no gains.

    Args:
        model: what is compared.
        baseline: what it is compared with, on the same noise; ``None`` gives rows without a baseline and a gain.
        reported: the metrics of reports.
        sign: −1 where the loss is a score times −1; then the first row is the score's, under its own name.
    """
    rows = [
        MetricRow(
            metric=metric,
            sign=direction,
            value=_mean(model, metric),
            real_halves=reported.real_halves.get(metric),
            cross_check=metric == reported.cross_check,
            interval=_interval(model, metric, is_of_same_data=_is_of_same_data(model, metric)),
            tells=not (_is_to_held_out(metric) and 0 < reported.real_count < FEWEST_HELD_OUT),
        )
        for metric, direction in directions(model, reported, sign).items()
    ]
    if baseline is not None:
        difference = _difference(baseline, model)
        rows = [_against(row, baseline, difference) for row in rows]
    return tuple(rows)


def directions(model: Measurement, reported: ReportedMetrics, sign: int) -> dict[str, int | None]:
    """Metric → 1 if lower is better, −1 if higher is, ``None`` if that is not known; the loss or the score first.

    Standard errors are left out, and so is the metric that is the loss, unless reports give it a sign.

    Args:
        model: what was measured.
        reported: the metrics of reports.
        sign: −1 where the loss is a maximized score times −1: then the score, if it was measured, stands for the loss.
    """
    of_loss = model.metric_of_loss
    direction_of: dict[str, int | None] = {"loss": 1}
    if sign < 0 and of_loss is not None:
        direction_of = {of_loss: -1}
    for metric in (*reported.signs, *model.values):
        is_error = metric.endswith(STANDARD_ERROR) and metric.removesuffix(STANDARD_ERROR) in model.values
        if metric in ("loss", UNSEEN, *direction_of) or metric not in model.values or is_error:
            continue
        if metric in reported.signs:
            direction_of[metric] = reported.signs[metric]
        elif metric != of_loss:
            direction_of[metric] = None
        elif model.values[metric] != model.values["loss"]:  # it is the loss times −1
            direction_of[metric] = -1
    return direction_of


def _difference(baseline: Measurement, model: Measurement) -> Measurement:
    """How much lower each metric is than the baseline's.

    Both have the same noise, which cancels where values without groups of images are known. Standard errors do not tell
    how much of it does, so they are added as those of independent samples.
    """
    values = {}
    for metric in model.values:
        if metric in baseline.values:
            of_both = list(zip(baseline.values[metric], model.values[metric], strict=True))
            if metric.endswith(STANDARD_ERROR):
                values[metric] = tuple(math.hypot(*errors) for errors in of_both)
            else:
                values[metric] = tuple(of_baseline - of_model for of_baseline, of_model in of_both)
    without_groups = {}
    for metric in model.without_groups:
        if metric in baseline.without_groups:
            difference = np.subtract(baseline.without_groups[metric], model.without_groups[metric])
            without_groups[metric] = tuple(map(tuple, difference.tolist()))
    return Measurement(model.model, model.images, model.seeds, values, without_groups)


def _against(row: MetricRow, baseline: Measurement, difference: Measurement) -> MetricRow:
    """The row with the baseline and the gain, if the baseline has the metric.

    The interval of the gain is that of ``difference``, which :func:`_difference` computes.
    """
    metric = row.metric
    if metric not in baseline.values:
        return row
    value = _mean(baseline, metric)
    is_of_same_data = _is_of_same_data(baseline, metric)
    row = dataclasses.replace(
        row,
        against=baseline.model.name,
        baseline=value,
        baseline_interval=_interval(baseline, metric, is_of_same_data=is_of_same_data),
    )
    if row.sign is None:
        return row
    gain = row.sign * (value - row.value)
    # of a model whose groups differ, the difference is of as many
    is_of_same_data = is_of_same_data and _is_of_same_data(difference, metric)
    interval = _interval(difference, metric, is_of_same_data=is_of_same_data)
    if interval is None:
        is_worse = gain < 0
    else:
        low, high = sorted(row.sign * end for end in interval)  # of the gain
        interval = (low, high)
        is_worse = high < 0
    is_tolerated = -gain < _TOLERATED.get(metric, 0.0)
    return dataclasses.replace(row, gain=gain, gain_interval=interval, lost=is_worse and row.tells and not is_tolerated)


def _is_to_held_out(metric: str) -> bool:
    return metric.partition("@")[0] == "fid_held_out"


def _mean(measured: Measurement, metric: str) -> float:
    return statistics.fmean(measured.values[metric])


def _is_of_same_data(measured: Measurement, metric: str) -> bool:
    """Whether all groups of noise have given the same: a score without a draw measures on the same data each time."""
    return len(set(measured.values[metric])) == 1 and len(set(measured.without_groups.get(metric, ()))) <= 1


def _interval(measured: Measurement, metric: str, *, is_of_same_data: bool) -> Interval | None:
    """The 95 % interval of the mean; ``None`` for one group of noise of which nothing else is known.

    Groups of noise count as one where they are of the same data. The interval is that of the jackknife, else of the
    standard error that was measured, else of the spread over groups of noise.
    """
    values = measured.values[metric]
    columns = measured.without_groups.get(metric, ())
    groups = 1 if is_of_same_data else len(measured.seeds)
    error_of_one = measured.value(metric + STANDARD_ERROR)
    if columns:
        width = half_width(error_of_mean(columns[:groups]), groups * (GROUPS - 1))
    elif error_of_one is not None:  # a normal interval: of how many samples it is, is not known
        width = half_width(error_of_one / math.sqrt(groups), math.inf)
    elif groups > 1:
        width = half_width(statistics.stdev(values) / math.sqrt(groups), groups - 1)
    else:
        return None
    mean = statistics.fmean(values)
    return mean - width, mean + width
