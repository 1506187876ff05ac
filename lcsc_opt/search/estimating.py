"""How long a run takes: the seconds of the experiment's stored evaluations, times what is left of the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from optuna.storages import RDBStorage

from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.names import split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.optimizers import needs_gradient
from lcsc_opt.search.endings import search_ended
from lcsc_opt.search.plan import StudyPlan


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
    """What is left of each plan."""
    reader = HistoryReader(storage)
    stored = {study.study: study for study in reader.read_studies(reader.searches())}
    made = []
    for plan in plans:
        study, seconds = stored.get(plan.name), None
        if (timed := _timed(plan, [*stored.values()])) is not None:
            each, images = timed
            ended = study is not None and search_ended(StoredStudy.open(storage, plan.name), plan)
            seconds = each * ((0 if ended else _of_search(plan, study, images)) + _of_report(plan, study, images))
        made.append(Estimate(plan, 0 if study is None else study.evaluations, seconds))
    return made


def _timed(plan: StudyPlan, stored: Sequence[StudyHistory]) -> tuple[float, float] | None:
    """Seconds and images of an evaluation in studies of the same optimizer, else of all that follow no gradient."""
    timed = [study for study in stored if split_name(study.study)[0] == plan.spec.name and study.seconds]
    same = [study for study in timed if study.optimizer == plan.optimizer.name]
    timed = same if same or needs_gradient(plan.optimizer) else timed
    if not (count := sum(study.evaluations for study in timed)):
        return None
    return sum(study.seconds for study in timed) / count, sum(study.images for study in timed) / count


def _of_search(plan: StudyPlan, study: StudyHistory | None, images: float) -> float:
    """Evaluations that are left of the budget."""
    budget = plan.spec.budget
    if budget.images is not None and images:
        return max(budget.images - (0 if study is None else study.images), 0) / images
    return max(budget.total - (0 if study is None else study.evaluations), 0)


def _of_report(plan: StudyPlan, study: StudyHistory | None, images: float) -> float:
    """Evaluations of the search that take as long as the report: the best trials again, and the chosen one."""
    held_out = plan.spec.held_out
    if held_out is None or (study is not None and study.held_out is not None):
        return 0
    return (held_out.top + 1) * (held_out.images / images if images else 1)
