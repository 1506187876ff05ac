"""What a search has found, in one line for people."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from optuna.storages import RDBStorage

from lcsc_opt.base.study_spec import BudgetSpec
from lcsc_opt.database.history import as_known
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.experiment.finalists import name_of_search
from lcsc_opt.experiment.timing import about


def outcome_of(study: StoredStudy) -> str:
    """``best 12.3 after 100 evaluations; cut by its budget``: the result of a search."""
    summary = study.summary
    line = "no comparable trial"
    best = as_known(summary.loss, study.sign)
    if best is not None:
        line = f"best {best:.4g}"
    line += f" after {_evaluations(summary.evaluations)}"
    if summary.failed:
        line += f" ({summary.failed} failed: lcsc show {study.name})"
    ended = study.attributes.get("search_ended") or {}  # none if a callback stopped it
    if ended.get("how"):
        line += f"; {ended['how']}"
    return line


def outcome_of_finished(study: StoredStudy, *, reads_by_itself: bool = False) -> str:
    """The same of a search that had ended before this run, and when, so that nobody takes the result for a new one.

    ``reads_by_itself`` is for an objective whose data nobody has compared in this run.
    """
    ended_at = datetime.datetime.fromtimestamp(study.attributes["search_ended"]["at"])
    of_then = ", with the data of then" if reads_by_itself else ""
    return f"finished already, {ended_at:%Y-%m-%d %H:%M}{of_then}; {outcome_of(study)}"


COMMAND = "lcsc run {study} --budget {budget}"
"""What the user of a terminal types to go on with a search, and a larger budget."""

SAME_CALL = "the same call with budget={budget}"
"""What goes on from Python, with all searches of the experiment."""

RESUMED_CALL = "the same call with resume=True, budget={budget}"
"""The same where functions cannot be compared with what they were."""

REPEATED_CALL = f"{SAME_CALL}, from its beginning since storage=None keeps nothing,"
"""The same where nothing is kept."""


def what_goes_on(storage: RDBStorage, studies: Sequence[str], how_to_continue: str = COMMAND) -> str:
    """Whether searches have ended by themselves or were cut, when, and what would go on, with its time.

    ``Every search has ended by itself.``; or ``LCSC was cut after 9 evaluations: lcsc run digits/LCSC/0 --budget 18``
    ``goes on (as much again, about 2 min).`` A search that a callback stopped says nothing.
    """
    stored = {study: StoredStudy.open(storage, study) for study in studies}
    attributes = {study: one.attributes for study, one in stored.items()}
    ended = {study: known["search_ended"] for study, known in attributes.items() if known.get("search_ended")}
    cut = [study for study, end in ended.items() if not end["exhausted"] and end.get("patience") is None]
    if not ended:
        return ""
    if not cut:
        return "Every search has ended by itself."
    parts = []
    for study in cut:
        summary = stored[study].summary
        budget = BudgetSpec(**attributes[study]["budget"])
        more = f"'{2 * budget.total} s'" if budget.seconds is not None else str(2 * budget.total)
        parts.append(
            f"{name_of_search(study)} was cut after {_evaluations(summary.evaluations)}: "
            f"{how_to_continue.format(study=study, budget=more)} goes on "
            f"(as much again, {about(summary.cost.seconds)})"
        )
        if ended[study].get("stalled"):
            parts[-1] += ", and may bring little, since its last evaluations have not"
    return f"{'; '.join(parts)}."


def _evaluations(count: int) -> str:
    return "1 evaluation" if count == 1 else f"{count:,} evaluations"
