"""The rows of a held-out report: each metric of the answer against the baseline's, and the warning about them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from lcsc_opt.base.jackknife import GROUPS, half_width, standard_error
from lcsc_opt.base.records import STANDARD_ERROR, SamplerTitle, Yardstick
from lcsc_opt.database.report import (
    SINGLE_GROUP_NOISE,
    Baseline,
    Interval,
    MeasuredModel,
    MetricRow,
    doubted_rows,
    score_row,
)
from lcsc_opt.objective.contract import ReportedMetrics

_TOLERATED = {"outside": 0.05}  # metric → by how much it may get worse; a few more clipped values change no image
_SEARCH_AGAIN = {  # whether the search's own loss fell below EMA*'s → what may help
    True: ", or search with more data or fewer evaluations, since the loss that was searched is below EMA*'s",
    False: ", or search with more evaluations, since the loss that was searched is not below EMA*'s",
    None: "",
}
_SINGLE_IMAGE_METRICS = ("precision", "near", "hinge")  # the metrics that keep: precision guards


@dataclasses.dataclass(frozen=True)
class _Column:
    """One metric of one model.

    Attributes:
        values: seed of a group of noise → value.
        error: the standard error measured with it, the mean over groups of noise.
        without_groups: seed → the values without one of ten groups of images each; empty if they are not known.
    """

    values: Mapping[int, float]
    error: float | None
    without_groups: Mapping[int, Sequence[float]]

    @classmethod
    def of(cls, model: MeasuredModel, metric: str, *, error_of: str) -> _Column:
        """The metric of this model; its standard error is that of the metric ``error_of``."""
        without_groups = {}
        for measurement in model.groups:
            if metric in measurement.without_groups:
                without_groups[measurement.seed] = measurement.without_groups[metric]
        values = model.values(metric)
        if len(without_groups) < len(values):
            without_groups = {}
        return cls(values, _standard_error(model, error_of), without_groups)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float | None:
        """The deviation over the groups; the standard error where there is one group, or all are alike."""
        deviation = _deviation(self.values.values())
        if deviation:
            return deviation
        if self.error is not None:
            return self.error
        return deviation if self.jackknife_error is None else self.jackknife_error

    @property
    def jackknife_error(self) -> float | None:
        """The standard error of the mean over groups of noise, from the images in them."""
        return _mean_error([standard_error(column) for column in self.without_groups.values()])

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the mean."""
        error = self.jackknife_error
        if error is not None:
            return _around(self.mean, error, degrees=len(self.values) * (GROUPS - 1))
        if self.error is not None:
            return _around(self.mean, self.error / math.sqrt(len(self.values)))
        return _interval_over_groups(list(self.values.values()))


def _mean_error(errors: Sequence[float]) -> float | None:
    """The standard error of a mean over groups of noise, from that of each; ``None`` if there are none."""
    if not errors:
        return None
    return math.hypot(*errors) / len(errors)


def _around(value: float, error: float, degrees: float = math.inf) -> Interval:
    width = half_width(error, degrees)
    return value - width, value + width


def _interval_over_groups(values: Sequence[float]) -> Interval | None:
    """That of the mean over groups of noise; ``None`` for one group."""
    deviation = _deviation(values)
    if deviation is None:
        return None
    return _around(statistics.fmean(values), deviation / math.sqrt(len(values)), degrees=len(values) - 1)


def metric_rows(
    answer: MeasuredModel, baseline: Baseline | None = None, *, reported: ReportedMetrics
) -> tuple[MetricRow, ...]:
    """The rows of a held-out report: the loss, the evaluation metrics, then what else was measured.

    Standard errors have no rows. A metric that is the loss times −1 is better where it is higher.

    Args:
        answer: measured on at least one group of noise.
        baseline: measured on the same noise.
        reported: the objective's metrics of reports.
    """
    losses = answer.values("loss")
    negative_losses = {seed: -loss for seed, loss in losses.items()}
    measured = list(answer.groups[0].metrics)
    # the standard error of the loss is that of the metric which it equals, up to the sign
    equal_to_loss = next((name for name in measured if answer.values(name) in (losses, negative_losses)), "loss")
    signs = reported.signs
    rows = []
    for metric in dict.fromkeys(("loss", *signs, *measured)):
        values = answer.values(metric)
        is_loss_again = metric not in ("loss", *signs) and values == losses
        if not values or is_loss_again or _is_standard_error(metric, measured):
            continue
        sign = signs.get(metric)
        error_of = metric
        if metric == "loss":
            sign = 1
            error_of = equal_to_loss
        elif sign is None and values == negative_losses:
            sign = -1
        column = _Column.of(answer, metric, error_of=error_of)
        row = MetricRow(
            metric=metric,
            sign=sign,
            value=column.mean,
            spread=column.spread,
            real_halves=reported.real_halves.get(metric),
            cross_check=metric == reported.cross_check,
            interval=column.interval,
        )
        if baseline is not None:
            baseline_column = _Column.of(baseline.measured, metric, error_of=error_of)
            if baseline_column.values:
                row = _compared(row, column, baseline_column, against=baseline.name)
        rows.append(row)
    return tuple(rows)


