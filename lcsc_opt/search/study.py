"""One study: opened once, which reads, compares and decides everything; then it searches and reports.

::

    with open_study(plan, source) as study:
        study.search()  # ask → write → evaluate → write → tell
        study.report()  # the answer on held-out noise
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nevergrad.optimization.base import Optimizer
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError, ObjectiveError
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.reproducibility import describe_difference, environment
from lcsc_opt.base.study_file import RayWorkers, SpaceSpec
from lcsc_opt.coefficients.plane import LANDSCAPE
from lcsc_opt.database.names import BASELINES
from lcsc_opt.database.store import StoredStudy, study_names
from lcsc_opt.evaluation import (
    Evaluator,
    InProcessEvaluator,
    Outcome,
    Pipeline,
    ProcessEvaluator,
    SpreadEvaluator,
    WorkerPool,
    evaluate_safely,
    retrying,
)
from lcsc_opt.exports import attach_figures
from lcsc_opt.exports.recipe import packed_trajectory
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.objective.loading import check_objective, load_objective
from lcsc_opt.optimizers import OURS, build_optimizer
from lcsc_opt.search.compatibility import (
    accepted_changes,
    changes,
    check_siblings,
    name_identical_checkpoints,
    refuse_changes,
)
from lcsc_opt.search.held_out import HeldOutPlan, score_held_out
from lcsc_opt.search.plan import (
    Schedule,
    StudyPlan,
    build_space,
    check_gradient,
    check_space,
    checkpoints_of,
    schedule_of,
    stored_plan,
)
from lcsc_opt.search.runner import Search
from lcsc_opt.search.status import is_finished, outcome_of, reporting, search_ended


class ObjectiveSource:
    """Loads the objective of a plan when it is first needed. Plans with the same objective share one source.

    Args:
        storage: of the studies; the checkpoints are those of the experiment's first study.
        plan: one of the plans.
    """

    def __init__(self, storage: RDBStorage, plan: StudyPlan) -> None:
        self.storage, self._plan = storage, plan
        self.clusters_with_room: list[RayWorkers] = []
        self.checked_clusters: list[RayWorkers] = []

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective; loading it may train or read a model."""
        return self.load()

    @property
    def load(self) -> Callable[[], Objective]:
        """What loads the objective, here and in workers; picklable."""
        spec, beside = self._plan.spec.objective, self._plan.directory
        return functools.partial(load_objective, spec, beside=beside, checkpoints=self._checkpoints())

    @functools.cached_property
    def checked(self) -> tuple[dict[str, str], str | None]:
        """The objective's code, and why it has no gradient, as far as its settings tell; these are checked."""
        spec, beside = self._plan.spec.objective, self._plan.directory
        return check_objective(spec, beside=beside, checkpoints=self._checkpoints())

    def _checkpoints(self) -> KnownCheckpoints | None:
        return checkpoints_of(self.storage, self._plan.spec.name, self._plan.spec.objective)

    def forget(self) -> None:
        """Free the objective and its memory. It is loaded again when it is needed."""
        self.__dict__.pop("objective", None)


def objective_of(study: StoredStudy) -> Objective:
    """The objective of a stored study. Loading it may train or read a model."""
    return ObjectiveSource(study.storage, stored_plan(study)).objective


def rehearse(plan: StudyPlan, source: ObjectiveSource, *, accept_changes: bool = False) -> None:
    """Refuse what :func:`open_study` would refuse, as far as that is known without the objective; writes nothing.

    Raises:
        LcscError: as :func:`open_study`.
    """
    storage = source.storage
    if plan.name not in study_names(storage):
        check_siblings(storage, plan)
    else:
        study = StoredStudy.open(storage, plan.name)
        if is_finished(study, plan.continuing(study)):
            _say_changed(study, source)
            return
        code = {**study.attributes["fingerprint"]["code"], **source.checked[0]}
        refuse_changes(study, {"code": code, "environment": environment()}, accept=accept_changes)
    check_gradient(plan, source.checked[1])
    plan.environments()
    if plan.ray is not None and plan.ray not in source.clusters_with_room:
        from lcsc_opt.evaluation.ray import check_room

        check_room(plan.ray, plan.spec.objective)
        source.clusters_with_room.append(plan.ray)


