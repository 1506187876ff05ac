"""What the studies of one experiment found, and what it cost them: plain data for tables, figures and programs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.coefficients import effective_count, sum_abs
from lcsc_opt.errors import StudyStoreError
from lcsc_opt.study_spec import near_miss
from lcsc_opt.study_store import StoredStudy, study_names

BASELINES = {"EMAGrid": "EMA*", "PowerEMAGrid": "power-EMA*"}
"""What the best point of a grid is called in the paper's tables."""

Floats = npt.NDArray[np.float64]


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
        curve: ``[n, 4]`` evaluations, images, seconds, best loss so far, a row for each complete trial.
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

    @property
    def label(self) -> str:
        """The optimizer as tables and legends call it."""
        return BASELINES.get(self.optimizer, self.optimizer)

    def as_row(self) -> dict[str, Any]:
        """What ``lcsc compare --format json`` prints of a study."""
        names = (
            "study",
            "optimizer",
            "seed",
            "state",
            "searched",
            "held_out",
            "evaluations",
            "images",
            "seconds",
        )
        return {name: getattr(self, name) for name in names}


def summarize(study: StoredStudy) -> StudySummary:
    """Read one study.

    Raises:
        StudyStoreError: when its name is not ``experiment/optimizer/seed``.
    """
    attributes, trials = study.attributes, study.trials()
    _, optimizer, seed = split_name(study.name)
    finished = [trial for trial in trials if trial.state.is_finished()]
    curve = _curve(finished)
    held_out = attributes.get("held_out") or {}
    best = _chosen(finished, held_out.get("trial"))
    return StudySummary(
        study=study.name,
        optimizer=optimizer,
        seed=seed,
        state="finished" if attributes.get("search_ended") else "unfinished" if trials else "empty",
        budget={unit: n for unit, n in (attributes.get("budget") or {}).items() if n is not None},
        searched=float(curve[-1, 3]) if len(curve) else None,
        held_out=held_out.get("loss"),
        evaluations=len(finished),
        failures=sum(trial.state == TrialState.FAIL for trial in finished),
        images=int(sum(_cost(trial, "images") for trial in finished)),
        seconds=round(sum(_cost(trial, "seconds") for trial in finished), 3),
        steps=tuple(attributes.get("steps", ())),
        best_coefficients=None if best is None else np.array(best.user_attrs["coefficients"]),
        best_trial=None if best is None else best.number,
        metric="loss" if best is None else _metric(best),
        curve=curve,
    )


def split_name(study: str) -> tuple[str, str, int]:
    """``digits/LCSC/0`` → experiment, optimizer, seed.

    Raises:
        StudyStoreError: when it is not of that form.
    """
    parts = study.rsplit("/", 2)
    if len(parts) != 3 or not parts[2].isdigit():
        raise StudyStoreError(f"{study}: not a study of lcsc_opt; their names are experiment/optimizer/seed")
    return parts[0], parts[1], int(parts[2])


def is_ours(study: str) -> bool:
    """Whether a study's name has our form."""
    parts = study.rsplit("/", 2)
    return len(parts) == 3 and parts[2].isdigit()


def _cost(trial: FrozenTrial, name: str) -> float:
    return float(trial.user_attrs.get("cost", {}).get(name, 0))


def _metric(trial: FrozenTrial) -> str:
    metrics = trial.user_attrs.get("metrics", {})
    return next((name.upper() for name, value in metrics.items() if value == trial.value), "loss")


def _curve(finished: Sequence[FrozenTrial]) -> Floats:
    rows, images, seconds, best = [], 0.0, 0.0, float("inf")
    for count, trial in enumerate(finished, start=1):
        images, seconds = images + _cost(trial, "images"), seconds + _cost(trial, "seconds")
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            best = min(best, trial.value)
            rows.append((count, images, seconds, best))
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _chosen(finished: Sequence[FrozenTrial], number: int | None) -> FrozenTrial | None:
    complete = [trial for trial in finished if trial.state == TrialState.COMPLETE and trial.value is not None]
    for trial in complete:
        if trial.number == number:
            return trial
    return min(complete, key=lambda trial: (trial.value, trial.number), default=None)


