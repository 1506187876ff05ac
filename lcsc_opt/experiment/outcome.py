"""What became of a search that had finished before this run, in one line for people."""

from __future__ import annotations

import datetime

from lcsc_opt.base.study_spec import StudySpec
from lcsc_opt.database.opened import Database
from lcsc_opt.database.reader import HistoryReader


def outcome_of_finished(database: Database, spec: StudySpec) -> str:
    """The result of a search that had finished, and from when it is."""
    study = HistoryReader(database.existing()).read_study(spec.name)
    ended = database.contents.studies[spec.name]["search_ended"]
    ended_at = datetime.datetime.fromtimestamp(ended["at"])  # so that nobody takes the result for a new one
    best = "no comparable trial" if study.searched is None else f"best {study.searched:.4g}"
    line = f"finished already, {ended_at:%Y-%m-%d %H:%M}; {best} after {study.evaluations} evaluations"
    if ended.get("how"):
        line += f"; {ended['how']}"
    return line