def _is_standard_error(metric: str, measured: Sequence[str]) -> bool:
    return metric.endswith(STANDARD_ERROR) and metric.removesuffix(STANDARD_ERROR) in measured


def _compared(row: MetricRow, answer: _Column, baseline: _Column, *, against: str) -> MetricRow:
    """The row with the baseline and the gain, whose spread and interval are those of differences on the same noise."""
    row = dataclasses.replace(
        row,
        against=against,
        baseline=baseline.mean,
        baseline_spread=baseline.spread,
        baseline_interval=baseline.interval,
    )
    sign = row.sign
    if sign is None:
        return row
    gain = _gain(answer, baseline, sign)
    mean_gain = sign * (baseline.mean - row.value)
    if gain.interval is not None:
        is_worse = gain.interval[1] < 0
    else:
        is_worse = mean_gain < -SINGLE_GROUP_NOISE * abs(baseline.mean)
    is_tolerated = -mean_gain < _TOLERATED.get(row.metric, 0.0)
    real = row.real_halves
    is_as_good_as_real = real is not None and sign * row.value <= sign * real
    return dataclasses.replace(
        row,
        gain=mean_gain,
        gain_spread=gain.spread,
        gain_interval=gain.interval,
        lost=is_worse and not (is_as_good_as_real or is_tolerated),
    )


def _gain(answer: _Column, baseline: _Column, sign: int) -> _Column:
    """How much better the answer is, on the groups of noise that both have.

    Where values without groups of images are known, the same images' noise is in both, and cancels in the differences.
    """
    seeds = [seed for seed in answer.values if seed in baseline.values]
    values = {seed: sign * (baseline.values[seed] - answer.values[seed]) for seed in seeds}
    error = None
    if answer.error is not None and baseline.error is not None:
        error = math.hypot(answer.error, baseline.error)
    without_groups = {}
    for seed in seeds:
        if seed in answer.without_groups and seed in baseline.without_groups:
            pairs = zip(answer.without_groups[seed], baseline.without_groups[seed], strict=True)
            without_groups[seed] = [sign * (baseline_value - value) for value, baseline_value in pairs]
    return _Column(values, error, without_groups)


def _standard_error(model: MeasuredModel, metric: str) -> float | None:
    """The mean of a metric's standard errors over the groups; of precision, a share, that of one group is binomial."""
    errors = list(model.values(f"{metric}{STANDARD_ERROR}").values())
    if errors:
        return statistics.fmean(errors)
    if metric.partition("@")[0] != "precision" or not model.images or len(model.groups) != 1:
        return None
    share = model.groups[0].value(metric)
    if share is None or not 0 <= share <= 1:
        return None
    return math.sqrt(share * (1 - share) / model.images)


def _deviation(values: Iterable[float]) -> float | None:
    """The sample standard deviation; ``None`` for fewer than two values."""
    sample = list(values)
    if len(sample) < 2:
        return None
    return statistics.stdev(sample)


