"""How the studies of an experiment compare: EMA*, how far a loss is from it, means over seeds, and rows for tables."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.profiles import effective_count, sum_abs
from lcsc_opt.database.history import Floats, HeldOut, StudyHistory
from lcsc_opt.database.names import compared_trials, label
from lcsc_opt.database.store import StoredStudy

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

    ``None`` if no value is known. The deviation is ``None`` if only one is known.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def ema_beside(held_out: HeldOut | None, ema: HeldOut | None) -> float | None:
    """EMA*'s loss on the noise of ``held_out``, or ``None`` if it was not measured there.

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

    ``None`` if one is not known or the signs differ: then a share means nothing.
    """
    if value is None or not reference or value * reference < 0:
        return None
    return (value - reference) / abs(reference)


def below_ema(group: Sequence[StudyHistory], ema: StudyHistory | None) -> float | None:
    """Mean held-out loss relative to the mean of EMA*'s on the same noise, or ``None`` if one of them is not known."""
    known = [study.held_out for study in group if study.held_out is not None and study.held_out.loss is not None]
    beside = [ema_beside(held_out, None if ema is None else ema.held_out) for held_out in known]
    if not known or any(loss is None for loss in beside):
        return None
    losses = [held_out.loss for held_out in known if held_out.loss is not None]
    return relative(statistics.fmean(losses), statistics.fmean(loss for loss in beside if loss is not None))


def _judges_over_seeds(studies: Sequence[StudyHistory]) -> dict[str, tuple[float, float | None]]:
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


@dataclasses.dataclass(frozen=True)
class OptimizerSummary:
    """One optimizer over its seeds; a spread is the sample standard deviation, ``None`` for a single seed.

    ``below_ema`` is the mean held-out loss relative to EMA*'s, minus one: -0.6 is 60 % below it. ``judges`` are the
    held-out metrics that are not the loss, the cross-check among them. ``held_out_images`` are the numbers of
    images of the held-out losses, each once.
    """

    optimizer: str
    label: str
    seeds: int
    searched: tuple[float, float | None] | None
    held_out: tuple[float, float | None] | None
    evaluations: float
    images: float
    seconds: float
    below_ema: float | None
    judges: Mapping[str, tuple[float, float | None]] = dataclasses.field(default_factory=dict)
    held_out_images: tuple[int, ...] = ()


def over_seeds(studies: Sequence[StudyHistory]) -> list[OptimizerSummary]:
    """Mean and spread of each optimizer, the best held-out (else searched) first."""
    ema = best_ema(studies)
    return [_over_seeds(group, ema) for group in by_optimizer(studies)]


def different_samples(studies: Sequence[StudyHistory]) -> str | None:
    """A warning where held-out losses do not compare: they have different numbers of images or groups of noise."""
    if len(samples(studies)) < 2:
        return None
    return (
        "held-out losses are of different numbers of images or groups of noise and do not compare: "
        "lcsc evaluate each STUDY with the same --images and --groups, and --keep"
    )


def comparison_rows(studies: Sequence[StudyHistory]) -> list[dict[str, Any]]:
    """What ``lcsc compare --format json`` prints: a row of each study, with the warnings that concern it."""
    differ = different_samples(studies)
    rows = []
    for study in studies:
        warnings = (None if study.held_out_loss is None else differ, study.warning)
        rows.append({**study.as_row(), "warnings": [warning for warning in warnings if warning is not None]})
    return rows


def _over_seeds(group: Sequence[StudyHistory], ema: StudyHistory | None) -> OptimizerSummary:
    return OptimizerSummary(
        optimizer=group[0].optimizer,
        label=label_of(group),
        seeds=len(group),
        searched=mean_and_spread(study.searched for study in group),
        held_out=mean_and_spread(study.held_out_loss for study in group),
        evaluations=statistics.fmean(study.evaluations for study in group),
        images=statistics.fmean(study.images for study in group),
        seconds=statistics.fmean(study.seconds for study in group),
        below_ema=below_ema(group, ema),
        judges=_judges_over_seeds(group),
        held_out_images=tuple(sorted({images for study in group if (images := study.held_out_images) is not None})),
    )


def describe_coefficients(coefficients: Floats, steps: Sequence[int]) -> dict[str, float]:
    """A few numbers that say what coefficients look like.

    ``sum_abs`` is Σ|a|, ``negative`` the share of it that is negative, ``effective`` the number of checkpoints that
    matter, ``largest`` the largest in magnitude and ``largest_step`` the step it belongs to.
    """
    magnitude = np.abs(coefficients)
    largest = int(magnitude.argmax())
    return {
        "sum_abs": sum_abs(coefficients),
        "negative": float(magnitude[coefficients < 0].sum() / magnitude.sum()),
        "effective": effective_count(coefficients),
        "largest": float(coefficients[largest]),
        "largest_step": int(steps[largest]),
    }


def chosen_trial(study: StoredStudy, number: int | None = None) -> tuple[int, Coefficients, dict[str, Any]]:
    """The trial to export: the given one, else the one chosen on other noise, else the best of the search.

    Returns:
        Its number, its coefficients ``[K]`` and its user attributes with ``loss`` and what was measured of it.

    Raises:
        StudyStoreError: there is no such complete trial.
    """
    complete = {trial.number: trial for trial in study.trials() if trial.value is not None}
    if number is None:
        compared = compared_trials(list(complete.values()))
        best = min(compared, key=lambda trial: (trial.value, trial.number), default=None)
        if best is None:
            raise StudyStoreError(f"{study.name}: no complete trial on the search's noise yet; let it run on")
        held_out = study.attributes.get("held_out") or {}
        number = int(held_out.get("trial", best.number))
    if number not in complete:
        raise StudyStoreError(f"{study.name}: trial {number} is not complete")
    trial = complete[number]
    coefficients = np.array(trial.user_attrs["coefficients"], dtype=np.float64)
    return number, coefficients, {**trial.user_attrs, **study.measured(number), "loss": trial.value}
