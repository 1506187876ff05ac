"""Runs resolved studies: the search, then the report on held-out noise.

::

    with Executor(storage).open(plan) as study:
        study.search()  # ask → write → evaluate → write → tell
        study.report()  # the answer on held-out noise
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nevergrad.optimization.base import Optimizer
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_file import BudgetSpec
from lcsc_opt.database.history import NODES, sign_of
from lcsc_opt.database.kept_bound import KEPT_BOUND, KeptBound
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.evaluation.base import Evaluator, Failure, InProcessEvaluator, Outcome
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.evaluation.pool import ProcessEvaluator, WorkerPool
from lcsc_opt.evaluation.spread import SpreadEvaluator
from lcsc_opt.exports import attach_images
from lcsc_opt.objective.checkpoints_alone import CheckpointsAlone
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.optimizers.registry import OURS
from lcsc_opt.study.bound import bound_of
from lcsc_opt.study.callbacks import TrialCallback
from lcsc_opt.study.failure_policy import retry_failures
from lcsc_opt.study.held_out import HeldOutPlan, score_held_out, score_last_checkpoint
from lcsc_opt.study.plan import Plan
from lcsc_opt.study.resolving import (
    Attributes,
    Evidence,
    Resolved,
    StoredStudies,
    is_complete,
    is_finished,
    is_searched,
    resolve,
)
from lcsc_opt.study.resources import ObjectiveLoader, known_checkpoints, open_workers, read_database
from lcsc_opt.study.runner import Search

_NODES_SECONDS = 10.0  # between two writes of the workers' state


@dataclasses.dataclass(frozen=True, eq=False)
class Execution:
    """A resolved study whose lock is held; :meth:`Executor.open` makes it.

    Attributes:
        plan: its specification.
        stored: the study in the database.
        objective: what is searched.
        pool: the workers; ``None`` if this process evaluates.
    """

    plan: Plan
    stored: StoredStudy
    objective: Objective
    pool: WorkerPool | None

    def search(self, callbacks: Sequence[TrialCallback] = ()) -> None:
        """Search until the budget is spent. A search that has ended is left as it is.

        One that a callback has stopped has not ended: it continues the next time.

        Args:
            callbacks: are called with Optuna's study and the trial, after each trial that ends in this run.

        Raises:
            Exception: what a callback raises; all results so far are stored.
        """
        plan = self.plan
        study = self.stored
        before = study.attributes
        if is_searched(plan, before):
            return
        with self._one_by_one() as evaluate:
            score_last_checkpoint(study, self.objective, self._report_plan(), evaluate)
        budget = plan.most(self.objective)
        if budget.model_dump() != before["budget"]:
            study.set_attribute("search_ended", None)  # first: a crash in between must leave work to do
            study.set_attribute("budget", budget.model_dump())
        if before.get("held_out") is not None:  # of what an earlier run has found
            study.set_attribute("held_out", None)
        incomplete = plan.why_incomplete(self.objective)
        if incomplete is not None:
            notice(incomplete)
        starts_at_origin = plan.optimizer.name == "LCSC" or plan.optimizer.name not in OURS
        with contextlib.closing(self._evaluator()) as evaluator:
            bound = self._bound()
            optimizer = self._optimizer()
            search = Search(
                study,
                optimizer,
                evaluator,
                budget=budget,
                first=plan.origin if starts_at_origin else None,
                images_per_evaluation=self.objective.images_per_evaluation,
                constraint=None if bound is None else bound.constraint,
                in_flight=before["parallelism"]["in_flight"],
                failures=plan.spec.failures,
                changed="; ".join(change["changed"] for change in before.get("changes", ())),
                callbacks=callbacks,
            )
            with self._showing(search) as on_tell:
                search.run(on_tell)
        if search.stopped:
            notice(f"{study.name}: a callback has stopped the search before its budget was spent")
            return
        exhausted = getattr(optimizer, "finished", False)
        study.set_attribute("search_ended", {"evaluations": search.told, "exhausted": exhausted})

    def report(self) -> None:
        """Report on held-out noise as the study file asks, unless there is a report."""
        if self.plan.spec.held_out is None or self.stored.attributes.get("held_out") is not None:
            return
        plan = self._report_plan()
        if plan is None:
            notice(f"{self.plan.spec.name}: nothing is held out: {self.objective.why_nothing_held_out()}")
            return
        self.evaluate(plan)

    def _report_plan(self) -> HeldOutPlan | None:
        """The plan of the report that the study file asks for; ``None`` if there will be none."""
        held_out = self.plan.spec.held_out
        if held_out is None or self.objective.why_nothing_held_out() is not None:
            return None
        images = 0
        if self.objective.images_per_evaluation:
            images = held_out.images_with(self.objective.report_images)
        return HeldOutPlan(images, held_out.top)

    def evaluate(self, plan: HeldOutPlan) -> HeldOutReport:
        """Choose among the best trials on selection noise, and report the chosen one on held-out noise.

        This is the last work of the workers.

        Raises:
            ObjectiveError: this objective has no held-out loss.
        """
        reason = self.objective.why_nothing_held_out()
        if reason is not None:
            raise ObjectiveError(f"{self.stored.name}: nothing is held out, so nothing can be reported: {reason}")
        if not self.objective.images_per_evaluation:
            plan = dataclasses.replace(plan, images=0)
        with self._one_by_one() as evaluate:
            report = score_held_out(self.stored, self.objective, plan, evaluate)
        if self.pool is not None:
            self.pool.close()  # which frees the devices
        if plan.keep:
            attach_images(self.stored, self.objective)
        return report

    def _bound(self) -> KeptBound | None:
        """The bound of the kept metric; ``None`` if the losses of this study have none."""
        bound = KeptBound.of(self.stored.attributes)
        if bound is not None or self.plan.is_grid or not self.objective.keeps:
            return bound
        bound = bound_of(self.stored)
        self.stored.set_attribute(KEPT_BOUND, bound.to_json())
        return bound

    def _optimizer(self) -> Optimizer:
        """A fresh optimizer. It plans with the study's first budget, even if the budget is raised later."""
        stored = self.stored.attributes
        images = self.objective.images_per_evaluation
        first_budget = BudgetSpec(**stored["optimizer_budget"])
        evaluations = first_budget.total
        if first_budget.unit == "images":
            evaluations = math.ceil(first_budget.total / images)
        workers = 1
        if not stored["parallelism"]["spread_images"]:
            workers = min(self.plan.workers, stored["parallelism"]["in_flight"])
        space = self.plan.space(self.objective)
        spec = self.plan.optimizer.with_defaults(stored.get("optimizer_defaults", {}))
        optimizer = build_optimizer(spec, space, budget=evaluations, workers=workers, seed=self.plan.seed)
        plan_budget = getattr(optimizer, "plan_budget", None)
        if plan_budget is not None:
            plan_budget(
                evaluations=first_budget.evaluations,
                images=first_budget.images,
                images_per_evaluation=images,
            )
        return optimizer

    def _evaluator(self) -> Evaluator:
        parallelism = self.stored.attributes["parallelism"]
        in_flight = parallelism["in_flight"]
        if self.pool is None:
            if in_flight > 1 and isinstance(self.objective, StagedObjective):
                return Pipeline(self.objective)
            return InProcessEvaluator(self.objective)
        if parallelism["spread_images"]:
            return SpreadEvaluator(self.objective, self.pool)
        # If stages overlap, each worker has two candidates; else fewer than two for each worker are in flight.
        most_jobs = 2 if in_flight >= 2 * len(self.pool) else 1
        return ProcessEvaluator(self.pool, most_jobs=most_jobs)

    @contextlib.contextmanager
    def _one_by_one(self) -> Iterator[Callable[[Candidate], Outcome]]:
        """Evaluates one candidate at a time, by all workers together if the objective allows it; tries again."""
        evaluator: Evaluator
        if self.pool is not None and isinstance(self.objective, StagedObjective):
            evaluator = SpreadEvaluator(self.objective, self.pool)
        else:
            evaluator = InProcessEvaluator(self.objective)

        def evaluate(candidate: Candidate) -> Outcome:
            for _ in range(self.plan.spec.failures.retries + 1):
                outcome = evaluator.submit(candidate).result()
                if not (isinstance(outcome, Failure) and outcome.retry):
                    break
            return outcome

        with contextlib.closing(evaluator):
            yield evaluate

    @contextlib.contextmanager
    def _showing(self, search: Search) -> Iterator[Callable[[Search], None]]:
        """A progress line while this is open; yields what :meth:`Search.run` calls.

        The state of each machine's workers is written now and then, and at the end.
        """
        if search.last_stored is not None:
            notice(f"{search.name}: continuing after trial {search.last_stored}")
        shown = search.stored_spent
        nodes_written_at = -math.inf

        with progress(search.name, search.budget.total, done=shown) as advance:

            def on_tell(search: Search) -> None:
                nonlocal shown, nodes_written_at
                advance(max(search.spent - shown, 0), note=self._progress_note(search))
                shown = max(shown, search.spent)
                if time.monotonic() - nodes_written_at >= _NODES_SECONDS:
                    nodes_written_at = time.monotonic()
                    self._write_nodes()

            on_tell(search)
            yield on_tell
            self._write_nodes()

    def _progress_note(self, search: Search) -> str:
        notes = []
        if search.best is not None:
            loss, number = search.best
            notes.append(f"best {sign_of(self.stored.attributes) * loss:.4g} in trial {number}")
        if search.failures:
            notes.append(f"{search.failures} failed")
        if self.pool is not None and self.plan.ray is not None:
            notes.append(f"{self.pool.alive} of {len(self.pool)} workers")
        return ", ".join(notes)

    def _write_nodes(self) -> None:
        """Write what the workers of each machine do."""
        if self.pool is not None:
            nodes = [dataclasses.asdict(node) for node in self.pool.nodes()]
            self.stored.set_attribute(NODES, {"seen_at": time.time(), "nodes": nodes})


