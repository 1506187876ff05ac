"""What a search has found, in one line for people."""

from __future__ import annotations

import datetime

from optuna.storages import RDBStorage

from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy


def outcome_of(storage: RDBStorage, study: str) -> str:
    """``best 12.3 after 100 evaluations; cut by its budget``: the result of a search."""
    standing = HistoryReader(storage).read_study(study)
    line = "no comparable trial"
    if standing.searched is not None:
        line = f"best {standing.searched:.4g}"
    line += f" after {standing.summary.evaluations} evaluations"
    if standing.summary.failed:
        line += f" ({standing.summary.failed} failed: lcsc show {study})"
    ended = StoredStudy.open(storage, study).attributes.get("search_ended") or {}  # none if a callback stopped it
    if ended.get("how"):
        line += f"; {ended['how']}"
    return line


def outcome_of_finished(storage: RDBStorage, study: str) -> str:
    """The same of a search that had ended before this run, and when, so that nobody takes the result for a new one."""
    ended = StoredStudy.open(storage, study).attributes["search_ended"]
    ended_at = datetime.datetime.fromtimestamp(ended["at"])
    return f"finished already, {ended_at:%Y-%m-%d %H:%M}; {outcome_of(storage, study)}"