def _say_changed(study: StoredStudy, source: ObjectiveSource) -> None:
    """Say of a finished study that its code is another one now: its results are of the old code."""
    with contextlib.suppress(LcscError):  # the code is gone: nobody takes the results for those of another code
        before = study.attributes["fingerprint"]
        if found := changes(before, {"code": {**before["code"], **source.checked[0]}}):
            notice(
                f"{study.name}: finished before this changed: {'; '.join(found)}. lcsc run FILE name=... searches anew"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class OpenStudy:
    """A study whose lock is held, with everything decided; :func:`open_study` makes it.

    Attributes:
        plan: its specification.
        stored: the study in the database.
        objective: what is searched.
        schedule: how many candidates are under way, and the budget.
        pool: the workers; ``None`` if this process evaluates.
    """

    plan: StudyPlan
    stored: StoredStudy
    objective: Objective
    schedule: Schedule
    pool: WorkerPool | None

    def search(self) -> None:
        """Search until the budget is spent. A search that has ended is left as it is."""
        if search_ended(self.stored, self.plan):
            return
        study, plan, schedule = self.stored, self.plan, self.schedule
        optimizer, before = self._optimizer(), study.attributes
        if before.get("parallelism") is None:
            study.set_attribute("parallelism", schedule.parallelism)
        if schedule.budget.model_dump() != before["budget"]:
            study.set_attribute("search_ended", None)  # first: a crash in between must leave work to do
            study.set_attribute("held_out", None)
            study.set_attribute("budget", schedule.budget.model_dump())
        with contextlib.closing(self._evaluator()) as evaluator:
            search = Search(
                study,
                optimizer,
                evaluator,
                budget=schedule.budget,
                first=plan.origin if plan.optimizer.name not in OURS or plan.optimizer.name == "LCSC" else None,
                images_per_evaluation=self.objective.images_per_evaluation,
                in_flight=schedule.in_flight,
                tells=plan.spec.tells,
                failures=plan.spec.failures,
                environment_change=describe_difference(before["fingerprint"]["environment"], environment()),
            )
            with reporting(search, study, self.pool, elastic=plan.ray is not None) as on_tell:
                search.run(on_tell)
        exhausted = getattr(optimizer, "finished", False)
        study.set_attribute("search_ended", {"evaluations": search.told, "exhausted": exhausted})

    def report(self) -> None:
        """Report on held-out noise as the study file asks, unless there is a report."""
        asked = self.plan.spec.held_out
        if asked is None or self.stored.attributes.get("held_out") is not None:
            return
        if nothing := self.objective.why_nothing_held_out():
            notice(f"{self.plan.spec.name}: nothing is held out: {nothing}")
        else:
            self.evaluate(HeldOutPlan(asked.images, asked.top))

    def evaluate(self, plan: HeldOutPlan) -> dict[str, Any]:
        """Choose among the best trials on selection noise, and report the chosen one on held-out noise.

        This is the last work of the workers.

        Raises:
            ObjectiveError: this objective has no held-out loss.
        """
        if nothing := self.objective.why_nothing_held_out():
            raise ObjectiveError(f"{self.stored.name}: nothing is held out, so nothing can be reported: {nothing}")
        if not self.objective.images_per_evaluation:
            plan = dataclasses.replace(plan, images=0)
        with self._one_by_one() as evaluate:
            report = score_held_out(self.stored, self.objective, plan, retrying(evaluate, self.plan.spec.failures))
        if self.pool is not None:
            self.pool.close()  # which frees the devices
        if plan.keep:
            attach_figures(self.stored.storage, self.stored, self.objective)
        return report

    def _optimizer(self) -> Optimizer:
        """A fresh optimizer. It plans with the study's first budget, even if the budget is raised later."""
        plan, schedule = self.plan, self.schedule
        affine = SpaceSpec()  # contains a grid's profiles exactly; another space may not reach them
        spec = affine if plan.optimizer.name in (*BASELINES, LANDSCAPE) else plan.spec.space
        space = build_space(spec, self.objective, origin=plan.origin)
        workers = 1 if schedule.spread_images else min(plan.workers, schedule.in_flight)
        optimizer = build_optimizer(plan.optimizer, space, budget=schedule.evaluations, workers=workers, seed=plan.seed)
        if (plan_budget := getattr(optimizer, "plan_budget", None)) is not None:
            images, budget = self.objective.images_per_evaluation, schedule.first_budget
            plan_budget(evaluations=budget.evaluations, images=budget.images, images_per_evaluation=images)
        return optimizer

    def _evaluator(self) -> Evaluator:
        in_flight = self.schedule.in_flight
        if self.pool is None:
            pipelined = in_flight > 1 and isinstance(self.objective, StagedObjective)
            return Pipeline(self.objective) if pipelined else InProcessEvaluator(self.objective)
        if self.schedule.spread_images:
            return SpreadEvaluator(self.objective, self.pool)
        # if stages overlap, each worker has two candidates; else fewer than two for each worker are in flight
        return ProcessEvaluator(self.pool, depth=2 if in_flight >= 2 * len(self.pool) else 1)

    @contextlib.contextmanager
    def _one_by_one(self) -> Iterator[Callable[[Candidate], Outcome]]:
        """Evaluates one candidate at a time, by all workers together if the objective allows it."""
        if self.pool is None or not isinstance(self.objective, StagedObjective):
            yield functools.partial(evaluate_safely, self.objective)
            return
        with contextlib.closing(SpreadEvaluator(self.objective, self.pool)) as evaluator:
            yield lambda candidate: evaluator.submit(candidate).result()


@contextlib.contextmanager
def open_study(
    plan: StudyPlan,
    source: ObjectiveSource,
    *,
    accept_changes: bool = False,
    retry_failed: bool = False,
) -> Iterator[OpenStudy]:
    """Create or open a study, compare it with what is there now, and hold its lock while this is open.

    Args:
        plan: of the study.
        source: loads the plan's objective.
        accept_changes: continue although the code, the versions or the reference have changed.
        retry_failed: failed trials are to be evaluated again.

    Raises:
        StudyStoreError: another process runs the study, or it was made with something else than there is now.
        LcscError: the study could never be searched; nothing is stored then.
    """
    storage = source.storage
    if plan.name not in study_names(storage):
        create_study(plan, source, accept_changes=accept_changes)
    study = StoredStudy.open(storage, plan.name)
    plan = plan.continuing(study)
    with study.hold():
        objective = source.objective
        attributes = {**accepted_changes(study, objective, accept=accept_changes), **plan.changing()}
        schedule = schedule_of(plan, objective, study.attributes)
        with _workers(plan, source) as pool:
            stored = study.attributes
            for name, value in attributes.items():
                if value != stored.get(name):
                    study.set_attribute(name, value)
            if retry_failed:
                again, forgotten = study.retry_failed()
                later = f"; {forgotten} after the last success are forgotten, and asked anew" if forgotten else ""
                notice(f"{study.name}: {again} failed trials are evaluated again{later}")
            yield OpenStudy(plan, study, objective, schedule, pool)


def create_study(
    plan: StudyPlan,
    source: ObjectiveSource,
    attributes: Mapping[str, Any] | None = None,
    *,
    accept_changes: bool = False,
) -> None:
    """Store a new study; a study that could never be searched is refused, and nothing is stored.

    Args:
        plan: of the study.
        source: loads the plan's objective.
        attributes: further ones of the study.
        accept_changes: allow other code than that of the experiment's other studies.

    Raises:
        StudySpecError: the objective, the machine or the Ray cluster does not allow the plan.
        StudyStoreError: its losses would not compare with those of the experiment's other studies.
    """
    check_plan(plan, source, accept_changes=accept_changes)
    name_identical_checkpoints(source.objective)
    stored = {**plan.attributes(source.objective), **(attributes or {})}
    StoredStudy.open_or_create(source.storage, plan.name, stored)


def check_plan(plan: StudyPlan, source: ObjectiveSource, *, accept_changes: bool = False) -> None:
    """Refuse a new study that its objective does not allow, or whose losses would not compare.

    Raises:
        LcscError: as :func:`create_study`.
    """
    plan.environments()
    if plan.ray is not None:
        from lcsc_opt.evaluation.ray import check_address

        check_address(plan.ray)
    schedule_of(plan, source.objective, {})
    check_space(plan.spec.space, source.objective)
    check_siblings(source.storage, plan, source.objective, accept=accept_changes)
    if plan.ray is not None and plan.ray not in source.checked_clusters:
        with _workers(plan, source):
            pass  # connecting checks the cluster


def run_study(plan: StudyPlan, source: ObjectiveSource, *, retry_failed: bool = False, **options: bool) -> str:
    """Search until the plan's budget is spent, then report on held-out noise. Finished work is not repeated.

    Args:
        plan: what to run.
        source: loads the plan's objective.
        retry_failed: failed trials are evaluated again.
        options: those of :func:`open_study`.

    Returns:
        One line for people: the result.

    Raises:
        LcscError: as :func:`open_study`.
    """
    storage = source.storage
    if plan.name in study_names(storage) and not retry_failed:
        study = StoredStudy.open(storage, plan.name)
        going_on = plan.continuing(study)
        moved = study.attributes["specification"] != going_on.specification()  # the checkpoints: exported from there
        if is_finished(study, going_on) and not moved:
            return f"finished already; {outcome_of(study)}"
    with open_study(plan, source, retry_failed=retry_failed, **options) as opened:
        opened.search()
        opened.report()
        return outcome_of(opened.stored)


@contextlib.contextmanager
def _workers(plan: StudyPlan, source: ObjectiveSource) -> Iterator[WorkerPool | None]:
    """The plan's worker processes, which start when they are first used; ``None`` if this process evaluates."""
    environments = plan.environments()
    if plan.ray is not None:
        from lcsc_opt.evaluation.ray import ray_cluster

        objective, spec = source.objective, plan.spec.objective
        try:
            packed = packed_trajectory(objective)
        except ObjectiveError:
            packed = None
        with ray_cluster(plan.ray, spec, objective, study=plan.directory, packed=packed) as cluster:
            if plan.ray not in source.checked_clusters:
                cluster.check()
                source.checked_clusters.append(plan.ray)
            with contextlib.closing(cluster.pool()) as pool:
                yield pool
        return
    if plan.workers == 1 and not plan.devices:
        yield None
        return
    expected = source.objective.fingerprint()
    with contextlib.closing(
        WorkerPool(source.load, plan.workers, expected=expected, environments=environments)
    ) as pool:
        yield pool
