"""How long a run takes: the seconds of an evaluation, times what is left of the budget, and the held-out report.

The seconds are those of the experiment's stored evaluations. Without one, an evaluation is timed, on few images where
that takes long, and stored nowhere.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import TakesLongError
from lcsc_opt.base.progress import nothing_long
from lcsc_opt.base.records import Candidate
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.names import split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation import Failure, evaluate_safely
from lcsc_opt.objective.loading import checks_settings
from lcsc_opt.optimizers import needs_gradient
from lcsc_opt.search.endings import search_ended
from lcsc_opt.search.experiment import Experiment
from lcsc_opt.search.plan import StudyPlan

FIRST_IMAGES, ENOUGH_SECONDS = 8, 2.0  # the images of a timed evaluation are doubled until it takes so long
SLOW_FIRST = ("keep", "compile")  # settings whose first evaluation takes much longer than the others


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is left of a plan.

    Attributes:
        plan: of the study.
        evaluations: how many are stored.
        seconds: of what is left, on one worker; ``None`` where not known.
        reason: what the seconds are known from, or why they are not known.
    """

    plan: StudyPlan
    evaluations: int
    seconds: float | None
    reason: str


@dataclasses.dataclass(frozen=True)
class _Timed:
    """The usual evaluation of a search: its seconds, ``None`` if not known, its images, and how they are known."""

    seconds: float | None
    images: float
    reason: str


def estimates(
    found: Sequence[tuple[Experiment, StudyPlan]], storage: RDBStorage, *, accept_code: bool
) -> list[Estimate]:
    """What is left of each plan. The first experiment's objective is loaded for this if that does not take long.

    Raises:
        LcscError: then a plan of this experiment could not be searched.
    """
    reader = HistoryReader(storage)
    stored = {study.study: study for study in reader.read_studies(reader.searches())}
    now: dict[bool, _Timed] = {}
    made = []
    for experiment, plan in found:
        gradient, study = needs_gradient(plan.optimizer), stored.get(plan.name)
        timed = _stored(plan, [*stored.values()])
        if timed is None and experiment is not found[0][0]:
            timed = _Timed(None, 0, "only the first point of a sweep is timed")
        elif timed is None:
            if gradient not in now:
                now[gradient] = _time(experiment, plan, accept_code=accept_code)
            timed = now[gradient]
        ended = study is not None and search_ended(StoredStudy.open(storage, plan.name), plan)
        left = (0 if ended else _of_search(plan, study, timed)) + _of_report(plan, study, timed)
        seconds = None if timed.seconds is None else left * timed.seconds
        made.append(Estimate(plan, 0 if study is None else study.evaluations, seconds, timed.reason))
    return made


def _of_search(plan: StudyPlan, study: StudyHistory | None, timed: _Timed) -> float:
    """Evaluations that are left of the budget."""
    budget = plan.spec.budget
    if budget.images is not None and timed.images:
        return max(budget.images - (0 if study is None else study.images), 0) / timed.images
    return max(budget.total - (0 if study is None else study.evaluations), 0)


def _of_report(plan: StudyPlan, study: StudyHistory | None, timed: _Timed) -> float:
    """Evaluations of the search that take as long as the report: the best trials again, and the chosen one."""
    held_out = plan.spec.held_out
    if held_out is None or (study is not None and study.held_out is not None):
        return 0
    return (held_out.top + 1) * (held_out.images / timed.images if timed.images else 1)


def _stored(plan: StudyPlan, stored: Sequence[StudyHistory]) -> _Timed | None:
    """From the studies of the experiment: of the same optimizer, else of all that follow no gradient either."""
    timed = [study for study in stored if split_name(study.study)[0] == plan.spec.name and study.seconds]
    same = [study for study in timed if study.optimizer == plan.optimizer.name]
    timed = same if same or needs_gradient(plan.optimizer) else timed
    count = sum(study.evaluations for study in timed)
    seconds, images = sum(study.seconds for study in timed), sum(study.images for study in timed)
    return _Timed(seconds / count, images / count, "from the experiment's stored evaluations") if count else None


def _time(experiment: Experiment, plan: StudyPlan, *, accept_code: bool) -> _Timed:
    """Evaluate where coefficients begin, if the objective is loaded quickly: as one is whose settings have a check."""
    spec = plan.spec.objective
    slow = plan.ray is not None or any(spec.settings.get(name) for name in SLOW_FIRST)
    if slow or not checks_settings(spec, beside=plan.directory):
        return _Timed(None, 0, "not measured here")
    try:
        with nothing_long():
            objective = experiment.objective
            experiment.check(plan, accept_code=accept_code)
    except TakesLongError as error:
        return _Timed(None, 0, f"not known before this is done: {error}")
    usual, images = objective.images_per_evaluation, min(FIRST_IMAGES, objective.images_per_evaluation)
    while True:
        begun = time.perf_counter()
        candidate = Candidate(default_origin(objective.steps), images=images or None)
        outcome = evaluate_safely(objective, candidate, gradient=needs_gradient(plan.optimizer))
        seconds = time.perf_counter() - begun
        if images == usual or seconds > ENOUGH_SECONDS:
            break
        images = min(2 * images, usual)
    if isinstance(outcome, Failure):
        return _Timed(None, 0, f"not known, since one fails: {outcome.reason}")
    if images < usual:
        once = outcome.cost.merge_seconds + outcome.cost.metric_seconds  # however many images
        seconds = once + (seconds - once) * usual / images
    return _Timed(seconds, usual, f"from one{f' of {images:,} images' if images else ''}, timed now")
