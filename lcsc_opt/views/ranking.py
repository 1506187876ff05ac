"""Which optimizer is ahead, by more than chance or not."""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lcsc_opt.base.jackknife import half_width
from lcsc_opt.base.study_spec import GRIDS
from lcsc_opt.database.history import Floats, Standing, as_known
from lcsc_opt.database.measurement import Measurement, Model
from lcsc_opt.database.metric_rows import MetricRow
from lcsc_opt.database.names import label
from lcsc_opt.database.report import Report
from lcsc_opt.views import UNKNOWN, loss_title, number, signed

ANSWER = "answer"  # its row in tables


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; the deviation is ``None`` for a single seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of the values that are known; ``None`` if there are none."""
        sample = [value for value in values if value is not None]
        if not sample:
            return None
        deviation = None
        if len(sample) > 1:
            deviation = statistics.stdev(sample)
        return cls(statistics.fmean(sample), deviation)


def spread_text(spread: Spread | None) -> str:
    """A mean with its standard deviation, for people."""
    if spread is None:
        return UNKNOWN
    return number(spread.mean, spread.deviation)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Held-out loss minus that of the best optimizer, with its 95 % interval.

    Attributes:
        mean: of the seeds.
        low: the lower end of the interval: over seeds, if there are several; else over images, for the one model of
            each; ``None`` if that is not known.
        high: its upper end.
        seeds: how many seeds the interval is over; 1 is one over images.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    seeds: int = 1

    @classmethod
    def of(cls, losses: Mapping[int, float], best: Mapping[int, float]) -> Difference:
        """How much higher these held-out losses, seed → loss, are than those of the best optimizer.

        If both have the same seeds, they are compared seed by seed. Then effects that two searches share, such as
        their noise, cancel.
        """
        mean = statistics.fmean(losses.values()) - statistics.fmean(best.values())
        if min(len(losses), len(best)) < 2:
            return cls(mean)
        if losses.keys() == best.keys():
            samples = [np.array([losses[seed] - best[seed] for seed in sorted(losses)])]
        else:
            samples = [np.array(list(losses.values())), -np.array(list(best.values()))]
        low, high = _mean_interval(samples)
        return cls(mean, low, high, min(len(losses), len(best)))

    @classmethod
    def of_models(cls, row: MetricRow) -> Difference | None:
        """Of two models on the same images, by the gain of one over the other; ``None`` if its error is not known."""
        if row.gain is None or row.gain_interval is None:
            return None
        low, high = row.gain_interval
        return cls(-row.gain, -high, -low)

    def shown(self, sign: int) -> Difference:
        """The difference between maximized scores where ``sign`` is −1, else itself; low and high change places."""
        if sign > 0:
            return self
        low = as_known(self.high, sign)
        high = as_known(self.low, sign)
        return Difference(-self.mean, low, high, self.seeds)

    @property
    def verdict(self) -> str:
        """The difference in words."""
        if self.low is None or self.high is None:
            return "one seed: no interval"
        verdict = "not distinguishable"
        if self.low > 0:
            verdict = "worse"
        elif self.high < 0:
            verdict = "better"
        return verdict if self.seeds > 1 else f"{verdict}, one seed"

    @property
    def text(self) -> str:
        """The difference with its interval."""
        mean, *ends = [signed(value, "+.3g") for value in (self.mean, self.low, self.high) if value is not None]
        if ends:
            return f"{mean} [{', '.join(ends)}]"
        return mean


def _mean_interval(samples: Sequence[Floats]) -> tuple[float, float]:
    """Welch's (1947) interval for the sum of the means of independent samples; Student's for a single one."""
    variances = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    variance = float(variances.sum())
    mean = float(sum(sample.mean() for sample in samples))
    if not variance > 0:  # the degrees of freedom would be 0 / 0
        return mean, mean
    freedom = variance**2 / sum(v**2 / (len(sample) - 1) for v, sample in zip(variances, samples, strict=True))
    width = half_width(math.sqrt(variance), freedom)
    return mean - width, mean + width


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of every table of an experiment: an optimizer over its seeds; the answer; or a model that the user had.

    The spreads are of losses as the user knows them: of a maximized score, higher ones are better.

    Attributes:
        optimizer: its name; of a model that no search made, the model's.
        label: what it is, in tables.
        verdict: how it compares with the best optimizer, in words.
        studies: of each seed; none of a model that no search made.
        models: the best of each seed on held-out noise, of the seeds that the report has.
        report: of the experiment; ``None`` before there is one.
        difference: from the best optimizer; ``None`` for the best one, and without held-out losses.
        has_penalty: whether EMA*'s loss has one, since a kept metric is beyond its bound there.
    """

    optimizer: str
    label: str
    verdict: str
    studies: Sequence[Standing] = ()
    models: Sequence[Measurement] = ()
    report: Report | None = None
    difference: Difference | None = None
    has_penalty: bool = False

    @property
    def seeds(self) -> int:
        """How many studies it has."""
        return len(self.studies)

    @property
    def unfinished(self) -> int:
        """How many of its studies have not ended."""
        return sum(not study.ended for study in self.studies)

    @property
    def evaluations(self) -> float:
        """The mean over seeds; a model that no search made has cost none."""
        return _mean(study.summary.evaluations for study in self.studies)

    @property
    def images(self) -> float:
        """The mean over seeds."""
        return _mean(study.summary.cost.images for study in self.studies)

    @property
    def seconds(self) -> float:
        """The mean over seeds."""
        return _mean(study.seconds for study in self.studies)

    @property
    def searched(self) -> Spread | None:
        """The loss in the search, of the models of :attr:`held_out`; before there is a report, the best one.

        ``None`` if a search did not measure one of them, as of a mean of iterates.
        """
        shown = [study for study in self.studies if study.found is not None] or self.studies
        losses = [study.searched_of_shown for study in shown]
        return None if None in losses else Spread.of(losses)

    @property
    def held_out(self) -> Spread | None:
        """The loss on held-out noise, of the seeds that have one."""
        if self.report is None:
            return None
        return Spread.of(map(self.report.shown, self.models))

    @property
    def losses(self) -> dict[int, float]:
        """Seed → its loss on held-out noise, lower is better, of the seeds that have one."""
        return {study.seed: study.found.loss for study in self.studies if study.found is not None}

    @property
    def loss(self) -> float:
        """The mean of the models' losses on held-out noise, lower is better; infinite without one."""
        return statistics.fmean(measured.loss for measured in self.models) if self.models else math.inf

    @property
    def held_out_images(self) -> tuple[int, ...]:
        """The numbers of images of the held-out losses, each once."""
        return tuple(sorted({measured.images for measured in self.models if measured.images}))

    @property
    def below_ema(self) -> float | None:
        """The mean held-out loss relative to EMA*'s, minus one: -0.6 is 60 % below it; of maximized scores the same.

        ``None`` if there is no model or no EMA*, or where a share means nothing: of a penalty, of a sum from which a
        reward is subtracted, whose zero says nothing, and if losses of the report lie on both sides of zero.
        """
        if not self.models or self.report is None or self.report.ema is None or self.has_penalty:
            return None
        if any(self.report.direction(term) < 0 for term in self.report.metrics.terms):
            return None
        ema = self.report.ema.loss
        if ema == 0 or any(measured.loss * ema < 0 for measured in self.report.models):
            return None
        return self.report.sign * (self.loss - ema) / abs(ema)

    @property
    def only_model(self) -> Model | None:
        """Its model, if it has one seed; ``None`` of several seeds, which are no single model, and without a report."""
        if len(self.models) == 1 and self.seeds <= 1:
            return self.models[0].model
        return None


