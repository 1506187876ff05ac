"""The shape of found coefficients, and their movement during a search, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lcsc_opt.coefficients.profiles import effective_count, sum_abs
from lcsc_opt.database.history import Floats, StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.curves import improvements

MOST_IMPROVEMENTS = 60  # rows of the heatmap
MOST_COLUMNS = 250  # of the heatmap
IRREGULAR = 1.01  # densities are drawn if the longest interval between checkpoints over the shortest exceeds this


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """Coefficients over training steps (Liu et al. 2024, Fig. 5, 7, 8).

    Attributes:
        study: the study whose answer has these coefficients.
        optimizer: its name.
        label: its name in legends.
        trial: the number of the trial.
        loss: the held-out loss if known, else that of the search.
        held_out: whether ``loss`` is held out.
        steps: ``[K]`` training steps.
        coefficients: ``[K]``.
        heights: ``[K]``, drawn: the coefficients, or coefficients per step if checkpoints are not equally far apart.
        density: whether ``heights`` are per training step.
        sum_abs: Σ|a|.
        effective: the effective number of checkpoints.
        negative: the share of Σ|a| that is negative.
    """

    study: str
    optimizer: str
    label: str
    trial: int
    loss: float | None
    held_out: bool
    steps: Floats
    coefficients: Floats
    heights: Floats
    density: bool
    sum_abs: float
    effective: float
    negative: float


def profile_of(reader: HistoryReader, study: StudyHistory) -> Profile | None:
    """The answer of a study; ``None`` before it has a complete trial."""
    if study.chosen is None:
        return None
    coefficients = reader.coefficients(study, [study.chosen])[0]
    steps = np.array(study.steps, dtype=np.float64)
    heights, density = as_heights(coefficients, steps)
    held_out = None if study.held_out is None else study.held_out.loss
    return Profile(
        study=study.study,
        optimizer=study.optimizer,
        label=study.label,
        trial=study.chosen,
        loss=study.searched if held_out is None else held_out,
        held_out=held_out is not None,
        steps=steps,
        coefficients=coefficients,
        heights=heights,
        density=density,
        sum_abs=sum_abs(coefficients),
        effective=effective_count(coefficients),
        negative=negative_share(coefficients),
    )


def as_heights(coefficients: Floats, steps: Floats) -> tuple[Floats, bool]:
    """``[K]``, the heights that a profile draws, and whether they are a density.

    A checkpoint stands for the steps since the checkpoint before it. If these intervals differ, each coefficient is
    divided by its interval. The first checkpoint has no such interval; its coefficient is divided by the next one.
    """
    intervals = np.diff(steps)
    if len(intervals) == 0 or intervals.max() <= IRREGULAR * intervals.min():
        return coefficients, False
    return coefficients / np.concatenate([intervals[:1], intervals]), True


def negative_share(coefficients: Floats) -> float:
    """The share of Σ|a| that is negative, from 0 to below 1/2 for coefficients that sum to one."""
    total = float(np.abs(coefficients).sum())
    return float(-coefficients[coefficients < 0].sum()) / total if total else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Movement:
    """How the best coefficients moved: a row for each improvement that is shown, in the order of the search.

    Attributes:
        trials: ``[m]``, numbers of the trials.
        losses: ``[m]``, their losses.
        steps: ``[columns]``, training step of the last checkpoint in each column.
        values: ``[m, columns]`` coefficients; for each column the largest in magnitude of its checkpoints.
        width: checkpoints in a column.
        improvements: how many there were; more than ``m`` if not all are shown.
    """

    trials: Floats
    losses: Floats
    steps: Floats
    values: Floats
    width: int
    improvements: int


def improved_trials(study: StudyHistory) -> list[int]:
    """The numbers of the trials that were better than all before them, in the order of tells."""
    finished = study.compared
    return [int(number) for number in finished["number"][improvements(finished["loss"])]]


def movement_of(reader: HistoryReader, study: StudyHistory, *, most: int = MOST_IMPROVEMENTS) -> Movement:
    """The coefficients of the improvements. Of many, some are chosen evenly, with the first and the last."""
    improved = improved_trials(study)
    shown = _evenly(improved, most)
    coefficients = reader.coefficients(study, shown)
    width = -(-len(study.steps) // MOST_COLUMNS) if study.steps else 1
    starts = np.arange(0, len(study.steps), width)
    losses: dict[int, float] = dict(zip(study.trials["number"].tolist(), study.trials["loss"].tolist(), strict=True))
    return Movement(
        trials=np.array(shown, dtype=np.float64),
        losses=np.array([losses[number] for number in shown]),
        steps=np.array([study.steps[start : start + width][-1] for start in starts.tolist()], dtype=np.float64),
        values=_largest(coefficients, starts) if shown else np.zeros((0, len(starts))),
        width=width,
        improvements=len(improved),
    )


def _evenly(numbers: Sequence[int], most: int) -> list[int]:
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[i] for i in np.linspace(0, len(numbers) - 1, most).round().astype(int)]


def _largest(coefficients: Floats, starts: np.ndarray) -> Floats:
    """``[m, K]`` → ``[m, columns]``: of each column's coefficients the one that is largest in magnitude."""
    high, low = np.maximum.reduceat(coefficients, starts, axis=1), np.minimum.reduceat(coefficients, starts, axis=1)
    return np.where(high >= -low, high, low)


