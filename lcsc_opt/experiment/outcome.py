"""What became of a search that had finished before this run, in one line for people."""

from __future__ import annotations

import datetime

from lcsc_opt.base.study_spec import StudySpec
from lcsc_opt.database.opened import Database
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.states import Attributes


def outcome_of_finished(database: Database, spec: StudySpec) -> str:
    """The result of a search that had finished, and from when it is."""
    study = HistoryReader(database.existing()).read_study(spec.name)
    stored = database.contents.studies[spec.name]
    best = "no comparable trial" if study.searched is None else f"best {study.searched:.4g}"
    line = f"{finished_already(stored)}; {best} after {study.evaluations} evaluations"
    how = stored["search_ended"].get("how")
    if how:
        line += f"; {how}"
    return line


def finished_already(stored: Attributes) -> str:
    """``finished already, 2026-11-27 08:41``: that a result is not new, and from when it is."""
    ended_at = datetime.datetime.fromtimestamp(stored["search_ended"]["at"])
    return f"finished already, {ended_at:%Y-%m-%d %H:%M}"