class Executor:
    """Opens and runs the studies of one database.

    It keeps the objective that it loaded last, which studies share, so plans of one objective should follow each other.

    Args:
        storage: of the studies.
        accept_changes: continue studies although the code, the versions or the reference have changed.
        objectives: what loads objectives; one that is loaded already is not loaded again.
    """

    def __init__(
        self,
        storage: RDBStorage,
        *,
        accept_changes: bool = False,
        objectives: ObjectiveLoader | None = None,
    ) -> None:
        self.storage = storage
        self._accept_changes = accept_changes
        self._objectives = ObjectiveLoader() if objectives is None else objectives

    def objective(self, plan: Plan) -> Objective:
        """The plan's objective; loading it may train or read a model."""
        return self._objectives.load(plan, lambda: our_studies(self.storage))

    def loaded_evidence(self, plan: Plan) -> Evidence:
        """What is known of the plan's objective once it is loaded.

        Raises:
            TrajectoryError: the weights on the disk are damaged.
        """
        return self._objectives.evidence(plan, lambda: our_studies(self.storage))

    def resolve(self, plan: Plan, *, measures: bool = True) -> Resolved:
        """The study as the database has it now, compared with the loaded objective; arguments as for :func:`resolve`.

        Raises:
            LcscError: as :meth:`open`.
        """
        evidence = self.loaded_evidence(plan)
        studies = read_database(self.storage)  # only now, since loading may have taken hours
        return resolve(plan, studies, evidence, accept_changes=self._accept_changes, measures=measures)

    def create(self, resolved: Resolved, attributes: Mapping[str, Any]) -> None:
        """Store a new study, with further attributes."""
        for line in resolved.notices:
            notice(line)
        StoredStudy.open_or_create(self.storage, resolved.plan.name, {**resolved.attributes, **attributes})

    @contextlib.contextmanager
    def open(self, plan: Plan, *, retry_failed: bool = False, measures: bool = True) -> Iterator[Execution]:
        """Create or open a study, and hold its lock while this is open.

        Args:
            plan: of the study.
            retry_failed: trials that failed after the last success are repeated, and earlier failures do not end
                the search.
            measures: whether losses will be added; a finished study is also opened to store where its files are now.

        Raises:
            StudyStoreError: another process runs the study, it was created with other code, checkpoints or settings,
                or its losses would not compare with those of the experiment's other studies.
            LcscError: the objective, this machine or the Ray cluster does not allow the plan; nothing is stored then.
                What a node lacks shows when its worker starts.
        """
        resolved = self.resolve(plan, measures=measures)
        objective = resolved.objective
        assert objective is not None  # the evidence was of the loaded objective
        with open_workers(resolved, objective, our_studies(self.storage)) as pool:
            study = StoredStudy.open_or_create(self.storage, plan.name, resolved.attributes)
            with study.hold():
                stored = study.attributes
                for name, value in resolved.updated_attributes.items():
                    if value != stored.get(name):
                        study.set_attribute(name, value)
                for line in resolved.notices:
                    notice(line)
                if retry_failed or resolved.starts_over:
                    retried = retry_failures(study)
                    line = f"retrying {retried} trials that failed after the last success"
                    if retried:
                        line += "; earlier failures are kept, because later candidates depend on them"
                    notice(f"{study.name}: {line}")
                yield Execution(resolved.plan, study, objective, pool)

    def run(self, plan: Plan, *, retry_failed: bool = False, callbacks: Sequence[TrialCallback] = ()) -> str:
        """Search until the plan's budget is spent, then report on held-out noise. Finished work is not repeated.

        Args:
            plan: of the study.
            retry_failed: as for :meth:`open`.
            callbacks: as for :meth:`Execution.search`.

        Returns:
            One line for people: the result.

        Raises:
            LcscError: as :meth:`open`.
            Exception: what a callback raises.
        """
        stored = our_studies(self.storage).get(plan.name)
        if stored is None or retry_failed or not is_complete(plan, stored):
            measures = stored is None or retry_failed or self._accept_changes or not is_finished(plan, stored)
            with self.open(plan, retry_failed=retry_failed, measures=measures) as execution:
                execution.search(callbacks)
                execution.report()
                return self.outcome(plan)
        return f"finished already; {self._finished(plan, stored)}"

    def _finished(self, plan: Plan, stored: Attributes) -> str:
        """The result of a finished study."""
        line = self.outcome(plan) + _larger_report(plan, stored)
        if stored["search_ended"]["exhausted"]:
            line += "; the optimizer has nothing more to ask"
        return line

    def evaluate(self, plan: Plan, held_out: HeldOutPlan) -> HeldOutReport:
        """Report on held-out noise, as :meth:`Execution.evaluate`. A study whose losses no longer compare is refused.

        Raises:
            LcscError: as :meth:`open` and :meth:`Execution.evaluate`.
        """
        with self.open(plan) as execution:
            return execution.evaluate(held_out)

    def outcome(self, plan: Plan) -> str:
        """One line for people: the result of a study."""
        study = HistoryReader(self.storage).read_summary(plan.name)
        line = "no result on the search's noise"
        if study.searched is not None:
            line = f"best {study.sign * study.searched:.4g}"
        if study.held_out_loss is not None:
            line += f", held-out {study.sign * study.held_out_loss:.4g}"
        line += f" after {study.evaluations} evaluations"
        if study.summary.failed:
            line += f" ({study.summary.failed} failed: lcsc show {plan.name})"
        return line