def summaries(storage: RDBStorage, experiment: str) -> list[StudySummary]:
    """Every study of an experiment, in the order in which they were created.

    Raises:
        StudyStoreError: when there is none, naming the experiments that there are.
    """
    names = [name for name in study_names(storage) if is_ours(name)]
    known = sorted({split_name(name)[0] for name in names})
    if experiment not in known:
        guess = near_miss(experiment, known)
        raise StudyStoreError(
            f"{experiment}: no such experiment{guess}; the database holds: {', '.join(known) or 'none'}"
        )
    chosen = [name for name in names if split_name(name)[0] == experiment]
    return [summarize(StoredStudy.open(storage, name)) for name in chosen]


def best_ema(studies: Sequence[StudySummary]) -> StudySummary | None:
    """EMA*: of the finished EMA grids the one with the lowest held-out loss, else with the lowest searched one."""
    grids = [study for study in studies if study.optimizer == "EMAGrid" and study.searched is not None]
    return min(grids, key=lambda study: (_or_infinite(study.held_out), study.searched), default=None)


def _or_infinite(value: float | None) -> float:
    return float("inf") if value is None else value


@dataclasses.dataclass(frozen=True)
class OptimizerSummary:
    """One optimizer over its seeds; a spread is the sample standard deviation, ``None`` for a single seed.

    ``below_ema`` is the mean held-out loss relative to EMA*'s, minus one: -0.6 is 60 % below it.
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


def over_seeds(studies: Sequence[StudySummary]) -> list[OptimizerSummary]:
    """Mean and spread of each optimizer, the best held-out (else searched) first."""
    ema = best_ema(studies)
    grouped: dict[str, list[StudySummary]] = {}
    for study in studies:
        grouped.setdefault(study.optimizer, []).append(study)
    rows = [_over_seeds(group, None if ema is None else ema.held_out) for group in grouped.values()]
    return sorted(rows, key=lambda row: _rank(row.held_out) + _rank(row.searched))


def _rank(value: tuple[float, float | None] | None) -> tuple[float]:
    return (float("inf") if value is None else value[0],)


def _over_seeds(group: Sequence[StudySummary], ema: float | None) -> OptimizerSummary:
    held_out = _mean_and_spread([study.held_out for study in group])
    return OptimizerSummary(
        optimizer=group[0].optimizer,
        label=group[0].label,
        seeds=len(group),
        searched=_mean_and_spread([study.searched for study in group]),
        held_out=held_out,
        evaluations=statistics.fmean(study.evaluations for study in group),
        images=statistics.fmean(study.images for study in group),
        seconds=statistics.fmean(study.seconds for study in group),
        below_ema=None if held_out is None or not ema else held_out[0] / ema - 1,
    )


def _mean_and_spread(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def mean_curve(studies: Sequence[StudySummary], axis: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Best so far of one optimizer over its seeds, on a common axis.

    Args:
        studies: of one optimizer, with at least one complete trial each.
        axis: column of the curve: 0 evaluations, 1 images, 2 seconds.

    Returns:
        Positions, mean, lowest and highest, ``[n]`` each; from where every seed has a value to where every one has.
    """
    start = max(study.curve[0, axis] for study in studies)
    end = min(study.curve[-1, axis] for study in studies)
    positions = np.unique(np.concatenate([study.curve[:, axis] for study in studies]))
    positions = positions[(positions >= start) & (positions <= max(start, end))]
    at = [np.searchsorted(study.curve[:, axis], positions, side="right") - 1 for study in studies]
    values = np.stack([study.curve[index, 3] for study, index in zip(studies, at, strict=True)])
    return positions, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def describe_coefficients(coefficients: Floats, steps: Sequence[int]) -> dict[str, float]:
    """A few numbers that say what coefficients look like.

    ``sum_abs`` is Σ|a|, ``negative`` the share of it that is negative, ``effective`` the number of checkpoints that
    matter, ``largest`` the largest in magnitude and ``largest_step`` the step it belongs to.
    """
    magnitude = np.abs(coefficients)
    largest = int(magnitude.argmax())
    return {
        "sum_abs": sum_abs(coefficients),
        "negative": float(-coefficients[coefficients < 0].sum() / magnitude.sum()),
        "effective": effective_count(coefficients),
        "largest": float(coefficients[largest]),
        "largest_step": int(steps[largest]),
    }
