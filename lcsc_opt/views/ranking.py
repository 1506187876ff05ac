"""Which optimizer is ahead, at what cost, whether by more than chance, and what its judges say: data over seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from lcsc_opt.database.comparing import (
    EMA_GRID,
    OptimizerSummary,
    below_ema,
    best_ema,
    by_optimizer,
    floors_of,
    label_of,
    mean_and_spread,
    over_seeds,
    samples,
)
from lcsc_opt.database.history import Floats, StudyHistory
from lcsc_opt.database.judges import Judge
from lcsc_opt.views.curves import AXES, best_so_far
from lcsc_opt.views.figures.look import number

CONFIDENCE = 0.95

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


@dataclasses.dataclass(frozen=True)
class Ranked:
    """One optimizer over its seeds.

    Attributes:
        optimizer: its name.
        label: its name in tables.
        seeds: how many studies it has.
        finished: how many of them have ended.
        searched: lowest loss of the search.
        held_out: loss on held-out noise, of the seeds that have one.
        below_ema: mean held-out loss relative to EMA*'s, minus one: -0.6 is 60 % below it.
        to_ema: axis → the cost of being as good as EMA* on the search's noise.
        to_value: axis → the cost of reaching the wanted value.
        difference: from the best optimizer; ``None`` for the best one, and without held-out losses.
        verdict: in words.
        cross_check: the held-out metric in features that the loss does not see, of the seeds that have one.
        cross_check_metric: its name.
        doubtful: how many seeds have a better loss than the baseline, but no better cross-check or a worse judge.
        doubted: the metrics that did not follow the loss in some seed.
    """

    optimizer: str
    label: str
    seeds: int
    finished: int
    searched: _Spread | None
    held_out: _Spread | None
    below_ema: float | None
    to_ema: Mapping[str, Reach]
    to_value: Mapping[str, Reach]
    difference: Difference | None
    verdict: str
    cross_check: _Spread | None = None
    cross_check_metric: str | None = None
    doubtful: int = 0
    doubted: tuple[str, ...] = ()


def ranking(studies: Sequence[StudyHistory], *, value: float | None = None) -> list[Ranked]:
    """The optimizers of an experiment, the best held-out loss first, then the best searched one.

    Args:
        studies: of one experiment.
        value: a loss on the search's noise; the cost of reaching it is computed, too.
    """
    ema = best_ema(studies)
    ordered = by_optimizer(studies)
    best = next((group for group in ordered if _held_out_losses(group)), None)
    return [_ranked(group, best, ema, value) for group in ordered]


def _ranked(
    group: Sequence[StudyHistory], best: Sequence[StudyHistory] | None, ema: StudyHistory | None, value: float | None
) -> Ranked:
    losses = _held_out_losses(group)
    held_out = mean_and_spread(losses.values())
    other = [study.cross_check for study in group if study.cross_check is not None]
    compared = None
    if best is not None and best is not group and losses and len(samples([*group, *best])) == 1:
        compared = difference(losses, _held_out_losses(best))
    return Ranked(
        optimizer=group[0].optimizer,
        label=label_of(group),
        seeds=len(group),
        finished=sum(study.ended for study in group),
        searched=mean_and_spread(study.searched for study in group),
        held_out=held_out,
        below_ema=below_ema(group, ema),
        to_ema={} if ema is None or ema.searched is None else cost_to_reach(group, ema.searched),
        to_value={} if value is None else cost_to_reach(group, value),
        difference=compared,
        verdict="best" if group is best else verdict(compared, measured=bool(losses)),
        cross_check=mean_and_spread(found.value for found in other),
        cross_check_metric=other[0].metric if other else None,
        doubtful=sum(study.warning is not None for study in group),
        doubted=tuple(
            dict.fromkeys(m for study in group if study.held_out is not None for m in study.held_out.doubted)
        ),
    )


def _held_out_losses(studies: Sequence[StudyHistory]) -> dict[int, float]:
    """Seed → held-out loss, of the studies that have one."""
    return {study.seed: study.held_out_loss for study in studies if study.held_out_loss is not None}


def cost_to_reach(studies: Sequence[StudyHistory], target: float) -> dict[str, Reach]:
    """Axis → what the search spent until its best loss was at most ``target``."""
    return {axis: _reach([best_so_far(study, axis).first_below(target) for study in studies]) for axis in AXES}


def _reach(costs: Sequence[float | None]) -> Reach:
    known = [cost for cost in costs if cost is not None]
    median = statistics.median([*known, *[math.inf] * (len(costs) - len(known))])
    return Reach(None if math.isinf(median) else median, len(known), len(costs))


def verdict(compared: Difference | None, *, measured: bool = False) -> str:
    """A difference from the best in words. ``measured``: there are held-out values, but on other noise."""
    if compared is None:
        return "held out on other noise" if measured else "no held-out value"
    if compared.low is None or compared.high is None:
        return "one seed: no interval"
    return "worse" if compared.low > 0 else "better" if compared.high < 0 else "not distinguishable"


def difference(losses: Mapping[int, float], best: Mapping[int, float]) -> Difference:
    """How much higher these held-out losses, seed → loss, are than those of the best optimizer.

    If both have the same seeds, they are compared seed by seed. Then effects that two searches share, such as their
    noise, cancel.
    """
    mean = statistics.fmean(losses.values()) - statistics.fmean(best.values())
    if min(len(losses), len(best)) < 2:
        return Difference(mean)
    if losses.keys() == best.keys():
        return Difference(mean, *mean_interval([np.array([losses[seed] - best[seed] for seed in sorted(losses)])]))
    return Difference(mean, *mean_interval([np.array(list(losses.values())), -np.array(list(best.values()))]))


def mean_interval(samples: Sequence[Floats]) -> tuple[float, float]:
    """Welch's (1947) interval for the sum of the means of independent samples; Student's for a single one.

    Args:
        samples: each of at least two values.
    """
    variances = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    total, mean = float(variances.sum()), float(sum(sample.mean() for sample in samples))
    if not total > 0:
        return mean, mean
    freedom = total**2 / sum(v**2 / (len(sample) - 1) for v, sample in zip(variances, samples, strict=True))
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(total)
    return mean - half, mean + half


_ALIKE = "not distinguishable"


def headline(ranked: Sequence[Ranked], metric: str = "loss") -> str:
    """The winner of an experiment, how far below EMA* it is, and who may be as good; plain text.

    Args:
        ranked: the best first.
        metric: the name of the loss.
    """
    known = [row for row in ranked if row.held_out is not None]
    if not known:
        return _searched(ranked, metric)
    first = known[0]
    assert first.held_out is not None
    mean, deviation = first.held_out
    spread = "" if deviation is None else f" ± {deviation:.2g}"
    line = f"{first.label} is ahead: held-out {metric} {mean:.4g}{spread}{_against_ema(first, ranked)}{_doubt(first)}"
    close = [row.label for row in known[1:] if row.verdict == _ALIKE]
    if close:
        return f"{line}; {_listed(close)} not distinguishable over {first.seeds} seeds"
    if len(known) > 1 and first.seeds == 1:
        return f"{line}; one seed each, so this may be chance"
    return line


def _searched(ranked: Sequence[Ranked], metric: str) -> str:
    known = [row for row in ranked if row.searched is not None]
    if not known:
        return "No result yet."
    first = min(known, key=lambda row: row.searched or (0.0, None))
    assert first.searched is not None
    return (
        f"{first.label} is ahead so far: searched {metric} {first.searched[0]:.4g}; "
        "held-out values come at the end of a search, or with lcsc evaluate STUDY"
    )


def _against_ema(row: Ranked, ranked: Sequence[Ranked]) -> str:
    if not row.below_ema or row.optimizer == EMA_GRID:
        return ""
    ema = next((other.label for other in ranked if other.optimizer == EMA_GRID), "EMA*")
    return f", {abs(100 * row.below_ema):.0f} % {'below' if row.below_ema < 0 else 'above'} {ema}"


def _doubt(row: Ranked) -> str:
    """A warning, as the end of a line, that the gain may be only in what the loss measures; empty without doubt."""
    if not row.doubtful:
        return ""
    where = "" if row.seeds == 1 else f" in {row.doubtful} of {row.seeds} seeds"
    names = _listed(row.doubted) if row.doubted else row.cross_check_metric or "the cross-check"
    return f" (but {names} gained nothing{where}: compare the images)"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_BETTER = {1: "lower", -1: "higher"}


def judge_table(judges: Sequence[Judge]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows, as text: the metric, which way is better, the answer, the baseline, the gain, the floor.

    The columns for the baseline and for held-out real images (the floor) exist if some judge has them.
    """
    against = next((judge.against for judge in judges if judge.against is not None), None)
    floors = any(judge.floor is not None for judge in judges)
    beside = () if against is None else (against, "gain")
    header = ("judge", "better", "answer", *beside, *(("real images",) * floors))
    return header, [_judge_row(judge, compared=against is not None, floors=floors) for judge in judges]


