"""A sweep as one table: the results of each point, with the values of its varied settings; plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lcsc_opt.base.sweep import split_point
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.summary import OptimizerSummary, comparison_rows, over_seeds


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a sweep.

    Attributes:
        experiment: its name, ``samples,images=200``.
        varied: short name of a varied key → its value here.
        studies: of this experiment.
        optimizers: their results over seeds, the best first.
    """

    experiment: str
    varied: Mapping[str, str]
    studies: tuple[StudyHistory, ...]
    optimizers: tuple[OptimizerSummary, ...]


def is_sweep(reader: HistoryReader, name: str) -> bool:
    """Whether ``name`` is the common part of a sweep's points, and no experiment itself."""
    known = reader.experiments()
    return name not in known and any(split_point(experiment)[0] == name for experiment in known)


def points_of(reader: HistoryReader, name: str) -> list[Point]:
    """The points of a sweep, in the order in which they were begun.

    Args:
        reader: of the database.
        name: of the sweep, or of one of its points.

    Returns:
        The points; empty if no experiment of this name varies anything.
    """
    return list(_points(reader, split_point(name)[0]))


def _points(reader: HistoryReader, sweep: str) -> Iterator[Point]:
    for experiment in reader.experiments():
        of, varied = split_point(experiment)
        if of == sweep and varied:
            studies = reader.read(experiment)
            yield Point(experiment, varied, studies, tuple(over_seeds(studies)))


def varied_keys(points: Sequence[Point]) -> list[str]:
    """The short names of all keys that the points vary, in the order in which they first appear."""
    return list(dict.fromkeys(key for point in points for key in point.varied))


def sweep_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The rows of ``lcsc compare --format json`` for a sweep: one for each study, with the values in ``varied``."""
    return [{**row, "varied": dict(point.varied)} for point in points for row in comparison_rows(point.studies)]