def _mean(values: Iterable[float]) -> float:
    """The mean; 0 of no values."""
    known = list(values)
    return statistics.fmean(known) if known else 0.0


def ranking(studies: Sequence[Standing]) -> list[Row]:
    """The answer, then the optimizers of an experiment, the best held-out loss first, then the best searched one.

    What the user had is among them, once there is a report. A model stands once, with all that it is.

    Args:
        studies: the studies of one experiment.
    """
    has_penalty = _ema_has_penalty(studies)
    return [dataclasses.replace(row, has_penalty=has_penalty) for row in _rows(studies)]


def _ema_has_penalty(studies: Sequence[Standing]) -> bool:
    """Whether the kept metric of the report's EMA* is beyond the bound that searches had."""
    report, yardstick = studies[0].report, studies[0].yardstick
    if report is None or report.ema is None or yardstick is None or yardstick.kept is None:
        return False
    value = report.ema.value(yardstick.kept)
    return value is not None and yardstick.excess(value) > 0


def _rows(studies: Sequence[Standing]) -> list[Row]:
    """The rows of :func:`ranking`."""
    groups: dict[str, list[Standing]] = {}
    for study in studies:
        groups.setdefault(study.optimizer, []).append(study)
    rows = sorted(map(_of_optimizer, groups.values()), key=_order)
    best = next((row for row in rows if row.models), None)
    report = studies[0].report
    losses_had = [] if report is None else [one.loss for one in report.models if one.model.name in report.had]
    rows = [_judged(row, best, min(losses_had, default=math.inf)) for row in rows]
    if report is None:
        return rows
    known = {row.only_model.key for row in rows if row.only_model is not None}
    found = {measured.model.name for row in rows for measured in row.models}
    rows = _each_model_once([_named(row, report) for row in rows])
    for measured in report.models:
        name = measured.model.name
        if name in report.had and name not in found and measured.model.key not in known:
            known.add(measured.model.key)
            had = Row(name, _title_in(report, measured.model), "not searched", models=(measured,), report=report)
            rows.insert(bisect.bisect_right(rows, had.loss, key=lambda row: row.loss), had)
    answer = report.of_answer
    title = f"{ANSWER} · {_title_in(report, answer.model)}"
    for row in rows:
        if row.only_model is not None and row.only_model.key == answer.model.key:  # it stands nowhere else
            return [dataclasses.replace(row, label=title, verdict=ANSWER), *(one for one in rows if one is not row)]
    return [Row(ANSWER, title, ANSWER, models=(answer,), report=report), *rows]


