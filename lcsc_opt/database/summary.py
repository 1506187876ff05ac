"""What the studies of one experiment found, and what it cost them: plain data for tables, figures and programs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.profiles import effective_count, sum_abs
from lcsc_opt.database.comparing import best_ema, ema_beside, mean_and_spread, relative
from lcsc_opt.database.cross_check import CrossCheck
from lcsc_opt.database.history import Floats, StudyHistory
from lcsc_opt.database.judges import Judge
from lcsc_opt.database.names import BASELINES, compared_trials, is_ours, label, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy

__all__ = [
    "BASELINES",
    "Floats",
    "OptimizerSummary",
    "StudySummary",
    "comparison_rows",
    "cross_check_metric",
    "describe_coefficients",
    "different_samples",
    "is_ours",
    "over_seeds",
    "split_name",
    "summaries",
    "summaries_of",
    "summarize",
]


@dataclasses.dataclass(frozen=True, eq=False)
class StudySummary:
    """One study.

    Attributes:
        study: ``experiment/optimizer/seed``.
        optimizer: its name.
        seed: of the study.
        state: ``finished``, ``unfinished`` or ``empty``.
        budget: ``{"evaluations": …}`` or ``{"images": …}``.
        searched: lowest loss of the search; ``None`` while there is none.
        held_out: the loss on held-out noise of the trial that was chosen; ``None`` before it was evaluated.
        evaluations: finished trials, failed ones included.
        failures: failed trials.
        images: sampled by the search.
        seconds: spent in evaluations of the search.
        steps: ``[K]`` training steps.
        best_coefficients: ``[K]`` of the chosen trial, else of the best one.
        best_trial: its number.
        metric: what the loss is called: ``FID`` where it is one, else ``loss``.
        curve: ``[n, 4]`` evaluations, images, seconds, best loss so far, a row for each trial whose loss compares, in
            the order in which the optimizer was told of them. All trials count among what was spent.
        cross_check: the answer in features that the loss does not look at, where it was measured.
        judges: every metric that the loss is not made of, beside the baseline's value.
        warning: one line where the loss gained over its baseline and the cross-check or a judge did not.
    """

    study: str
    optimizer: str
    seed: int
    state: str
    budget: dict[str, Any]
    searched: float | None
    held_out: float | None
    evaluations: int
    failures: int
    images: int
    seconds: float
    steps: tuple[int, ...]
    best_coefficients: Floats | None
    best_trial: int | None
    metric: str
    curve: Floats
    sample: tuple[int | None, tuple[int, ...]] | None = None
    ema_beside: float | None = None
    cross_check: CrossCheck | None = None
    judges: tuple[Judge, ...] = ()
    warning: str | None = None

    @property
    def label(self) -> str:
        """The optimizer as tables and legends call it."""
        return label(self.optimizer)

    @property
    def ended(self) -> bool:
        """Whether the search is over."""
        return self.state == "finished"

    @property
    def held_out_loss(self) -> float | None:
        """:attr:`held_out`, as a study's history calls it."""
        return self.held_out

    @property
    def held_out_images(self) -> int | None:
        """How many images its held-out loss is of; ``None`` where there is no such loss, or no images."""
        return None if self.sample is None or self.held_out is None else self.sample[0] or None

    def as_row(self) -> dict[str, Any]:
        """What ``lcsc list --format json`` prints of a study."""
        names = (
            "study",
            "optimizer",
            "seed",
            "state",
            "searched",
            "held_out",
            "held_out_images",
            "evaluations",
            "images",
            "seconds",
        )
        row = {name: getattr(self, name) for name in names}
        cross_check = None if self.cross_check is None else dataclasses.asdict(self.cross_check)
        return {**row, "cross_check": cross_check, "judges": [dataclasses.asdict(judge) for judge in self.judges]}


def summarize(study: StoredStudy) -> StudySummary:
    """Read one study.

    Raises:
        StudyStoreError: when its name is not ``experiment/optimizer/seed``, or it is not there any more.
    """
    reader = HistoryReader(study.storage)
    for history in reader.read_studies([study.name]):
        return _summary(reader, history)
    raise StudyStoreError(f"{study.name}: was deleted from the database while it was read")


def summaries(storage: RDBStorage, experiment: str) -> list[StudySummary]:
    """Every study of an experiment, in the order in which they were created.

    Raises:
        StudyStoreError: when there is none, naming the experiments that there are.
    """
    reader = HistoryReader(storage)
    return summaries_of(reader, reader.read(experiment))


def summaries_of(reader: HistoryReader, studies: Iterable[StudyHistory]) -> list[StudySummary]:
    """What studies that were read found; their answers' coefficients are read with it."""
    return [_summary(reader, study) for study in studies]