def _larger_report(plan: Plan, stored: Attributes) -> str:
    """What makes the report that the study file asks for by now, if the study's has fewer images."""
    report = HeldOutReport.from_json(stored.get("held_out"))
    held_out = plan.spec.held_out
    if report is None or not report.images or held_out is None or held_out.images is None:
        return ""
    if held_out.images <= report.images:
        return ""
    command = f"lcsc evaluate {plan.name} --images {held_out.images} --keep"
    return f"; the report is of {report.images} images: {command}"


def check_new_studies(
    resolved: Sequence[Resolved], studies: StoredStudies, objectives: ObjectiveLoader, *, accept_changes: bool = False
) -> None:
    """Refuse what the first objective does not allow, before anything is written.

    The other objectives are loaded when their turn comes: only one is in memory at a time.

    Args:
        resolved: studies in the order in which they will run, resolved without their objectives.
        studies: the contents of the database.
        objectives: loads the first objective, and keeps it.
        accept_changes: as of :class:`Executor`.

    Raises:
        LcscError: a new study with the first objective could not be searched.
    """
    first = resolved[0].plan.objective_key
    new = [study.plan for study in resolved if study.state == "new" and study.plan.objective_key == first]
    if not new:
        return
    evidence = objectives.evidence(new[0], lambda: studies.attributes)
    for plan in new:
        resolve(plan, studies, evidence, accept_changes=accept_changes)


def objective_of(study: StoredStudy, functions: Mapping[str, Callable[..., Any]] | None = None) -> Objective:
    """The objective of a stored study. Loading it may train or read a model.

    Args:
        study: the study.
        functions: those that its caller handed over, where its settings name such.
    """
    plan = Plan.of(study)
    if functions is not None:
        plan = dataclasses.replace(plan, functions=functions)
    return Executor(study.storage).objective(plan)


def mergeable_objective_of(study: StoredStudy) -> Objective:
    """As :func:`objective_of`, to merge and not to evaluate: the model, functions and data may not be needed."""
    alone = checkpoints_alone_of(study)
    return objective_of(study) if alone is None else alone


def checkpoints_alone_of(study: StoredStudy) -> CheckpointsAlone | None:
    """The checkpoints of a stored study, if nothing else of its objective is needed to merge them."""
    plan = Plan.of(study)
    known = known_checkpoints(plan, read_database(study.storage).attributes)
    alone = CheckpointsAlone.of(plan.spec.objective, BuildContext(plan.directory, known, files=plan.files))
    if alone is not None and plan.spec.space.rows is not None:
        alone.merge_in_rows(plan.spec.space.rows)
    return alone
