"""Which optimizer is ahead, at what cost, by more than chance or not, in which metrics, over a sweep: data, tables."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from lcsc_opt.base.sweep import split_point
from lcsc_opt.database.history import Floats, StudyHistory, best_ema
from lcsc_opt.database.names import EMA, EMA_GRID, label
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import HeldOut, MetricRow
from lcsc_opt.views import number
from lcsc_opt.views.curves import AXES, best_so_far

CONFIDENCE = 0.95
_FIRST = {"fid_held_out": 0, "precision": 1, "recall": 2, "fdr": 3}  # unseen images, fidelity, diversity, all spaces
_ALIKE = "not distinguishable"
_BETTER = {1: "lower", -1: "higher", None: "–"}

_Spread = tuple[float, float | None]
"""Mean and sample standard deviation; ``None`` for a single seed."""


@dataclasses.dataclass(frozen=True)
class Reach:
    """The cost of reaching a value: the median over seeds, ``None`` if half of the seeds or more did not reach it."""

    median: float | None
    reached: int
    seeds: int

    @property
    def text(self) -> str:
        """The cost as text for people; says how many seeds did not reach the value."""
        missed = f"not reached {self.seeds - self.reached} of {self.seeds}"
        if self.median is None:
            return missed
        return f"{self.median:,.0f}" + (f" ({missed})" if self.reached < self.seeds else "")


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
            return cls(mean, *_mean_interval([np.array([losses[seed] - best[seed] for seed in sorted(losses)])]))
        return cls(mean, *_mean_interval([np.array(list(losses.values())), -np.array(list(best.values()))]))

    @property
    def verdict(self) -> str:
        """The difference in words."""
        if self.low is None or self.high is None:
            return "one seed: no interval"
        return "worse" if self.low > 0 else "better" if self.high < 0 else _ALIKE


def _mean_interval(samples: Sequence[Floats]) -> tuple[float, float]:
    """Welch's (1947) interval for the sum of the means of independent samples; Student's for a single one."""
    variances = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    total, mean = float(variances.sum()), float(sum(sample.mean() for sample in samples))
    if not total > 0:
        return mean, mean
    freedom = total**2 / sum(v**2 / (len(sample) - 1) for v, sample in zip(variances, samples, strict=True))
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(total)
    return mean - half, mean + half


@dataclasses.dataclass(frozen=True)
class Ranked:
    """One optimizer over its seeds.

    Attributes:
        optimizer: its name.
        label: its name in tables.
        seeds: how many studies it has.
        finished: how many of them have ended.
        evaluations: mean over seeds, as ``images`` and ``seconds``.
        searched: lowest loss of the search.
        held_out: loss on held-out noise, of the seeds that have one.
        held_out_images: the numbers of images of the held-out losses, each once.
        metrics: held-out metric → its value, of the seeds that have it; precision and recall first.
        below_ema: mean held-out loss relative to EMA*'s, minus one: -0.6 is 60 % below it.
        to_ema: axis → the cost of being as good as EMA* on the search's noise.
        to_value: axis → the cost of reaching the wanted value.
        difference: from the best optimizer; ``None`` for the best one, and without held-out losses.
        verdict: in words.
        doubtful: how many seeds have a better loss than the baseline, but metrics that did not follow.
        doubted: the metrics that did not follow the loss in some seed.
    """

    optimizer: str
    label: str
    seeds: int
    finished: int
    evaluations: float
    images: float
    seconds: float
    searched: _Spread | None
    held_out: _Spread | None
    held_out_images: tuple[int, ...]
    metrics: Mapping[str, _Spread]
    below_ema: float | None
    to_ema: Mapping[str, Reach]
    to_value: Mapping[str, Reach]
    difference: Difference | None
    verdict: str
    doubtful: int
    doubted: tuple[str, ...]


def ranking(studies: Sequence[StudyHistory], *, value: float | None = None) -> list[Ranked]:
    """The optimizers of an experiment, the best held-out loss first, then the best searched one.

    Args:
        studies: of one experiment.
        value: a loss on the search's noise; the cost of reaching it is computed, too.
    """

    def rank(group: Sequence[StudyHistory]) -> tuple[float, ...]:
        spreads = _spread(study.held_out_loss for study in group), _spread(study.searched for study in group)
        return tuple(math.inf if found is None else found[0] for found in spreads)

    groups: dict[str, list[StudyHistory]] = {}
    for study in studies:
        groups.setdefault(study.optimizer, []).append(study)
    ordered = sorted(groups.values(), key=rank)
    best = next((group for group in ordered if _held_out_losses(group)), None)
    ema = best_ema(studies)
    return [_ranked(group, best, ema, value) for group in ordered]


def _ranked(
    group: Sequence[StudyHistory], best: Sequence[StudyHistory] | None, ema: StudyHistory | None, value: float | None
) -> Ranked:
    losses, reports = _held_out_losses(group), _reports(group)
    labels = {study.label for study in group}
    compared = None
    if losses and best is not None and best is not group and different_samples([*group, *best]) is None:
        compared = Difference.of(losses, _held_out_losses(best))
    unknown = "held out on other noise" if losses else "no held-out value"
    return Ranked(
        optimizer=group[0].optimizer,
        label=labels.pop() if len(labels) == 1 else label(group[0].optimizer),
        seeds=len(group),
        finished=sum(study.ended for study in group),
        evaluations=statistics.fmean(study.evaluations for study in group),
        images=statistics.fmean(study.images for study in group),
        seconds=statistics.fmean(study.seconds for study in group),
        searched=_spread(study.searched for study in group),
        held_out=_spread(losses.values()),
        held_out_images=tuple(sorted({images for study in group if (images := study.held_out_images) is not None})),
        metrics=_metrics(reports),
        below_ema=_below_ema(reports, None if ema is None else ema.held_out),
        to_ema={} if ema is None or ema.searched is None else _cost_to_reach(group, ema.searched),
        to_value={} if value is None else _cost_to_reach(group, value),
        difference=compared,
        verdict="best" if group is best else unknown if compared is None else compared.verdict,
        doubtful=sum(report.warning is not None for report in reports),
        doubted=tuple(dict.fromkeys(metric for report in reports for metric in report.doubted)),
    )


def _spread(values: Iterable[float | None]) -> _Spread | None:
    """Mean and sample standard deviation of the known values; ``None`` if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def _held_out_losses(studies: Sequence[StudyHistory]) -> dict[int, float]:
    """Seed → held-out loss, of the studies that have one."""
    return {study.seed: study.held_out_loss for study in studies if study.held_out_loss is not None}