def warning_of(
    rows: Sequence[MetricRow],
    against_trained: Sequence[Sequence[MetricRow]] = (),
    *,
    yardstick: Yardstick | None = None,
    searched_below_ema: bool | None = None,
) -> str | None:
    """One line: the first of these that holds.

    1. The metric that is kept is beyond its bound.
    2. The loss is worse than that of a model of the trainer's.
    3. The loss gained against the baseline, and other metrics did not.
    4. A judge of the loss is worse than at a model of the trainer's.

    Args:
        rows: the rows of a report, the loss first.
        against_trained: the same against each model of the trainer's: the last checkpoint, and its EMA.
        yardstick: what the losses are relative to, on the noise of the report.
        searched_below_ema: whether the search's own loss fell below EMA*'s; ``None`` if EMA* was not searched.
    """
    kept = None if yardstick is None else yardstick.kept
    for row in rows:
        if yardstick is not None and row.metric == kept and row.misses(yardstick.bound):
            return _broken_bound(row, yardstick.bound)
    lost = [trained for trained in against_trained if trained[0].lost]
    if lost:
        return _worse_than(rows, lost[0], searched_below_ema)
    warnings = (_worse_than(rows, trained, searched_below_ema) for trained in against_trained)
    doubt = _doubt(rows, is_kept=kept is not None)
    return doubt or next((warning for warning in warnings if warning is not None), None)


def _worse_than(rows: Sequence[MetricRow], trained: Sequence[MetricRow], searched_below_ema: bool | None) -> str | None:
    """The warning that the search lost to a model of the trainer's, whatever it gained against the baseline.

    Below EMA* in its own loss and worse held out, it has overfitted its data; else it was too short.
    """
    score = score_row(trained)
    judges = [row for row in trained if row.is_judge]
    worse = [row for row in (score, *judges) if row.lost]
    chance = ""
    if not worse:
        if score.gain is None or score.gain >= -SINGLE_GROUP_NOISE * abs(score.baseline or 0.0):
            return None
        worse = [score]
        chance = ", which may be chance"
    loss = rows[0]
    gained = f"better than {loss.against}, but " if loss.gain is not None and loss.gain > 0 else ""
    moved = " and ".join(row.change for row in worse)
    advice = _SEARCH_AGAIN[searched_below_ema]
    return f"{gained}worse than the {score.against}: {moved}{chance}; use the {score.against}{advice}"


def _doubt(rows: Sequence[MetricRow], *, is_kept: bool) -> str | None:
    """The warning that the loss gained alone."""
    doubted = doubted_rows(rows)
    if not doubted:
        return None
    loss = rows[0]
    moved = " and ".join(row.change for row in doubted)
    return f"against {loss.against} the {loss.change}, but {moved}: {_advice(loss, doubted, is_kept=is_kept)}"


def turned(rows: Sequence[MetricRow], elsewhere: Sequence[MetricRow], samplers: Sequence[SamplerTitle]) -> str | None:
    """The warning that the loss or a judge of it gained, and is worse in another sampler; ``None`` if none is.

    Args:
        rows: the rows of a report, the loss first.
        elsewhere: those of the other sampler.
        samplers: that of the rows, and the other.
    """
    gained = {}
    for row in rows:
        if (row.metric == "loss" or row.is_judge) and row.gain is not None and row.gain > 0:
            gained[row.metric] = row
    lost = [row for row in elsewhere if row.lost and row.metric in gained]
    if not lost:
        return None
    here = " and ".join(gained[row.metric].change for row in lost)
    there = " and ".join(row.change for row in lost)
    return (
        f"against {rows[0].against} the gain turns in another sampler: {here} with {samplers[0].text}, but {there} "
        f"with {samplers[1].text}; use the answer only with the sampler that it was searched with"
    )


def _broken_bound(row: MetricRow, bound: float) -> str:
    """The warning that ``keep`` did not hold a metric at its bound."""
    return (
        f"keep: {row.metric} did not hold: {row.value:.4g}, the bound is {bound:.4g}, beyond its error; continue the "
        "search, or search with more images in an evaluation"
    )


def _advice(loss: MetricRow, doubted: Sequence[MetricRow], *, is_kept: bool) -> str:
    """What the gain may be, and what to do before the answer is used."""
    if not loss.is_certain:
        return "neither gain is certain; measure with more --groups, or continue the search"
    worse = [row for row in doubted if row.gain is not None and row.gain <= 0]
    if not worse:
        return "measure both with more --groups, and compare their images before you use it"
    if worse[0].cross_check:
        return "the gain may exist only in the loss's own features; compare the images of both before you use it"
    advice = "the loss gained at the cost of other metrics; compare the images of both before you use it"
    could_be_kept = any(row.metric.partition("@")[0] in _SINGLE_IMAGE_METRICS for row in worse)
    if could_be_kept and not is_kept:
        advice += ", or search with keep: precision"
    return advice
