"""What the studies of one experiment found, and at what cost: plain data for tables, figures and programs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.profiles import effective_count, sum_abs
from lcsc_opt.database.comparing import (
    below_ema,
    best_ema,
    by_optimizer,
    judges_over_seeds,
    label_of,
    mean_and_spread,
    samples,
)
from lcsc_opt.database.history import Floats, StudyHistory
from lcsc_opt.database.names import compared_trials
from lcsc_opt.database.store import StoredStudy


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
        judges=judges_over_seeds(group),
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