def _reports(studies: Sequence[StudyHistory]) -> list[HeldOut]:
    return [study.held_out for study in studies if study.held_out is not None and study.held_out.loss is not None]


def _metrics(reports: Sequence[HeldOut]) -> dict[str, _Spread]:
    """Metric → mean and spread over the reports that have it, without the loss; precision and recall first."""
    found: dict[str, list[float]] = {}
    for report in reports:
        for row in report.rows[1:]:
            found.setdefault(row.metric, []).append(row.value)
    ordered = sorted(found, key=lambda metric: _FIRST.get(metric.partition("@")[0], len(_FIRST)))
    return {metric: spread for metric in ordered if (spread := _spread(found[metric])) is not None}


def _below_ema(reports: Sequence[HeldOut], ema: HeldOut | None) -> float | None:
    """Mean held-out loss relative to the mean of EMA*'s on the same noise, minus one.

    ``None`` if one of them is not known, or if the signs differ: then a share means nothing.
    """
    known = [baseline for report in reports if (baseline := report.ema(ema)) is not None]
    if not reports or len(known) < len(reports):
        return None
    loss = statistics.fmean(report.loss for report in reports if report.loss is not None)
    baseline = statistics.fmean(known)
    return None if not baseline or loss * baseline < 0 else (loss - baseline) / abs(baseline)


def _cost_to_reach(studies: Sequence[StudyHistory], target: float) -> dict[str, Reach]:
    """Axis → what the search spent until its best loss was at most ``target``."""
    found = {}
    for axis in AXES:
        costs = [best_so_far(study, axis).first_below(target) for study in studies]
        known = [cost for cost in costs if cost is not None]
        median = statistics.median([*known, *[math.inf] * (len(costs) - len(known))])
        found[axis] = Reach(None if math.isinf(median) else median, len(known), len(costs))
    return found


def different_samples(studies: Sequence[StudyHistory]) -> str | None:
    """A warning if held-out losses do not compare: they have different numbers of images or groups of noise."""
    if len({report.sample for report in _reports(studies)}) < 2:
        return None
    why = "held-out losses are of different numbers of images or groups of noise and do not compare"
    return f"{why}: lcsc evaluate each STUDY with the same --images and --groups, and --keep"


def comparison_rows(points: Mapping[str, Sequence[StudyHistory]]) -> list[dict[str, Any]]:
    """What ``lcsc compare --format json`` prints: a row of each study, with the warnings that concern it.

    Rows of a sweep's points have their values in ``varied``.
    """
    rows = []
    for experiment, studies in points.items():
        differ, varied = different_samples(studies), split_point(experiment)[1]
        for study in studies:
            warnings = (None if study.held_out_loss is None else differ, study.warning)
            row = {**study.as_row(), "warnings": [warning for warning in warnings if warning is not None]}
            rows.append({**row, "varied": varied} if varied else row)
    return rows


def points_of(reader: HistoryReader, name: str, *, siblings: bool = False) -> dict[str, tuple[StudyHistory, ...]]:
    """Experiment → its studies: of one experiment, or of all points of a sweep, in the order in which they were begun.

    Args:
        reader: of the studies.
        name: of an experiment, or of a sweep.
        siblings: also the other points of the sweep that the experiment belongs to.

    Raises:
        StudyStoreError: there is neither.
    """
    known = [other for other in reader.experiments() if split_point(other)[0] == split_point(name)[0]]
    return {point: reader.read(point) for point in (known if known and (siblings or name not in known) else [name])}


def varied_keys(points: Mapping[str, Sequence[StudyHistory]]) -> list[str]:
    """The short names of all keys that the points vary, in the order in which they first appear."""
    return list(dict.fromkeys(key for experiment in points for key in split_point(experiment)[1]))


