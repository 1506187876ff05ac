"""One study: opened once, which reads, compares and decides everything; then it searches and reports.

::

    with StudyRunner(storage).open(plan) as study:
        study.search()  # ask → write → evaluate → write → tell
        study.report()  # the answer on held-out noise
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nevergrad.optimization.base import Optimizer
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError, ObjectiveError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.study_file import BudgetSpec
from lcsc_opt.database.history import NODES
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.evaluation.base import Evaluator, Failure, InProcessEvaluator, Outcome
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.evaluation.pool import ProcessEvaluator, WorkerPool
from lcsc_opt.evaluation.spread import SpreadEvaluator
from lcsc_opt.exports import attach_images
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.objective.loading import check_objective, load_objective
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.optimizers.registry import OURS
from lcsc_opt.search.compatibility import changes, compared, continued, differences, fingerprint
from lcsc_opt.search.held_out import HeldOutPlan, score_held_out
from lcsc_opt.search.plan import StudyPlan
from lcsc_opt.search.runner import Search
from lcsc_opt.tracking.trackers import Reporting, check_reporting
from lcsc_opt.trajectory import Trajectory

_KEEP_SECONDS = 10.0  # between two writes of the workers' state


@dataclasses.dataclass(frozen=True, eq=False)
class _OpenStudy:
    """A study whose lock is held, with everything decided; :meth:`StudyRunner.open` makes it.

    Attributes:
        plan: its specification.
        stored: the study in the database.
        objective: what is searched.
        pool: the workers; ``None`` if this process evaluates.
    """

    plan: StudyPlan
    stored: StoredStudy
    objective: Objective
    pool: WorkerPool | None

    def search(self) -> None:
        """Search until the budget is spent. A search that has ended is left as it is."""
        study, plan, before = self.stored, self.plan, self.stored.attributes
        if plan.is_searched(before):
            return
        optimizer, budget = self._optimizer(), plan.most(self.objective)
        if budget.model_dump() != before["budget"]:
            study.set_attribute("search_ended", None)  # first: a crash in between must leave work to do
            study.set_attribute("held_out", None)
            study.set_attribute("budget", budget.model_dump())
        with contextlib.closing(self._evaluator()) as evaluator:
            search = Search(
                study,
                optimizer,
                evaluator,
                budget=budget,
                first=plan.origin if plan.optimizer.name not in OURS or plan.optimizer.name == "LCSC" else None,
                images_per_evaluation=self.objective.images_per_evaluation,
                in_flight=before["parallelism"]["in_flight"],
                tells=plan.spec.tells,
                failures=plan.spec.failures,
                environment_change="; ".join(differences(before["fingerprint"]["environment"], environment())),
            )
            with self._reporting(search) as on_tell:
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

    def evaluate(self, plan: HeldOutPlan) -> HeldOutReport:
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
            report = score_held_out(self.stored, self.objective, plan, evaluate)
        if self.pool is not None:
            self.pool.close()  # which frees the devices
        if plan.keep:
            attach_images(self.stored, self.objective)
        return report

    def _optimizer(self) -> Optimizer:
        """A fresh optimizer. It plans with the study's first budget, even if the budget is raised later."""
        plan, stored = self.plan, self.stored.attributes
        images, first = self.objective.images_per_evaluation, BudgetSpec(**stored["optimizer_budget"])
        evaluations = first.total if first.unit == "evaluations" else math.ceil(first.total / images)
        parallelism = stored["parallelism"]
        workers = 1 if parallelism["spread_images"] else min(plan.workers, parallelism["in_flight"])
        space = plan.space(self.objective)
        optimizer = build_optimizer(plan.optimizer, space, budget=evaluations, workers=workers, seed=plan.seed)
        if (plan_budget := getattr(optimizer, "plan_budget", None)) is not None:
            plan_budget(evaluations=first.evaluations, images=first.images, images_per_evaluation=images)
        return optimizer

    def _evaluator(self) -> Evaluator:
        parallelism = self.stored.attributes["parallelism"]
        if self.pool is None:
            pipelined = parallelism["in_flight"] > 1 and isinstance(self.objective, StagedObjective)
            return Pipeline(self.objective) if pipelined else InProcessEvaluator(self.objective)
        if parallelism["spread_images"]:
            return SpreadEvaluator(self.objective, self.pool)
        # if stages overlap, each worker has two candidates; else fewer than two for each worker are in flight
        return ProcessEvaluator(self.pool, depth=2 if parallelism["in_flight"] >= 2 * len(self.pool) else 1)

    @contextlib.contextmanager
    def _one_by_one(self) -> Iterator[Callable[[Candidate], Outcome]]:
        """Evaluates one candidate at a time, by all workers together if the objective allows it; tries again."""
        made: Evaluator = InProcessEvaluator(self.objective)
        if self.pool is not None and isinstance(self.objective, StagedObjective):
            made = SpreadEvaluator(self.objective, self.pool)

        def evaluate(candidate: Candidate) -> Outcome:
            for _ in range(self.plan.spec.failures.retries + 1):
                outcome = evaluator.submit(candidate).result()
                if not (isinstance(outcome, Failure) and outcome.retry):
                    break
            return outcome

        with contextlib.closing(made) as evaluator:
            yield evaluate

    @contextlib.contextmanager
    def _reporting(self, search: Search) -> Iterator[Callable[[Search], None]]:
        """A progress line while this is open; yields what :meth:`Search.run` calls.

        The state of each machine's workers is written now and then, and at the end.
        """
        if (last := search.last_stored) is not None:
            notice(f"{search.name}: continuing after trial {last}")
        shown, kept_at, pool = search.stored_spent, -math.inf, self.pool

        def keep() -> None:
            if pool is not None:
                nodes = [dataclasses.asdict(node) for node in pool.nodes()]
                self.stored.set_attribute(NODES, {"seen_at": time.time(), "nodes": nodes})

        with progress(search.name, search.budget.total, done=shown) as advance:

            def on_tell(search: Search) -> None:
                nonlocal shown, kept_at
                notes = [f"best {search.best[0]:.4g} in trial {search.best[1]}"] if search.best else []
                notes += [f"{search.failures} failed"] if search.failures else []
                notes += [f"{pool.alive} of {len(pool)} workers"] if pool is not None and self.plan.ray else []
                advance(max(search.spent - shown, 0), note=", ".join(notes))
                shown = max(shown, search.spent)
                if time.monotonic() - kept_at >= _KEEP_SECONDS:
                    kept_at = time.monotonic()
                    keep()

            on_tell(search)
            yield on_tell
            keep()


