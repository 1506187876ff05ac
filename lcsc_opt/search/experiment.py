"""Running studies under their locks, with a report on held-out noise at the end. Finished work is not repeated."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nevergrad.optimization.base import Optimizer
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError, ObjectiveError, StudyStoreError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.reproducibility import describe_difference, environment
from lcsc_opt.base.study_file import BudgetSpec, RayWorkers, SpaceSpec
from lcsc_opt.coefficients.plane import LANDSCAPE
from lcsc_opt.database.names import BASELINES
from lcsc_opt.database.store import StoredStudy, study_names
from lcsc_opt.evaluation import (
    Evaluator,
    InProcessEvaluator,
    Outcome,
    Pipeline,
    ProcessEvaluator,
    Share,
    SpreadEvaluator,
    WorkerPool,
    Workers,
    evaluate_safely,
    retrying,
)
from lcsc_opt.exports import attach_figures
from lcsc_opt.exports.recipe import packed_trajectory
from lcsc_opt.objective.contract import Objective, StagedObjective, stop_if_told
from lcsc_opt.objective.loading import check_objective, load_objective
from lcsc_opt.optimizers import build_optimizer, starts_by_itself
from lcsc_opt.search import sameness
from lcsc_opt.search.endings import is_finished, outcome_of, search_ended
from lcsc_opt.search.held_out import HeldOutPlan, score_held_out
from lcsc_opt.search.places import environments_of
from lcsc_opt.search.plan import (
    RAY,
    Parallelism,
    Resolved,
    StudyPlan,
    build_space,
    check_gradient,
    check_space,
    checkpoints_of,
    packed_sha256,
    resolve,
    stored_plan,
)
from lcsc_opt.search.runner import Search
from lcsc_opt.search.watching import Watch, keeping_nodes, own_line

if TYPE_CHECKING:  # Ray is optional
    from lcsc_opt.evaluation.ray import Cluster


class Experiment:
    """Runs plans that share an objective, which is loaded when the first of them needs it."""

    def __init__(self, storage: RDBStorage, plan: StudyPlan) -> None:
        self.storage = storage
        self._spec, self._directory, self._name = plan.spec.objective, plan.directory, plan.spec.name
        self._checked_cluster: RayWorkers | None = None
        self._has_room: RayWorkers | None = None
        self._shared: Share | None = None
        self._watch: Watch = own_line
        self._scoring, self._evaluating = threading.Lock(), threading.Lock()  # each is held by one study at a time

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective; loading it may train or read a model."""
        return self._load()

    def forget_objective(self) -> None:
        """Free the objective and its memory. It is loaded again when it is needed."""
        self.__dict__.pop("objective", None)

    @property
    def _load(self) -> Callable[[], Objective]:
        """The function that loads the objective here and in workers, with the checkpoints of the first study."""
        known = checkpoints_of(self.storage, self._name, self._spec)
        return functools.partial(load_objective, self._spec, beside=self._directory, checkpoints=known)

    def run(
        self,
        plan: StudyPlan,
        *,
        accept_environment: bool = False,
        accept_code: bool = False,
        lower_budget: bool = False,
        retry_failed: bool = False,
        debug: bool = False,
    ) -> str:
        """Search until the plan's budget is spent, then report on held-out noise. Finished work is not repeated.

        Args:
            plan: what to run. If the stored budget is larger, it counts instead, and a line says so.
            accept_environment: continue with other packages or another BLAS than the study began with.
            accept_code: continue although the code of the objective has changed.
            lower_budget: take the plan's budget even if the stored one is larger.
            retry_failed: failed trials are evaluated again.
            debug: print the whole traceback of an evaluation that fails.

        Returns:
            One line for people: the result.

        Raises:
            StudyStoreError: another process runs this study.
            StudyStoreError: the stored study was made with other settings, or in another environment.
        """
        study, plan = self.begin(plan, lower_budget=lower_budget, accept_code=accept_code)
        if is_finished(study, plan) and not retry_failed:
            sameness.say_edited(study, plan)
            self._follow(study, plan)
            return f"finished already; {outcome_of(study)}"
        held_out = plan.spec.held_out
        with study.hold():
            accepted = {"accept_environment": accept_environment, "accept_code": accept_code}
            self._note(study, sameness.accepted_changes(study, self.objective, **accepted))
            self._note(study, plan.changing())
            if retry_failed:
                _retry_failed(study)
            with self.workers(plan) as pool:
                if plan.ray_attribute != study.attributes.get(RAY):
                    study.set_attribute(RAY, plan.ray_attribute)  # the cluster is there
                if not search_ended(study, plan):
                    self._search(study, plan, pool, debug=debug)
                report = held_out is not None and study.attributes.get("held_out") is None
                if held_out is not None and report:
                    self._report(study, plan, HeldOutPlan(held_out.images, held_out.top), pool)
            if report:  # in this process; by now its own workers have freed their devices
                with self._evaluating:
                    attach_figures(self.storage, study, self.objective)
            return outcome_of(study)

    def begin(
        self, plan: StudyPlan, *, lower_budget: bool = False, accept_code: bool = False
    ) -> tuple[StoredStudy, StudyPlan]:
        """The stored study and the plan that it continues with. The study is created if there is none.

        Raises:
            LcscError: as :meth:`run`.
        """
        if plan.name not in study_names(self.storage):
            self.check(plan, accept_code=accept_code)
            StoredStudy.open_or_create(self.storage, plan.name, plan.attributes(self.objective))
        study = StoredStudy.open(self.storage, plan.name)
        plan = plan.continuing(study)
        return study, plan if lower_budget else _with_larger_budget(plan, study)

    def beside(self, storage: RDBStorage, share: Share, watch: Watch) -> Experiment:
        """An experiment with the same objective, for a study that runs beside others.

        Args:
            storage: the same database, through a connection of its own.
            share: its share of the workers.
            watch: shows the progress of all studies.
        """
        other = copy.copy(self)
        other.storage, other._shared, other._watch = storage, share, watch
        return other

    def _report(self, study: StoredStudy, plan: StudyPlan, held_out: HeldOutPlan, pool: Workers | None) -> None:
        if (nothing := self.objective.why_nothing_held_out()) is None:
            self._score(study, plan, held_out, pool)
        else:
            notice(f"{plan.spec.name}: nothing is held out: {nothing}")

    def _note(self, study: StoredStudy, attributes: Mapping[str, Any]) -> None:
        stored = study.attributes
        for name, value in attributes.items():
            if value != stored.get(name):
                study.set_attribute(name, value)

    def _follow(self, study: StoredStudy, plan: StudyPlan) -> None:
        """Remember where the checkpoints of a finished study are now: it is exported from there."""
        stored, now = study.attributes, plan.specification()
        if stored["specification"] == now:  # only the names of checkpoints may differ
            return
        try:
            if packed_sha256(self.objective) != stored["checkpoints"]:
                raise StudyStoreError("these are other checkpoints than those it was searched on")
            with study.hold():
                study.set_attribute("specification", now)
        except LcscError as error:
            notice(f"{study.name}: {error}")

    def evaluate(self, study: StoredStudy, plan: HeldOutPlan, *, accept_code: bool = False) -> dict[str, Any]:
        """Write the held-out report of a study whose lock is held.

        Raises:
            ObjectiveError: this objective has no held-out loss.
            StudyStoreError: the objective has changed since the search, so the numbers would not compare.
        """
        if nothing := self.objective.why_nothing_held_out():
            raise ObjectiveError(f"{study.name}: nothing is held out, so nothing can be reported: {nothing}")
        self._note(study, sameness.objective_changes(study, self.objective, study.attributes, accept_code=accept_code))
        stored = stored_plan(study)
        with self.workers(stored) as pool:
            report = self._score(study, stored, plan, pool)
        if plan.keep:
            attach_figures(self.storage, study, self.objective)
        return report

    def _score(
        self, study: StoredStudy, plan: StudyPlan, held_out: HeldOutPlan, pool: Workers | None
    ) -> dict[str, Any]:
        """Choose among the best trials on selection noise, and report the chosen one on held-out noise."""
        if not self.objective.images_per_evaluation:
            held_out = dataclasses.replace(held_out, images=0)
        with self._one_by_one(pool) as evaluate:
            return score_held_out(study, self.objective, held_out, retrying(evaluate, plan.spec.failures))

    def _search(self, study: StoredStudy, plan: StudyPlan, pool: Workers | None, *, debug: bool) -> None:
        attributes = study.attributes
        resolved = resolve(plan, self.objective, attributes)
        budget, optimizer = resolved.budget, self._optimizer(plan, resolved)
        if attributes.get("parallelism") is None:
            study.set_attribute("parallelism", dataclasses.asdict(resolved.parallelism))
        if budget.model_dump() != attributes["budget"]:
            study.set_attribute("search_ended", None)  # first: a crash in between must leave work to do
            study.set_attribute("held_out", None)
            study.set_attribute("budget", budget.model_dump())
        before = attributes["fingerprint"]["environment"]
        with contextlib.closing(self._evaluator(resolved.parallelism, pool)) as evaluator:
            search = Search(
                study,
                optimizer,
                evaluator,
                budget=budget,
                first=None if starts_by_itself(plan.optimizer.name) else plan.origin,
                images_per_evaluation=self.objective.images_per_evaluation,
                in_flight=resolved.parallelism.in_flight,
                tells=plan.spec.tells,
                failures=plan.spec.failures,
                describe_difference=lambda: describe_difference(before, environment()),
                debug=debug,
            )
            self._say_who_waits(plan, resolved.parallelism, pool)
            with (
                self._watch(search, pool if plan.ray is not None else None) as on_tell,
                keeping_nodes(study, pool, on_tell) as on_tell_and_keep,
            ):
                search.run(on_tell_and_keep)
        exhausted = getattr(optimizer, "finished", False)
        study.set_attribute("search_ended", {"evaluations": search.told, "exhausted": exhausted})

    def _optimizer(self, plan: StudyPlan, resolved: Resolved) -> Optimizer:
        """A fresh optimizer. It plans with the study's first budget, even if the budget is raised later."""
        affine = SpaceSpec()  # contains a grid's profiles exactly; another space may not reach them
        spec = affine if plan.optimizer.name in (*BASELINES, LANDSCAPE) else plan.spec.space
        space = build_space(spec, self.objective, origin=plan.origin)
        workers = 1 if resolved.parallelism.spread_images else min(plan.workers, resolved.parallelism.in_flight)
        optimizer = build_optimizer(plan.optimizer, space, budget=resolved.evaluations, workers=workers, seed=plan.seed)
        if (plan_budget := getattr(optimizer, "plan_budget", None)) is not None:
            images, budget = self.objective.images_per_evaluation, resolved.first_budget
            plan_budget(evaluations=budget.evaluations, images=budget.images, images_per_evaluation=images)
        return optimizer

    def _evaluate_here(self, candidate: Candidate) -> Outcome:
        with self._evaluating:
            stop_if_told()
            return evaluate_safely(self.objective, candidate)

    def _say_who_waits(self, plan: StudyPlan, parallel: Parallelism, pool: Workers | None) -> None:
        idle = parallel.idle(plan.workers)
        if idle and isinstance(pool, WorkerPool):
            notice(
                f"{plan.name}: asks for one candidate after the other, so {idle} of {plan.workers} workers have "
                "nothing to do; other studies run beside it would use them"
            )

    @functools.cached_property
    def _checked(self) -> tuple[dict[str, str], str | None]:
        """The objective's settings, checked once."""
        known = checkpoints_of(self.storage, self._name, self._spec)
        return check_objective(self._spec, beside=self._directory, checkpoints=known)

    def rehearse(self, plan: StudyPlan, *, accept_environment: bool = False, accept_code: bool = False) -> None:
        """Refuse what :meth:`run` would refuse, as far as that is known without loading the objective; writes nothing.

        Raises:
            LcscError: as :meth:`run`.
        """
        if plan.name in study_names(self.storage):
            study = StoredStudy.open(self.storage, plan.name)
            if is_finished(study, plan.continuing(study)):
                return
            sameness.environment_changes(study, accept=accept_environment)
            code = {**study.attributes["fingerprint"]["code"], **self._checked[0]}
            sameness.code_change(study, code, accept=accept_code)
        else:
            sameness.check_siblings(self.storage, plan)
        check_gradient(plan, self._checked[1])
        self._check_room(plan)

    def check(self, plan: StudyPlan, *, accept_code: bool = False) -> None:
        """Refuse a plan that could never be searched, before anything is searched or stored.

        Raises:
            StudySpecError: the optimizer follows gradients, and the objective gives none.
            StudySpecError: the objective or the machine does not allow the budget or the workers.
            StudySpecError: there is no such Ray cluster, or it cannot evaluate this objective.
            StudySpecError, ObjectiveError: the objective does not have this coefficient space.
            StudyStoreError: its losses would not compare with those of the experiment's other studies.
        """
        environments_of(plan)
        if plan.ray is not None:
            from lcsc_opt.evaluation.ray import check_address

            check_address(plan.ray)
        resolve(plan, self.objective, {})
        check_space(plan.spec.space, self.objective)
        sameness.check_siblings(self.storage, plan, self.objective, accept_code=accept_code)
        sameness.name_identical_checkpoints(self.objective)
        if plan.ray is not None:
            with self._cluster(plan.ray):
                pass  # connecting checks the cluster

    def _check_room(self, plan: StudyPlan) -> None:
        """Refuse, once, a Ray cluster that could not evaluate, as far as that is known without the objective."""
        environments_of(plan)
        if plan.ray is None:
            return
        from lcsc_opt.evaluation.ray import check_room

        if self._has_room != plan.ray:
            check_room(plan.ray, self._spec)
            self._has_room = plan.ray

    @contextlib.contextmanager
    def workers(self, plan: StudyPlan) -> Iterator[Workers | None]:
        """The plan's worker processes, which start when they are first used; ``None`` if this process evaluates."""
        if self._shared is not None:
            with contextlib.closing(self._shared):
                yield self._shared
            return
        if plan.ray is not None:
            environments_of(plan)
            with self._cluster(plan.ray) as cluster, contextlib.closing(cluster.pool()) as pool:
                yield pool
            return
        if plan.workers == 1 and not plan.devices:
            yield None
            return
        expected = self.objective.fingerprint()
        pool = WorkerPool(self._load, plan.workers, expected=expected, environments=environments_of(plan))
        with contextlib.closing(pool):
            yield pool

    @contextlib.contextmanager
    def _cluster(self, wanted: RayWorkers) -> Iterator[Cluster]:
        """The Ray cluster, which is checked once."""
        from lcsc_opt.evaluation.ray import ray_cluster

        objective = self.objective
        try:
            packed = packed_trajectory(objective)
        except ObjectiveError:
            packed = None
        with ray_cluster(wanted, self._spec, objective, study=self._directory, packed=packed) as cluster:
            if self._checked_cluster != wanted:
                cluster.check()
                self._checked_cluster = wanted
            yield cluster

    def _evaluator(self, parallel: Parallelism, pool: Workers | None) -> Evaluator:
        if pool is None:
            pipelined = parallel.in_flight > 1 and isinstance(self.objective, StagedObjective)
            return Pipeline(self.objective) if pipelined else InProcessEvaluator(self.objective)
        if parallel.spread_images:
            return SpreadEvaluator(self.objective, pool, scoring=self._scoring)
        # if stages overlap, each worker has two candidates; else fewer than two for each worker are in flight
        return ProcessEvaluator(pool, depth=2 if parallel.in_flight >= 2 * len(pool) else 1)

    @contextlib.contextmanager
    def _one_by_one(self, pool: Workers | None) -> Iterator[Callable[[Candidate], Outcome]]:
        """Evaluates one candidate at a time, by all workers together if the objective allows it."""
        if pool is None or not isinstance(self.objective, StagedObjective):
            yield self._evaluate_here
            return
        with contextlib.closing(SpreadEvaluator(self.objective, pool, scoring=self._scoring)) as evaluator:
            yield lambda candidate: evaluator.submit(candidate).result()


def _retry_failed(study: StoredStudy) -> None:
    again, forgotten = study.retry_failed()
    later = f"; {forgotten} after the last success are forgotten, and asked anew" if forgotten else ""
    notice(f"{study.name}: {again} failed trials are evaluated again{later}")


def _with_larger_budget(plan: StudyPlan, study: StoredStudy) -> StudyPlan:
    stored, asked = BudgetSpec(**study.attributes["budget"]), plan.spec.budget
    if stored.unit != asked.unit or stored.total <= asked.total:
        return plan
    notice(f"{plan.spec.name}: its budget was raised to {stored} before, so {asked} of the study file do not count")
    return plan.changed(budget=stored)


def experiments(plans_to_run: Sequence[StudyPlan], storage: RDBStorage) -> Iterator[tuple[Experiment, StudyPlan]]:
    """Each plan with the experiment that runs it; plans of one objective share it."""
    known: dict[str, Experiment] = {}
    for plan in plans_to_run:
        key = f"{plan.directory}:{plan.spec.objective.model_dump_json()}"
        yield known.setdefault(key, Experiment(storage, plan)), plan
