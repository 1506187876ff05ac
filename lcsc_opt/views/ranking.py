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
from lcsc_opt.database.history import Floats, Standing, as_known, best_searched
from lcsc_opt.database.measurement import Measurement, Model
from lcsc_opt.database.names import is_trained, label
from lcsc_opt.database.report import Report
from lcsc_opt.views import UNKNOWN, number, signed

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
    """Held-out loss minus that of the best optimizer, with an interval over seeds, if there is more than one."""

    mean: float
    low: float | None = None
    high: float | None = None

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
        return cls(mean, low, high)

    def shown(self, sign: int) -> Difference:
        """The difference between maximized scores where ``sign`` is −1, else itself; low and high change places."""
        if sign > 0:
            return self
        low = as_known(self.high, sign)
        high = as_known(self.low, sign)
        return Difference(-self.mean, low, high)

    @property
    def verdict(self) -> str:
        """The difference in words."""
        if self.low is None or self.high is None:
            return "one seed: no interval"
        if self.low > 0:
            return "worse"
        if self.high < 0:
            return "better"
        return "not distinguishable"

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
class Ranked:
    """One optimizer over its seeds; or the answer, or a model of the trainer's, which cost no search of their own.

    Attributes:
        optimizer: its name.
        label: its name in tables.
        seeds: how many studies it has.
        finished: how many of them have ended.
        evaluations: mean over seeds, as ``images`` and ``seconds``.
        searched: loss in the search, of the models of ``held_out``; before there is a report, the best one. This,
            ``held_out``, ``below_ema`` and ``difference`` are as the user knows them: of a maximized score, higher ones
            are better.
        held_out: loss on held-out noise, of the seeds that have one.
        held_out_images: the numbers of images of the held-out losses, each once.
        below_ema: mean held-out loss relative to EMA*'s, minus one: -0.6 is 60 % below it; ``None`` where they do not
            compare.
        difference: from the best optimizer; ``None`` for the best one, and without held-out losses.
        verdict: in words.
        model: the key of its one model; ``None`` of several seeds, and without a report.
    """

    optimizer: str
    label: str
    held_out: Spread | None
    held_out_images: tuple[int, ...]
    below_ema: float | None
    verdict: str
    seeds: int = 0
    finished: int = 0
    evaluations: float = 0.0
    images: float = 0.0
    seconds: float = 0.0
    searched: Spread | None = None
    difference: Difference | None = None
    model: str | None = None


def ranking(studies: Sequence[Standing]) -> list[Ranked]:
    """The answer, then the optimizers of an experiment, the best held-out loss first, then the best searched one.

    The last checkpoint and the trainer's EMA are among them, once there is a report.

    Args:
        studies: the studies of one experiment.
    """
    groups: dict[str, list[Standing]] = {}
    for study in studies:
        groups.setdefault(study.optimizer, []).append(study)
    ordered = sorted(groups.values(), key=_rank)
    best = next((group for group in ordered if _held_out_losses(group)), None)
    ranked = [_ranked(group, best) for group in ordered]
    report = studies[0].report
    if report is None:
        return ranked
    losses = [_rank(group)[0] for group in ordered]  # the held-out ones, ascending; infinite where not known
    known = {row.model for row in ranked}
    ranked = [_named(row, report) for row in ranked]
    for measured in report.models:
        name = measured.model.name
        if is_trained(name) and measured.model.key not in known:
            place = bisect.bisect_right(losses, measured.loss)
            losses.insert(place, measured.loss)
            ranked.insert(place, _without_search(name, name, measured, report, "not searched"))
    answer = report.of_answer
    title = f"{ANSWER} · {title_in(report, answer.model)}"
    for row in ranked:
        if row.model == answer.model.key:  # it stands in its own row, and nowhere else
            return [dataclasses.replace(row, label=title, verdict=ANSWER), *(one for one in ranked if one is not row)]
    return [_without_search(ANSWER, title, answer, report, ANSWER), *ranked]


def title_in(report: Report, model: Model) -> str:
    """All that a model of a report is: ``EMA* = last checkpoint``; with one name, also which average it is."""
    names = names_in(report, model)
    return model.title if names == model.name else names


def names_in(report: Report, model: Model) -> str:
    """The names of a model in a report, those of what the user had first."""
    same = [measured.model for measured in report.models if measured.model.key == model.key] or [model]
    return " = ".join(dict.fromkeys(one.name for one in sorted(same, key=lambda one: one.name not in report.had)))


def _named(row: Ranked, report: Report) -> Ranked:
    """A row whose one model has further names in the report, with all of them."""
    same = [measured.model for measured in report.models if measured.model.key == row.model]
    if len({model.name for model in same}) < 2:
        return row
    return dataclasses.replace(row, label=title_in(report, same[0]))


