"""A sweep as one table: the results of each point, with the values of its varied settings; plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lcsc_opt.base.sweep import split_point
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.ranking import comparison_rows


def sweep_points(reader: HistoryReader, name: str) -> dict[str, tuple[StudyHistory, ...]]:
    """Experiment → its studies, for the points of a sweep in the order in which they were begun.

    Args:
        reader: of the database.
        name: of the sweep, or of one of its points.

    Returns:
        The points; empty if no experiment of this name varies anything.
    """
    sweep, known = split_point(name)[0], [(other, *split_point(other)) for other in reader.experiments()]
    return {experiment: reader.read(experiment) for experiment, of, varied in known if of == sweep and varied}


def varied_keys(points: Mapping[str, Sequence[StudyHistory]]) -> list[str]:
    """The short names of all keys that the points vary, in the order in which they first appear."""
    return list(dict.fromkeys(key for experiment in points for key in split_point(experiment)[1]))


def sweep_rows(points: Mapping[str, Sequence[StudyHistory]]) -> list[dict[str, Any]]:
    """The rows of ``lcsc compare --format json`` for a sweep: one for each study, with the values in ``varied``."""
    return [
        {**row, "varied": split_point(experiment)[1]}
        for experiment, studies in points.items()
        for row in comparison_rows(studies)
    ]
