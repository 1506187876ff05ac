"""The best loss so far against its cost, over the seeds of each optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lcsc_opt.database.history import Floats, Standing
from lcsc_opt.database.names import label

AXES = {
    "evaluations": "evaluations",
    "images": "images sampled",
    "model_calls": "model calls",
    "seconds": "evaluation time, all workers together (s)",
}
"""What a search spends."""

MOST_POINTS = 1000  # of one curve; about the width of a screen in pixels


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
    """A step function that only falls: ``values [m]`` from ``positions [m]`` on; known up to ``end``."""

    positions: Floats
    values: Floats
    end: float

    def at(self, positions: Floats) -> Floats:
        """``[n]`` values, NaN before the first step."""
        values = np.concatenate([[np.nan], self.values])
        return np.asarray(values[np.searchsorted(self.positions, positions, side="right")])


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """One line of a comparison: the finished seeds of an optimizer, or one seed that is still searching.

    Attributes:
        optimizer: its name.
        seeds: the seeds that it is the mean of.
        finished: whether these searches are over.
        positions: ``[n]``, what was spent.
        mean: ``[n]``, the mean over the seeds of the best loss so far; a seed that has ended keeps its best.
        lowest: ``[n]``, the lowest of the seeds.
        highest: ``[n]``, the highest of the seeds.
    """

    optimizer: str
    seeds: tuple[int, ...]
    finished: bool
    positions: Floats
    mean: Floats
    lowest: Floats
    highest: Floats

    @property
    def label(self) -> str:
        """The name of the curve in legends."""
        name = label(self.optimizer)
        if not self.finished:
            return f"{name}, seed {self.seeds[0]}, unfinished"
        if len(self.seeds) > 1:
            return f"{name} ({len(self.seeds)} seeds)"
        return name


def default_axis(studies: Sequence[Standing]) -> str:
    """Images, if any were sampled, else evaluations: optimizers may ask for different numbers of images."""
    if any(study.summary.cost.images for study in studies):
        return "images"
    return "evaluations"


def curves(studies: Sequence[Standing], axis: str) -> list[Curve]:
    """The curves of an experiment over one of :data:`AXES`; optimizers in the order in which they were created."""
    groups: dict[str, list[Standing]] = {}
    for study in studies:
        if study.summary.best is not None:
            # an unfinished study has its own curve; its key has slashes, which names of optimizers have not
            key = study.optimizer if study.ended else study.study
            groups.setdefault(key, []).append(study)
    return [_curve(group, axis) for group in groups.values()]


def _curve(studies: Sequence[Standing], axis: str) -> Curve:
    """Best so far of one optimizer; each study has a complete trial, and all are finished, or there is only one."""
    step_functions = [best_so_far(study, axis) for study in studies]
    start = max(function.positions[0] for function in step_functions)  # before it, a seed has no loss for the mean
    ends = [function.end for function in step_functions]
    positions = np.unique(np.concatenate([*(function.positions for function in step_functions), ends]))
    positions = thinned(positions[positions >= start])
    values = np.stack([function.at(positions) for function in step_functions])
    values = studies[0].sign * values  # a maximized score is drawn as its user knows it
    return Curve(
        optimizer=studies[0].optimizer,
        seeds=tuple(study.seed for study in studies),
        finished=all(study.ended for study in studies),
        positions=positions,
        mean=values.mean(axis=0),
        lowest=values.min(axis=0),
        highest=values.max(axis=0),
    )


def best_so_far(study: Standing, axis: str) -> _Steps:
    """The points at which a study's best loss fell. Their cost includes trials whose losses do not compare."""
    summary = study.summary
    positions = [getattr(point, axis) for point in summary.improvements]
    losses = [point.loss for point in summary.improvements]
    end = summary.evaluations if axis == "evaluations" else getattr(summary.cost, axis)
    return _Steps(np.array(positions, dtype=np.float64), np.array(losses, dtype=np.float64), end=float(end))


def thinned(positions: npt.NDArray[Any], most: int = MOST_POINTS) -> npt.NDArray[Any]:
    """At most ``most`` of the positions, chosen evenly, with the first and the last."""
    if len(positions) <= most:
        return positions
    return np.asarray(positions[np.linspace(0, len(positions) - 1, most).round().astype(np.intp)])