def _without_search(optimizer: str, title: str, measured: Measurement, report: Report, verdict: str) -> Ranked:
    """A model of the report as an optimizer without a study."""
    return Ranked(
        optimizer=optimizer,
        label=title,
        held_out=Spread.of([report.shown(measured)]),
        held_out_images=(measured.images,) if measured.images else (),
        below_ema=_below_ema([measured], report),
        verdict=verdict,
        model=measured.model.key,
    )


def _rank(group: Sequence[Standing]) -> tuple[float, float]:
    """A key that sorts by the mean held-out loss, then by the searched one; unknown losses come last."""
    held_out = Spread.of(study.held_out_loss for study in group)
    searched = Spread.of(study.summary.loss for study in group)
    return math.inf if held_out is None else held_out.mean, math.inf if searched is None else searched.mean


def _ranked(group: Sequence[Standing], best: Sequence[Standing] | None) -> Ranked:
    """The studies of one optimizer, compared with those of the best one, which is ``None`` without held-out losses."""
    sign = group[0].sign
    losses = _held_out_losses(group)
    measured_models = [study.found for study in group if study.found is not None]
    difference = None
    verdict = "no held-out value"
    if group is best:
        verdict = "lowest loss" if sign > 0 else "highest score"  # which need not be the answer
    elif losses and best is not None:
        of_losses = Difference.of(_losses_beside(group, best), _losses_beside(best, group))
        difference = of_losses.shown(sign)
        verdict = of_losses.verdict
    return Ranked(
        optimizer=group[0].optimizer,
        label=_common_label(group),
        seeds=len(group),
        finished=sum(study.ended for study in group),
        evaluations=statistics.fmean(study.summary.evaluations for study in group),
        images=statistics.fmean(study.summary.cost.images for study in group),
        seconds=statistics.fmean(study.seconds for study in group),
        searched=_searched_beside_held_out(group),
        held_out=Spread.of(sign * loss for loss in losses.values()),
        held_out_images=tuple(sorted({measured.images for measured in measured_models if measured.images})),
        below_ema=_below_ema(measured_models, group[0].report),
        difference=difference,
        verdict=verdict,
        model=measured_models[0].model.key if len(group) == len(measured_models) == 1 else None,
    )


def _searched_beside_held_out(group: Sequence[Standing]) -> Spread | None:
    """The searched losses, as the user knows them, of the models whose held-out losses stand in the same row.

    ``None`` if one of them has none.
    """
    shown = [study for study in group if study.found is not None] or group
    losses = [study.searched_of_shown for study in shown]
    if None in losses:
        return None
    return Spread.of(losses)


def _common_label(group: Sequence[Standing]) -> str:
    """The label of all seeds; where they differ, as in the average that is best, the optimizer's."""
    labels = {study.label for study in group}
    if len(labels) == 1:
        return labels.pop()
    return label(group[0].optimizer)


def _held_out_losses(studies: Sequence[Standing]) -> dict[int, float]:
    """Seed → held-out loss, of the studies that have one."""
    return {study.seed: study.held_out_loss for study in studies if study.held_out_loss is not None}


def _losses_beside(studies: Sequence[Standing], others: Sequence[Standing]) -> dict[int, float]:
    """Seed → held-out loss. A grid, in which nothing is random, has its one loss with each seed of the others."""
    losses = _held_out_losses(studies)
    if studies[0].optimizer in GRIDS and len(losses) == 1:
        return dict.fromkeys(_held_out_losses(others), *losses.values())
    return losses


def _below_ema(models: Sequence[Measurement], report: Report | None) -> float | None:
    """The mean loss of models relative to EMA*'s, minus one; of maximized scores the same.

    ``None`` if there is no model or no EMA*, or if the signs of their losses differ: then a share means nothing.
    """
    if not models or report is None or report.ema is None:
        return None
    ema = report.ema.loss
    loss = statistics.fmean(measured.loss for measured in models)
    if ema == 0 or loss * ema < 0:
        return None
    return report.sign * (loss - ema) / abs(ema)


def headline(studies: Sequence[Standing]) -> str:
    """One line while there is no report: the lowest searched loss, which is the answer until then."""
    best = best_searched(studies)
    if best is None:
        return "No result yet."
    seed = f" (seed {best.seed})" if best.seed else ""
    has_ended = all(study.ended for study in studies)
    so_far = "" if has_ended else " so far"
    again = f"lcsc evaluate {best.experiment}"
    if not best.holds_out:
        reason = "this objective holds nothing out, so it may look better than it is"
    elif best.settings.get("objective") is None:
        reason = f"the Optuna study {best.experiment}, which had its report, was deleted: run the same command again"
    elif best.settings.get("held_out") is None:
        reason = f"nothing was held out: add held_out to the study file for a report, or use {again}"
    elif not has_ended:
        reason = f"held-out values come when all searches have ended, or with {again}"
    else:
        reason = "its report is not made yet: run the same command again"
    return f"Best searched {best.metric}{so_far}: {best.label}{seed} with {best.searched:.4g}; {reason}"