def comparison_table(studies: Sequence[StudyHistory]) -> tuple[tuple[str, ...], list[list[str]]] | None:
    """Header and rows, as text: each optimizer's held-out loss and judges, means over seeds; ``None`` without judges.

    The last row is real images that the loss does not see, if some are held out.
    """
    summaries, floors = over_seeds(studies), floors_of(studies)
    names = judges_of(summaries)
    if not names:
        return None
    rows = [
        [row.label, *(number(*(value or (None, None))) for value in (row.held_out, *map(row.judges.get, names)))]
        for row in summaries
    ]
    if floors:
        rows.append(["real images", number(None), *(number(floors.get(name)) for name in names)])
    return ("optimizer", f"held-out {studies[0].metric}", *names), rows


def judges_of(summaries: Sequence[OptimizerSummary]) -> list[str]:
    """All judges of these optimizers, precision and recall first."""
    longest = sorted(summaries, key=lambda row: len(row.judges), reverse=True)
    return list(dict.fromkeys(name for row in longest for name in row.judges))


def _judge_row(judge: Judge, *, compared: bool, floors: bool) -> list[str]:
    row = [judge.metric, _BETTER[judge.sign], number(judge.value, judge.spread)]
    if compared:
        mark = " (worse)" if judge.lost else ""
        row += [
            number(judge.baseline, judge.baseline_spread),
            number(judge.gain, judge.gain_spread, "+.3g") + mark,
        ]
    return [*row, *([number(judge.floor)] if floors else [])]