def _summary(reader: HistoryReader, study: StudyHistory) -> StudySummary:
    finished, curve, best = study.finished, _curve(study), study.chosen
    return StudySummary(
        study=study.study,
        optimizer=study.optimizer,
        seed=study.seed,
        state=study.state,
        budget=dict(study.budget),
        searched=study.searched,
        held_out=study.held_out_loss,
        evaluations=len(finished),
        failures=len(study.failed),
        images=int(finished["images"].sum()),
        seconds=round(float(finished["seconds"].sum()), 3),
        steps=study.steps,
        best_coefficients=None if best is None else reader.coefficients(study, [best])[0],
        best_trial=best,
        metric=study.metric,
        curve=curve,
        sample=None if study.held_out is None else study.held_out.sample,
        ema_beside=ema_beside(study.held_out, None),
        cross_check=None if study.held_out is None else study.held_out.cross_check,
        judges=() if study.held_out is None else study.held_out.judges,
        warning=None if study.held_out is None else study.held_out.warning,
    )


def _curve(study: StudyHistory) -> Floats:
    trials = study.compared
    counts = np.arange(1, len(trials) + 1, dtype=np.float64)
    best = np.fmin.accumulate(trials["loss"])  # which leaves NaN out
    columns = (counts, np.cumsum(trials["images"]), np.cumsum(trials["seconds"]), best)
    return np.asarray(np.column_stack(columns)[~np.isnan(trials["loss"])])


@dataclasses.dataclass(frozen=True)
class OptimizerSummary:
    """One optimizer over its seeds; a spread is the sample standard deviation, ``None`` for a single seed.

    ``below_ema`` is the mean held-out loss relative to EMA*'s, minus one: -0.6 is 60 % below it. ``cross_check`` is the
    metric in features that the loss does not look at; ``held_out_images`` are the different numbers of images that
    held-out losses are of.
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
    cross_check: tuple[float, float | None] | None = None
    held_out_images: tuple[int, ...] = ()


def over_seeds(studies: Sequence[StudySummary]) -> list[OptimizerSummary]:
    """Mean and spread of each optimizer, the best held-out (else searched) first."""
    ema = best_ema(studies)
    grouped: dict[str, list[StudySummary]] = {}
    for study in studies:
        grouped.setdefault(study.optimizer, []).append(study)
    rows = [_over_seeds(group, ema) for group in grouped.values()]
    return sorted(rows, key=lambda row: _rank(row.held_out) + _rank(row.searched))


def _rank(value: tuple[float, float | None] | None) -> tuple[float]:
    return (float("inf") if value is None else value[0],)


def different_samples(studies: Sequence[StudySummary]) -> str | None:
    """A line where held-out losses are of different numbers of images or groups of noise, and so do not compare."""
    samples = {study.sample for study in studies if study.sample is not None and study.held_out is not None}
    if len(samples) < 2:
        return None
    return (
        "held-out losses are of different numbers of images or groups of noise and do not compare: "
        "lcsc evaluate each STUDY with the same --images and --groups, and --keep"
    )


def comparison_rows(studies: Sequence[StudySummary]) -> list[dict[str, Any]]:
    """What ``lcsc compare --format json`` prints: a row of each study, with the warnings that concern it."""
    differ = different_samples(studies)
    rows = []
    for study in studies:
        warnings = (None if study.held_out is None else differ, study.warning)
        rows.append({**study.as_row(), "warnings": [warning for warning in warnings if warning is not None]})
    return rows


def _ema_beside(study: StudySummary, ema: StudySummary | None) -> float | None:
    if study.ema_beside is not None:
        return study.ema_beside
    return ema.held_out if ema is not None and ema.sample == study.sample else None


def _over_seeds(group: Sequence[StudySummary], ema: StudySummary | None) -> OptimizerSummary:
    measured = [study for study in group if study.held_out is not None]
    beside = [_ema_beside(study, ema) for study in measured]
    ema_mean = None if None in beside else mean_and_spread(beside)
    held_out = mean_and_spread([study.held_out for study in group])
    return OptimizerSummary(
        optimizer=group[0].optimizer,
        label=group[0].label,
        seeds=len(group),
        searched=mean_and_spread([study.searched for study in group]),
        held_out=held_out,
        evaluations=statistics.fmean(study.evaluations for study in group),
        images=statistics.fmean(study.images for study in group),
        seconds=statistics.fmean(study.seconds for study in group),
        below_ema=None if held_out is None or ema_mean is None else relative(held_out[0], ema_mean[0]),
        cross_check=mean_and_spread(
            [None if study.cross_check is None else study.cross_check.value for study in group]
        ),
        held_out_images=tuple(sorted({images for study in group if (images := study.held_out_images) is not None})),
    )


def cross_check_metric(studies: Sequence[StudySummary]) -> str | None:
    """What the cross-check of an experiment is called; ``None`` where none was measured."""
    names = {study.cross_check.metric for study in studies if study.cross_check is not None}
    return min(names) if len(names) == 1 else "cross-check" if names else None


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
        Its number, its coefficients ``[K]`` and its user attributes with ``loss``.

    Raises:
        StudyStoreError: when there is no such complete trial.
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
    return number, coefficients, {**trial.user_attrs, "loss": trial.value}