class StudyRunner:
    """Opens and runs the studies of one database.

    It keeps the objective that it loaded last, which studies share, so plans of one objective should follow each other.

    Args:
        storage: of the studies.
        accept_changes: continue studies although the code, the versions or the reference have changed.
    """

    def __init__(self, storage: RDBStorage, *, accept_changes: bool = False) -> None:
        self.storage, self._accept = storage, accept_changes
        self._loaded: tuple[str, Objective] | None = None
        # of objectives that were checked: their code, and what says why there is no gradient
        self._settings: dict[str, tuple[dict[str, str], Callable[[], str | None]]] = {}

    def objective(self, plan: StudyPlan) -> Objective:
        """The plan's objective; loading it may train or read a model."""
        if self._loaded is None or self._loaded[0] != plan.objective_key:
            self._loaded = None  # frees its memory first
            self._loaded = plan.objective_key, _loader(plan, our_studies(self.storage))()
        return self._loaded[1]

    def rehearse(self, plans: Sequence[StudyPlan]) -> list[StudyPlan]:
        """Refuse what :meth:`open` would refuse, as far as that is known without the objective; writes nothing.

        Returns:
            The plans of which anything is left to do.

        Raises:
            LcscError: as :meth:`open`.
        """
        studies, here = our_studies(self.storage), environment()
        return [plan for plan in plans if self._is_left(plan, studies, here)]

    def _is_left(self, plan: StudyPlan, studies: Mapping[str, Mapping[str, Any]], here: Mapping[str, Any]) -> bool:
        stored = studies.get(plan.name)
        plan = continued(plan, stored)
        if stored is not None and plan.is_finished(stored):
            self._say_changed(plan, stored)
            return False
        code, why_no_gradient = self._checked(plan, studies)
        plan.check_gradient(why_no_gradient)
        plan.environments()
        check_reporting(plan.spec.log, plan.spec.notify)
        before = {} if stored is None else stored["fingerprint"]["code"]
        compared(plan, self.storage, studies, {"code": {**before, **code}, "environment": here}, accept=self._accept)
        return True

    def check(self, plan: StudyPlan) -> None:
        """Refuse a new study that its objective does not allow, or whose losses would not compare.

        Raises:
            LcscError: as :meth:`open`.
        """
        self._prepared(plan)

    def create(self, plan: StudyPlan, attributes: Mapping[str, Any] | None = None) -> None:
        """Store a new study, with further attributes; one that could never be searched is refused, and not stored.

        Raises:
            LcscError: as :meth:`open`.
        """
        plan, _, begun, changed, _ = self._prepared(plan)
        StoredStudy.open_or_create(self.storage, plan.name, {**begun, **changed, **(attributes or {})})

    @contextlib.contextmanager
    def open(self, plan: StudyPlan, *, retry_failed: bool = False) -> Iterator[_OpenStudy]:
        """Create or open a study, compare it with what is there now, and hold its lock while this is open.

        Args:
            plan: of the study.
            retry_failed: trials that failed after the last success are asked anew.

        Raises:
            StudyStoreError: another process runs the study, it was made with something else than there is now, or its
                losses would not compare with those of the experiment's other studies.
            LcscError: the objective, this machine or the Ray cluster does not allow the plan; nothing is stored then.
                What a node lacks shows when its worker starts.
        """
        plan, objective, begun, changed, studies = self._prepared(plan)
        with self._workers(plan, objective, studies) as pool:
            study = StoredStudy.open_or_create(self.storage, plan.name, {**begun, **changed})
            with study.hold():
                stored = study.attributes
                for name, value in changed.items():
                    if value != stored.get(name):
                        study.set_attribute(name, value)
                if retry_failed:
                    notice(f"{study.name}: {study.retry_failed()} trials after the last success are asked anew")
                yield _OpenStudy(plan, study, objective, pool)

    def run(self, plan: StudyPlan, *, retry_failed: bool = False) -> str:
        """Search until the plan's budget is spent, then report on held-out noise. Finished work is not repeated.

        Returns:
            One line for people: the result.

        Raises:
            LcscError: as :meth:`open`.
        """
        stored = our_studies(self.storage).get(plan.name)
        if stored is not None and not retry_failed:
            plan = continued(plan, stored)
            moved = stored["specification"] != plan.specification()  # the checkpoints, which exports look for
            if plan.is_finished(stored) and not moved:
                with Reporting(StoredStudy.open(self.storage, plan.name), plan.spec.log, None):  # what it lacks
                    pass
                return f"finished already; {self._outcome(plan)}"
        log, notify = plan.spec.log, plan.spec.notify
        with self.open(plan, retry_failed=retry_failed) as opened, Reporting(opened.stored, log, notify):
            opened.search()
            opened.report()
            return self._outcome(plan)

    def _prepared(self, plan: StudyPlan) -> tuple[StudyPlan, Objective, dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The plan as the study continues it, its objective, and attributes.

        Everything is compared here: the plan with the objective, and both with what is stored. The attributes are those
        that a new study begins with, those that any study gets, and those of all studies, by name.
        """
        studies = our_studies(self.storage)
        objective = self.objective(plan)
        plan.check(objective)
        plan = continued(plan, studies.get(plan.name))
        now, packed = fingerprint(objective), objective.trajectory
        packed = packed if isinstance(packed, Trajectory) else None
        accepted = compared(plan, self.storage, studies, now, accept=self._accept)
        changed = plan.following() | accepted
        begun = {**plan.beginning(objective), "fingerprint": now, "checkpoints": packed and packed.sha256}
        if accepted:
            notice(f"{plan.name}: continues with changes: {accepted['changes'][-1]['changed']}")
        if plan.name not in studies:
            for warning in (*plan.advice(objective), *([] if packed is None else packed.identical())):
                notice(warning)
            studies[plan.name] = {**begun, **changed}  # its workers load these checkpoints
        return plan, objective, begun, changed, studies

    def _outcome(self, plan: StudyPlan) -> str:
        found = HistoryReader(self.storage).read_study(plan.name)
        searched = "no result on the search's noise" if found.searched is None else f"best {found.searched:.4g}"
        held_out = "" if found.held_out_loss is None else f", held-out {found.held_out_loss:.4g}"
        failed = f" ({len(found.failed)} failed: lcsc show {plan.name})" if len(found.failed) else ""
        return f"{searched}{held_out} after {found.evaluations} evaluations{failed}"

    def _checked(
        self, plan: StudyPlan, studies: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, str], Callable[[], str | None]]:
        """Check the objective's settings; gives its code, and what says why it has no gradient."""
        if plan.objective_key not in self._settings:
            known = plan.known_checkpoints(studies)
            found = check_objective(plan.spec.objective, beside=plan.directory, checkpoints=known)
            self._settings[plan.objective_key] = found
        return self._settings[plan.objective_key]

    def _say_changed(self, plan: StudyPlan, stored: Mapping[str, Any]) -> None:
        """Say of a finished study that its code is another one now: its results are of the old code."""
        with contextlib.suppress(LcscError):  # the code is gone: nobody takes the results for those of another code
            before = stored["fingerprint"]
            code, _ = self._checked(plan, {plan.name: stored})
            if found := changes(before, {"code": {**before["code"], **code}}):
                notice(f"{plan.name}: finished before this changed: {found}. lcsc run FILE name=... searches anew")

    @contextlib.contextmanager
    def _workers(
        self, plan: StudyPlan, objective: Objective, studies: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[WorkerPool | None]:
        """The plan's worker processes, which start when they are first used; ``None`` if this process evaluates."""
        environments = plan.environments()
        if plan.ray is not None:
            from lcsc_opt.evaluation.ray import ray_workers

            with ray_workers(plan.ray, plan.spec.objective, objective, study=plan.directory) as pool:
                yield pool
        elif plan.workers == 1 and not isinstance(plan.spec.workers, tuple):
            yield None
        else:
            load, expected = _loader(plan, studies), objective.fingerprint()
            made = WorkerPool(load, plan.workers, expected=expected, environments=environments)
            with contextlib.closing(made) as pool:
                yield pool


def _loader(plan: StudyPlan, studies: Mapping[str, Mapping[str, Any]]) -> Callable[[], Objective]:
    """What loads the objective, here and in workers; picklable."""
    known = plan.known_checkpoints(studies)
    rows = plan.spec.space.rows
    return functools.partial(load_objective, plan.spec.objective, beside=plan.directory, checkpoints=known, rows=rows)


def objective_of(study: StoredStudy) -> Objective:
    """The objective of a stored study. Loading it may train or read a model."""
    return StudyRunner(study.storage).objective(StudyPlan.of(study))
