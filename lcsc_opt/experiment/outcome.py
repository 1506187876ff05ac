"""What a search has found, in one line for people."""

from __future__ import annotations

import datetime

from lcsc_opt.database.history import as_known
from lcsc_opt.database.store import StoredStudy


def outcome_of(study: StoredStudy) -> str:
    """``best 12.3 after 100 evaluations; cut by its budget``: the result of a search."""
    summary = study.summary
    line = "no comparable trial"
    best = as_known(summary.loss, study.sign)
    if best is not None:
        line = f"best {best:.4g}"
    line += f" after {summary.evaluations} evaluations"
    if summary.failed:
        line += f" ({summary.failed} failed: lcsc show {study.name})"
    ended = study.attributes.get("search_ended") or {}  # none if a callback stopped it
    if ended.get("how"):
        line += f"; {ended['how']}"
    return line


def outcome_of_finished(study: StoredStudy) -> str:
    """The same of a search that had ended before this run, and when, so that nobody takes the result for a new one."""
    ended_at = datetime.datetime.fromtimestamp(study.attributes["search_ended"]["at"])
    return f"finished already, {ended_at:%Y-%m-%d %H:%M}; {outcome_of(study)}"
