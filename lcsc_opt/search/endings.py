"""The state of a stored study, without loading its objective."""

from __future__ import annotations

from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.search.plan import StudyPlan


def outcome_of(study: StoredStudy) -> str:
    """The state or the result of a study, in one line for people."""
    found = HistoryReader(study.storage).read_study(study.name)
    searched = "no result on the search's noise" if found.searched is None else f"best {found.searched:.4g}"
    held_out = "" if found.held_out_loss is None else f", held-out {found.held_out_loss:.4g}"
    failed = f" ({len(found.failed)} failed: lcsc show {study.name})" if len(found.failed) else ""
    return f"{searched}{held_out} after {found.evaluations} evaluations{failed}"


def search_ended(study: StoredStudy, plan: StudyPlan) -> bool:
    """Whether the search has nothing left to do for the plan's budget. The held-out report does not count."""
    ended = study.attributes.get("search_ended")
    if ended is None:
        return False
    if ended["exhausted"]:
        return True
    budget = plan.spec.budget
    if budget.evaluations is not None:
        return bool(ended["evaluations"] >= budget.evaluations)
    return bool(budget.model_dump() == study.attributes["budget"])


def is_finished(study: StoredStudy, plan: StudyPlan) -> bool:
    """Whether nothing is left to do for a plan."""
    stored = study.attributes
    reported = plan.spec.held_out is None or stored.get("held_out") is not None or stored.get("holds_out") is False
    return reported and search_ended(study, plan)
