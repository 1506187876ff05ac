"""What a search has found, in one line for people."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence

from optuna.storages import RDBStorage

from lcsc_opt.base.study_spec import BudgetSpec
from lcsc_opt.database.history import as_known
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.experiment.finalists import name_of_search


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


HowToContinue = Callable[[str, str], str]
"""Name of a study, and a larger budget → what the user types or calls to go on with it."""


def command(study: str, budget: str) -> str:
    """What the user of a terminal types to go on."""
    quoted = f"'{budget}'" if " " in budget else budget
    return f"lcsc run {study} --budget {quoted}"


def same_call(study: str, budget: str) -> str:  # noqa: ARG001 - the call has all searches of the experiment
    """What goes on from Python."""
    return f"the same call with budget={_literal(budget)}"


def resumed_call(study: str, budget: str) -> str:  # noqa: ARG001 - the call has all searches of the experiment
    """What goes on from Python where functions cannot be compared with what they were."""
    return f"the same call with resume=True, budget={_literal(budget)}"


def repeated_call(study: str, budget: str) -> str:
    """What searches longer from Python where nothing is kept."""
    return f"{same_call(study, budget)}, from its beginning since storage=None keeps nothing,"


def what_goes_on(storage: RDBStorage, studies: Sequence[str], how_to_continue: HowToContinue = command) -> str:
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
        more = f"{2 * budget.total} s" if budget.seconds is not None else str(2 * budget.total)
        parts.append(
            f"{name_of_search(study)} was cut after {_evaluations(summary.evaluations)}: "
            f"{how_to_continue(study, more)} goes on (as much again, about {_duration(summary.cost.seconds)})"
        )
        if ended[study].get("stalled"):
            parts[-1] += ", and may bring little, since its last evaluations have not"
    return f"{'; '.join(parts)}."


def _evaluations(count: int) -> str:
    return "1 evaluation" if count == 1 else f"{count:,} evaluations"


def _literal(budget: str) -> str:
    """A budget as an argument in Python."""
    return repr(budget) if " " in budget else budget


def _duration(seconds: float) -> str:
    """A time in its largest unit."""
    if seconds >= 5400:
        return f"{seconds / 3600:.2g} h"
    if seconds >= 90:
        return f"{seconds / 60:.2g} min"
    return f"{max(seconds, 1):.2g} s"