def headline(ranked: Sequence[Ranked], metric: str = "loss") -> str:
    """The winner of an experiment, how far below EMA* it is, and who may be as good; ``ranked`` has the best first."""
    known = [row for row in ranked if row.held_out is not None]
    if not known:
        found = [(row.searched[0], row.label) for row in ranked if row.searched is not None]
        loss, name = min(found, default=(0.0, ""))
        ahead = f"{name} is ahead so far: searched {metric} {loss:.4g}"
        later = "held-out values come at the end of a search, or with lcsc evaluate STUDY"
        return f"{ahead}; {later}" if found else "No result yet."
    first = known[0]
    assert first.held_out is not None
    mean, deviation = first.held_out
    against = ""
    if first.below_ema and first.optimizer != EMA_GRID:
        ema = next((row.label for row in ranked if row.optimizer == EMA_GRID), EMA)
        against = f", {abs(100 * first.below_ema):.0f} % {'below' if first.below_ema < 0 else 'above'} {ema}"
    if first.doubtful:
        where = "" if first.seeds == 1 else f" in {first.doubtful} of {first.seeds} seeds"
        why = f"{_listed(first.doubted)} gained nothing" if first.doubted else "see its warning"
        against += f" (but {why}{where}: compare the images)"
    spread = "" if deviation is None else f" ± {deviation:.2g}"
    line = f"{first.label} is ahead: held-out {metric} {mean:.4g}{spread}{against}"
    if close := [row.label for row in known[1:] if row.verdict == _ALIKE]:
        return f"{line}; {_listed(close)} not distinguishable over {first.seeds} seeds"
    return f"{line}; one seed each, so this may be chance" if len(known) > 1 and first.seeds == 1 else line


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), *names[-1:]]) if len(names) > 1 else "".join(names)


def report_table(rows: Sequence[MetricRow]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows, as text: the metric, which way is better, the answer, the baseline, the gain, real images.

    The columns for the baseline and for held-out real images exist if some metric has them.
    """
    against = next((row.against for row in rows if row.against is not None), None)
    real = any(row.real_halves is not None for row in rows)
    texts = []
    for row in rows:
        cells = [row.metric, _BETTER[row.sign], number(row.value, row.spread)]
        if against is not None:
            gain = number(row.gain, row.gain_spread, "+.3g") + (" (worse)" if row.lost else "")
            cells += [number(row.baseline, row.baseline_spread), gain]
        texts.append([*cells, *[number(row.real_halves)] * real])
    compared = () if against is None else (against, "gain")
    return ("metric", "better", "answer", *compared, *["real images"] * real), texts


def comparison_table(studies: Sequence[StudyHistory]) -> tuple[tuple[str, ...], list[list[str]]] | None:
    """Header and rows, as text: each optimizer's held-out loss and metrics, means over seeds; ``None`` without metrics.

    The last row is real images that the loss does not see, if some are held out.
    """
    ranked = ranking(studies)
    if not (names := metric_names(ranked)):
        return None
    values = [(row.label, (row.held_out, *map(row.metrics.get, names))) for row in ranked]
    rows = [[name, *(number(*(value or (None, None))) for value in row)] for name, row in values]
    known = [row for report in _reports(studies) for row in report.rows]
    if real := {row.metric: row.real_halves for row in known if row.real_halves is not None}:
        rows.append(["real images", number(None), *(number(real.get(name)) for name in names)])
    return ("optimizer", f"held-out {studies[0].metric}", *names), rows


def settings_table(studies: Sequence[StudyHistory]) -> tuple[tuple[str, ...], list[list[str]]] | None:
    """Header and rows, as text: only the settings in which studies differ; ``None`` if in none but optimizer and seed.

    A row is of all seeds with the same settings.
    """
    found = [(study, _by_path(study.settings)) for study in studies]
    values: dict[str, set[str | None]] = {key: set() for _, settings in found for key in settings}
    for key, known in values.items():
        known.update(settings.get(key) for _, settings in found)
    keys = [key for key, known in values.items() if len(known) > 1 and key not in {"seed", "optimizer.name"}]
    rows: dict[tuple[str, ...], list[str]] = {}
    for study, settings in found:
        row = (label(study.optimizer), *(settings.get(key, "–") for key in keys))
        rows.setdefault(row, []).append(str(study.seed))
    listed = [[name, *there, ", ".join(seeds)] for (name, *there), seeds in rows.items()]
    return (("optimizer", *keys, "seeds"), listed) if keys else None


def _by_path(settings: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Path with dots, as in ``vary``, → value as text."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping)
        text = value if isinstance(value, str) else json.dumps(value)
        found |= _by_path(value, f"{path}{key}.") if nested else {f"{path}{key}": text}
    return found


def metric_names(ranked: Sequence[Ranked]) -> list[str]:
    """All held-out metrics of these optimizers but the loss, precision and recall first."""
    longest = sorted(ranked, key=lambda row: len(row.metrics), reverse=True)
    return list(dict.fromkeys(name for row in longest for name in row.metrics))
