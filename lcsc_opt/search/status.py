"""The state of a stored study, and how long the rest of it takes, without loading its objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from optuna.storages import RDBStorage

from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.names import split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.optimizers import needs_gradient
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
    stored = study.attributes
    ended = stored.get("search_ended")
    if ended is None:
        return False
    if ended["exhausted"]:
        return True
    budget = plan.spec.budget
    if budget.evaluations is not None:
        return bool(ended["evaluations"] >= budget.evaluations)
    return bool(stored["budget"].get("images") and stored["budget"]["images"] >= budget.total)


def is_finished(study: StoredStudy, plan: StudyPlan) -> bool:
    """Whether nothing is left to do for a plan."""
    stored = study.attributes
    reported = plan.spec.held_out is None or stored.get("held_out") is not None or stored.get("holds_out") is False
    return reported and search_ended(study, plan)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is left of a plan.

    Attributes:
        plan: of the study.
        evaluations: how many are stored.
        seconds: of what is left, on one worker; ``None`` before the experiment has comparable evaluations.
    """

    plan: StudyPlan
    evaluations: int
    seconds: float | None


def estimates(plans: Sequence[StudyPlan], storage: RDBStorage) -> list[Estimate]:
    """What is left of each plan, from the seconds of the experiment's stored evaluations."""
    reader = HistoryReader(storage)
    stored = {study.study: study for study in reader.read_studies(reader.searches())}
    made = []
    for plan in plans:
        study = stored.get(plan.name)
        ended = study is not None and search_ended(StoredStudy.open(storage, plan.name), plan)
        seconds = _seconds_left(plan, study, [*stored.values()], ended=ended)
        made.append(Estimate(plan, 0 if study is None else study.evaluations, seconds))
    return made


def _seconds_left(
    plan: StudyPlan, study: StudyHistory | None, stored: Sequence[StudyHistory], *, ended: bool
) -> float | None:
    """Of the search and the report: the best trials again, and the chosen one.

    An evaluation takes as long as in studies of the same optimizer, else in all that follow no gradient either.
    """
    timed = [known for known in stored if split_name(known.study)[0] == plan.spec.name and known.seconds]
    same = [known for known in timed if known.optimizer == plan.optimizer.name]
    timed = same if same or needs_gradient(plan.optimizer) else timed
    if not (count := sum(known.evaluations for known in timed)):
        return None
    images, budget, held_out = sum(known.images for known in timed) / count, plan.spec.budget, plan.spec.held_out
    left: float = 0
    if budget.images is not None and images:
        left = max(budget.images - (0 if study is None else study.images), 0) / images
    else:
        left = max(budget.total - (0 if study is None else study.evaluations), 0)
    if ended:
        left = 0
    if held_out is not None and (study is None or study.held_out is None):
        left += (held_out.top + 1) * (held_out.images / images if images else 1)
    return left * sum(known.seconds for known in timed) / count