def _each_model_once(rows: Iterable[Row]) -> list[Row]:
    """Without the rows of grids whose one model an earlier row has, with all of its names."""
    known: set[str] = set()
    distinct = []
    for row in rows:
        key = None if row.only_model is None else row.only_model.key
        if key is not None and key in known and row.optimizer in GRIDS:
            continue
        if key is not None:
            known.add(key)
        distinct.append(row)
    return distinct


def loss_name(studies: Sequence[Standing]) -> str:
    """What the loss of an experiment is called, as far as one of its searches knows."""
    return loss_title(next((study.metric for study in studies if study.metric != "loss"), "loss"))


def _title_in(report: Report, model: Model) -> str:
    """All that a model of a report is: ``EMA* = last checkpoint``; with one name, also which average it is."""
    names = names_in(report, model)
    return model.title if names == model.name else names


def names_in(report: Report, model: Model) -> str:
    """The names of a model in a report, those of what the user had first."""
    same = [measured.model for measured in report.models if measured.model.key == model.key] or [model]
    return " = ".join(dict.fromkeys(one.name for one in sorted(same, key=lambda one: one.name not in report.had)))


def _named(row: Row, report: Report) -> Row:
    """A row whose one model has further names in the report, with all of them."""
    if row.only_model is None or names_in(report, row.only_model) == row.only_model.name:
        return row
    return dataclasses.replace(row, label=_title_in(report, row.only_model))


def _of_optimizer(group: Sequence[Standing]) -> Row:
    """The studies of one optimizer. Where their labels differ, as in the average that is best, it has its own."""
    labels = {study.label for study in group}
    return Row(
        optimizer=group[0].optimizer,
        label=labels.pop() if len(labels) == 1 else label(group[0].optimizer),
        verdict="no held-out value",
        studies=group,
        models=[study.found for study in group if study.found is not None],
        report=group[0].report,
    )


def _order(row: Row) -> tuple[float, float]:
    """A key that sorts by the mean held-out loss, then by the searched one; unknown losses come last."""
    searched = Spread.of(study.summary.loss for study in row.studies)
    return row.loss, math.inf if searched is None else searched.mean


def _judged(row: Row, best: Row | None, lowest_had: float) -> Row:
    """A row, compared with that of the best optimizer, which is ``None`` without held-out losses.

    ``lowest_had`` is the loss of the best model that the user had.
    """
    if best is None or not row.models:
        return row
    sign = row.studies[0].sign
    if row is best:  # which need not be the answer
        if lowest_had < row.loss:
            return dataclasses.replace(row, verdict="best search")
        return dataclasses.replace(row, verdict="lowest loss" if sign > 0 else "highest score")
    difference = Difference.of(_losses_beside(row, best), _losses_beside(best, row))
    if difference.low is None and row.only_model is not None and best.only_model is not None and row.report is not None:
        loss, *_ = row.report.rows(row.only_model.name, best.only_model.name)
        difference = Difference.of_models(loss) or difference
    return dataclasses.replace(row, verdict=difference.verdict, difference=difference.shown(sign))


def _losses_beside(row: Row, other: Row) -> dict[int, float]:
    """Seed → held-out loss. A grid, in which nothing is random, has its one loss with each seed of the other."""
    losses = row.losses
    if row.optimizer in GRIDS and len(losses) == 1:
        return dict.fromkeys(other.losses, *losses.values())
    return losses