@dataclasses.dataclass(frozen=True, eq=False)
class Shape:
    """The shape of the best coefficients during the search, ``[m]`` each: at each improvement, and at the end.

    ``evaluations`` is how many were made until then, ``sum_abs`` is Σ|a|, ``effective`` is the effective number of
    checkpoints, and ``negative`` is the share of Σ|a| that is negative.
    """

    evaluations: Floats
    trials: Floats
    sum_abs: Floats
    effective: Floats
    negative: Floats


def shape_of(reader: HistoryReader, study: StudyHistory) -> Shape:
    """From ``sum_abs`` and ``effective`` as stored. Inherited trials lack them; theirs come from the coefficients."""
    finished = study.compared
    place = improvements(finished["loss"])
    numbers = finished["number"][place].tolist()
    stored = reader.parameters(study, numbers)
    unknown = [i for i in range(len(numbers)) if np.isnan(stored["sum_abs"][i])]
    if unknown:
        for i, row in zip(unknown, reader.coefficients(study, [numbers[i] for i in unknown]), strict=True):
            stored["sum_abs"][i], stored["effective"][i] = sum_abs(row), effective_count(row)
    shown = np.arange(len(numbers) + 1).clip(max=len(numbers) - 1) if numbers else np.arange(0)
    total = stored["sum_abs"][shown]
    return Shape(
        evaluations=np.append(place + 1.0, float(len(finished)))[: len(shown)],
        trials=np.array(numbers, dtype=np.float64)[shown],
        sum_abs=total,
        effective=stored["effective"][shown],
        negative=(total - 1) / (2 * total),  # since coefficients sum to one
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Distances:
    """The distances between the answers of studies: ``matrix [n, n]`` holds the L2 norms of their differences."""

    labels: tuple[str, ...]
    matrix: Floats


def distances_of(reader: HistoryReader, studies: Sequence[StudyHistory]) -> Distances:
    """Distances between the answers of all studies with the first one's checkpoints, sorted by optimizer."""
    optimizers = list(dict.fromkeys(study.optimizer for study in studies))
    ordered = sorted(studies, key=lambda study: optimizers.index(study.optimizer))
    answered = [study for study in ordered if study.chosen is not None]
    answered = [study for study in answered if study.steps == answered[0].steps]
    rows = [reader.coefficients(study, [study.chosen])[0] for study in answered if study.chosen is not None]
    found = np.stack(rows) if rows else np.zeros((0, 0))
    matrix = np.linalg.norm(found[:, None] - found[None], axis=-1) if rows else np.zeros((0, 0))
    return Distances(tuple(f"{study.label}/{study.seed}" for study in answered), matrix)
