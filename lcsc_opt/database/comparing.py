"""How the studies of an experiment compare: EMA*, how far a loss is from it, and means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from lcsc_opt.database.history import HeldOut, StudyHistory
from lcsc_opt.database.names import label

EMA_GRID = "EMAGrid"
FIRST = {"precision": 0, "recall": 1, "fdr": 2}  # order of judges in tables: fidelity, diversity, all feature spaces


def best_ema(studies: Sequence[StudyHistory]) -> StudyHistory | None:
    """EMA*, the best plain average of the checkpoints: an EMA, a uniform average of the last ones, or the last one.

    It is the answer of the finished EMA grid with the lowest held-out loss, or with the lowest searched loss where none
    is held out.
    """

    def rank(study: StudyHistory) -> tuple[float, float]:
        held_out = study.held_out_loss
        return (math.inf if held_out is None else held_out, study.searched or 0.0)

    grids = [study for study in studies if study.optimizer == EMA_GRID and study.ended and study.searched is not None]
    return min(grids, key=rank, default=None)


def label_of(group: Sequence[StudyHistory]) -> str:
    """The name in tables of an optimizer, over its seeds."""
    labels = {study.label for study in group}
    return labels.pop() if len(labels) == 1 else label(group[0].optimizer)


def mean_and_spread(values: Iterable[float | None]) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation of the known values.

    ``None`` where no value is known. The deviation is ``None`` where only one is known.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def ema_beside(held_out: HeldOut | None, ema: HeldOut | None) -> float | None:
    """EMA*'s loss on the noise of ``held_out``; ``None`` where it was not measured there.

    Args:
        held_out: of a study.
        ema: of the EMA grid; its own report may have fewer images.
    """
    if held_out is None:
        return None
    if "EMA*" in held_out.baselines:
        return held_out.baselines["EMA*"]
    return ema.loss if ema is not None and ema.sample == held_out.sample else None


def relative(value: float | None, reference: float | None) -> float | None:
    """``value / reference - 1``: -0.6 is 60 % below the reference.

    ``None`` where one is not known, or where the signs differ: then a share means nothing.
    """
    if value is None or not reference or value * reference < 0:
        return None
    return (value - reference) / abs(reference)


def below_ema(group: Sequence[StudyHistory], ema: StudyHistory | None) -> float | None:
    """Mean held-out loss relative to the mean of EMA*'s on the same noise; ``None`` where one of them is not known."""
    known = [study.held_out for study in group if study.held_out is not None and study.held_out.loss is not None]
    beside = [ema_beside(held_out, None if ema is None else ema.held_out) for held_out in known]
    if not known or any(loss is None for loss in beside):
        return None
    losses = [held_out.loss for held_out in known if held_out.loss is not None]
    return relative(statistics.fmean(losses), statistics.fmean(loss for loss in beside if loss is not None))


def judges_over_seeds(studies: Sequence[StudyHistory]) -> dict[str, tuple[float, float | None]]:
    """Judge → mean and spread over the studies that were judged by it; precision and recall first."""
    found: dict[str, list[float]] = {}
    for study in studies:
        for metric, value in _judged(study).items():
            found.setdefault(metric, []).append(value)
    ordered = sorted(found, key=lambda metric: FIRST.get(metric.partition("@")[0], len(FIRST)))
    spreads = {metric: mean_and_spread(found[metric]) for metric in ordered}
    return {metric: spread for metric, spread in spreads.items() if spread is not None}


def _judged(study: StudyHistory) -> dict[str, float]:
    if study.held_out is None:
        return {}
    judged = {judge.metric: judge.value for judge in study.held_out.judges}
    cross_check = study.held_out.cross_check
    return judged if cross_check is None else {**judged, cross_check.metric: cross_check.value}


def floors_of(studies: Sequence[StudyHistory]) -> dict[str, float]:
    """Judge → its value for real images that the loss does not see, where some are held out."""
    judges = [judge for study in studies if study.held_out is not None for judge in study.held_out.judges]
    return {judge.metric: judge.floor for judge in judges if judge.floor is not None}


def samples(studies: Sequence[StudyHistory]) -> set[tuple[int | None, tuple[int, ...]]]:
    """The pairs (images, groups of noise) of held-out losses. The losses compare only where there is one pair."""
    known = [study.held_out for study in studies if study.held_out is not None]
    return {held_out.sample for held_out in known if held_out.loss is not None}


def by_optimizer(studies: Sequence[StudyHistory]) -> list[list[StudyHistory]]:
    """The studies of each optimizer; optimizers are sorted by mean held-out loss, then by mean searched loss."""
    grouped: dict[str, list[StudyHistory]] = {}
    for study in studies:
        grouped.setdefault(study.optimizer, []).append(study)
    return sorted(grouped.values(), key=_rank)


def _rank(group: Sequence[StudyHistory]) -> tuple[float, float]:
    found = [mean_and_spread(getattr(study, name) for study in group) for name in ("held_out_loss", "searched")]
    held_out, searched = (math.inf if known is None else known[0] for known in found)
    return held_out, searched
