"""One study of a run: compared once with the database, rehearsed, searched and reported.

::

    with prepared(spec, context, objective, studies, trials=…) as study:  # nothing is written
        study.rehearse([spec])
        with study.held(storage):
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

import numpy as np
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import SEARCH, Candidate, Coefficients
from lcsc_opt.base.study_file import BudgetSpec, StudySpec
from lcsc_opt.database.history import NODES, sign_of
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Evaluator, Failure, InProcessEvaluator, Outcome
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.evaluation.pool import ProcessEvaluator, WorkerPool
from lcsc_opt.evaluation.spread import SpreadEvaluator
from lcsc_opt.exports.images import attach_images
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.optimizers.registry import OURS, configure
from lcsc_opt.study.callbacks import TrialCallback
from lcsc_opt.study.comparison import Attributes, Compared, StoredTrials, compare, is_searched
from lcsc_opt.study.held_out import HeldOutPlan, score_held_out, score_trained_models
from lcsc_opt.study.planning import check, most, new_driver, space_of, why_incomplete
from lcsc_opt.study.rehearsal import rehearse
from lcsc_opt.study.resources import fingerprint_of, open_workers
from lcsc_opt.study.runner import Search
from lcsc_opt.study.timing import SEARCH_SECONDS, Pace, evaluations_in
from lcsc_opt.study.yardstick import yardstick_on
from lcsc_opt.views.study_status import shares_of_time

_NODES_SECONDS = 10.0  # between two writes of the workers' state
_SHOWN_SECONDS = 10.0  # of a search, from which on its last line says where they went
_ASKED = 100  # evaluations that an optimizer plans with where none are made


@contextlib.contextmanager
def prepared(
    spec: StudySpec,
    context: BuildContext,
    objective: Objective,
    studies: Mapping[str, Attributes],
    *,
    trials: Callable[[str], StoredTrials],
    origin: Coefficients | None = None,
    accept_changes: bool = False,
    retry_failed: bool = False,
    measures: bool = True,
) -> Iterator[PreparedStudy]:
    """A study that may run, with its workers. Nothing is written.

    Args:
        spec: of the study.
        context: where its files are, and the functions that the caller handed over.
        objective: what it searches.
        studies: name → attributes of all stored studies, with which it is compared.
        trials: gives the trials of a stored study.
        origin: where a new study begins, if another one has found that.
        accept_changes: continue although the code, the versions or the reference have changed.
        retry_failed: trials that failed after the last success are repeated, and earlier failures do not end
            the search.
        measures: whether losses will be added; if not, other code and versions are no matter.

    Raises:
        StudyStoreError: it was created with other code, checkpoints or settings, or its losses would not compare with
            those of the experiment's other studies.
        LcscError: the objective, this machine or the Ray cluster does not allow the study.
            What a node lacks shows when its worker starts.
    """
    fingerprint = fingerprint_of(objective)
    compared = compare(
        spec,
        studies,
        objective,
        fingerprint,
        directory=context.directory,
        origin=origin,
        trials=trials,
        accept_changes=accept_changes,
        measures=measures,
    )
    for line in compared.notices:
        notice(line)
    known = {**studies, spec.name: compared.attributes}
    with open_workers(compared.spec, context, objective, fingerprint, known) as pool:
        yield PreparedStudy(compared, objective, pool, retry_failed=retry_failed)


class PreparedStudy:
    """A study that :func:`prepared` has compared.

    Attributes:
        spec: its specification.
        objective: what is searched.
        origin: ``[K]`` or ``[S, K]``, where it begins; ``None`` for the origin of its space.
        pool: the workers; ``None`` if this process evaluates.
        stored: the study in the database, while it is :meth:`held`.
    """

    stored: StoredStudy

    def __init__(
        self, compared: Compared, objective: Objective, pool: WorkerPool | None, *, retry_failed: bool
    ) -> None:
        self.spec = compared.spec
        self.objective = objective
        origin = compared.before.get("origin")
        self.origin = None if origin is None else np.array(origin, dtype=np.float64)
        self.pool = pool
        self._compared = compared
        self._retry_failed = retry_failed

    @property
    def attributes(self) -> Attributes:
        """The attributes of the stored study, or those that a new one begins with."""
        return self._compared.attributes

    def rehearse(self, specs: Sequence[StudySpec]) -> Pace:
        """Evaluate one candidate on one batch, as the searches and the reports of these studies will.

        Args:
            specs: those of this objective that have no result yet.

        Returns:
            How long the evaluations took.

        Raises:
            StudySpecError: the objective does not allow one of them.
            ObjectiveError: the candidate could not be evaluated.
        """
        if not specs:
            return Pace()
        for spec in specs:
            check(spec, self.objective)
        first = self._first_candidate(gradient=any(configure(spec.optimizer).needs_gradient for spec in specs))
        evaluator = self._evaluator(self._compared.before["parallelism"])
        with contextlib.closing(evaluator):
            return rehearse(
                self.spec.experiment,
                self.objective,
                self._persistently(evaluator),
                first,
                report=any(spec.held_out is not None for spec in specs),
            )

    def ask_once(self) -> None:
        """Ask the optimizer for a candidate that nobody evaluates.

        Raises:
            SearchFailedError: it does not run here, as one whose package is missing.
        """
        with self._new_driver(BudgetSpec(evaluations=_ASKED)) as driver:
            driver.ask()

    def _new_driver(self, planned: BudgetSpec) -> Driver:
        """A fresh optimizer that plans with this budget."""
        asks = self._compared.before["parallelism"]
        return new_driver(
            self.spec,
            self.objective,
            planned,
            origin=self.origin,
            defaults=self._compared.before.get("optimizer_defaults", {}),
            workers=min(asks.get("workers", self.spec.worker_count), asks["in_flight"]),
        )

    @contextlib.contextmanager
    def held(self, storage: RDBStorage) -> Iterator[None]:
        """Create or open the study, and hold its lock while this is open.

        Raises:
            StudyStoreError: another process runs the study, or has changed it since it was compared.
        """
        compared = self._compared
        study = StoredStudy.open_or_create(storage, self.spec.name, compared.attributes)
        with study.hold():
            stored = study.attributes
            compared.check_unchanged(stored)
            for name, value in compared.updated.items():
                if value != stored.get(name):
                    study.set_attribute(name, value)
            if self._retry_failed or compared.starts_over:
                retried = study.retry_failed()
                line = f"retrying {retried} trials that failed after the last success"
                if retried:
                    line += "; earlier failures are kept, because later candidates depend on them"
                notice(f"{study.name}: {line}")
            self.stored = study
            yield

    def search(self, callbacks: Sequence[TrialCallback] = (), *, seconds: float = 0.0) -> None:
        """Search until the budget is spent. A search that has ended is left as it is.

        One that a callback has stopped has not ended: it continues the next time.

        Args:
            callbacks: are called with Optuna's study and the trial, after each trial that ends in this run.
            seconds: how long this run may search, if the budget is a time.

        Raises:
            Exception: what a callback raises; all results so far are stored.
        """
        spec = self.spec
        study = self.stored
        before = study.attributes
        if is_searched(spec, before):
            return
        with self._one_by_one() as evaluate:
            score_trained_models(study, self.objective, self._report_plan(), evaluate)
            begin = time.monotonic()
            yardstick = yardstick_on(SEARCH, study, self.objective, evaluate)
        budget = most(spec, self.objective)
        if budget.unit == "seconds":  # of which this study has a share
            budget = BudgetSpec(seconds=max(math.ceil(before.get(SEARCH_SECONDS, 0.0) + seconds), 1))
        if budget.model_dump() != before["budget"]:
            study.set_attribute("search_ended", None)  # first: a crash in between must leave work to do
            study.set_attribute("budget", budget.model_dump())
        if before.get("held_out") is not None:  # of what an earlier run has found
            study.set_attribute("held_out", None)
        incomplete = why_incomplete(spec, self.objective)
        if incomplete is not None:
            notice(incomplete)
        starts_at_origin = spec.optimizer.name == "LCSC" or spec.optimizer.name not in OURS
        with contextlib.ExitStack() as stack:
            seconds_before = before.get(SEARCH_SECONDS, 0.0)
            stack.callback(lambda: study.set_attribute(SEARCH_SECONDS, seconds_before + time.monotonic() - begin))
            evaluator = stack.enter_context(contextlib.closing(self._evaluator(before["parallelism"])))
            planned = BudgetSpec(**before["optimizer_budget"])  # the first one, even if the budget is raised later
            if planned.seconds is not None:
                planned = self._planned(seconds, evaluator)
            driver = stack.enter_context(self._new_driver(planned))
            search = Search(
                study,
                driver,
                evaluator,
                budget=budget,
                seconds=seconds - (time.monotonic() - begin),
                first=self.origin if starts_at_origin else None,
                images_per_evaluation=self.objective.samples.per_evaluation,
                yardstick=yardstick,
                in_flight=before["parallelism"]["in_flight"],
                failures=spec.failures,
                changed="; ".join(change["changed"] for change in before.get("changes", ())),
                callbacks=callbacks,
            )
            with self._showing(search) as on_tell:
                search.run(on_tell)
        if search.stopped:
            notice(f"{study.name}: a callback has stopped the search before its budget was spent")
            return
        ended = {"evaluations": search.told, "exhausted": driver.finished, "at": time.time()}
        if spec.budget.seconds is not None:
            ended["deadline"] = spec.budget.seconds
        study.set_attribute("search_ended", ended)

    def report(self) -> None:
        """Report on held-out noise as the study file asks, unless there is a report."""
        if self.spec.held_out is None or self.stored.attributes.get("held_out") is not None:
            return
        plan = self._report_plan()
        if plan is None:
            notice(f"{self.spec.experiment}: nothing is held out: {self.objective.why_nothing_held_out()}")
            return
        self.evaluate(plan)

    def _report_plan(self) -> HeldOutPlan | None:
        """The plan of the report that the study file asks for; ``None`` if there will be none."""
        held_out = self.spec.held_out
        if held_out is None or self.objective.why_nothing_held_out() is not None:
            return None
        images = 0
        if self.objective.samples.per_evaluation:
            images = held_out.images_with(self.objective.samples.per_report)
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
        if not self.objective.samples.per_evaluation:
            plan = dataclasses.replace(plan, images=0)
        with self._one_by_one() as evaluate:
            report = score_held_out(self.stored, self.objective, plan, evaluate)
        if self.pool is not None:
            self.pool.close()  # which frees the devices
        if plan.keep:
            attach_images(self.stored, self.objective)
        return report

    def _planned(self, seconds: float, evaluator: Evaluator) -> BudgetSpec:
        """What the optimizer of a new study plans with, if its budget is a time; it is stored."""
        evaluations = evaluations_in(
            seconds * self.stored.attributes["parallelism"]["workers"],
            self._first_candidate(gradient=configure(self.spec.optimizer).needs_gradient),
            self._new_driver,
            self._persistently(evaluator),
        )
        notice(f"{self.stored.name}: {seconds:.3g} s are about {evaluations} evaluations")
        planned = BudgetSpec(evaluations=evaluations)
        self.stored.set_attribute("optimizer_budget", planned.model_dump())
        return planned

    def _evaluator(self, parallelism: Mapping[str, Any]) -> Evaluator:
        """The workers there are now, for a study that may have begun with others.

        One candidate at a time is shared by all workers. If stages overlap, each worker has two candidates.
        """
        in_flight = parallelism["in_flight"]
        staged = isinstance(self.objective, StagedObjective)
        overlaps = isinstance(self.objective, StagedObjective) and self.objective.overlaps
        if self.pool is None:
            if in_flight > 1 and overlaps:
                return Pipeline(self.objective)
            return InProcessEvaluator(self.objective)
        if in_flight == 1 and staged:
            return SpreadEvaluator(self.objective, self.pool)
        most_jobs = 2 if overlaps and in_flight >= 2 * len(self.pool) else 1
        return ProcessEvaluator(self.pool, most_jobs=most_jobs)

    @contextlib.contextmanager
    def _one_by_one(self) -> Iterator[Callable[[Candidate], Outcome]]:
        """Evaluates one candidate at a time, by all workers together if the objective allows it; tries again."""
        evaluator: Evaluator
        if self.pool is not None and isinstance(self.objective, StagedObjective):
            evaluator = SpreadEvaluator(self.objective, self.pool)
        else:
            evaluator = InProcessEvaluator(self.objective)

        with contextlib.closing(evaluator):
            yield self._persistently(evaluator)

    def _first_candidate(self, *, gradient: bool) -> Candidate:
        """A candidate at the origin of the space."""
        space = space_of(self.spec, self.objective, self.origin)
        return Candidate(space.to_coefficients(np.zeros(space.shape)), gradient=gradient)

    def _persistently(self, evaluator: Evaluator) -> Callable[[Candidate], Outcome]:
        """Evaluates a candidate; one that fails is tried again, as often as the study file allows."""

        def evaluate(candidate: Candidate) -> Outcome:
            for _ in range(self.spec.failures.retries + 1):
                outcome = evaluator.submit(candidate).result()
                if not (isinstance(outcome, Failure) and outcome.retry):
                    break
            return outcome

        return evaluate

    @contextlib.contextmanager
    def _showing(self, search: Search) -> Iterator[Callable[[Search], None]]:
        """A progress line while this is open; yields what :meth:`Search.run` calls.

        The state of each machine's workers is written now and then, and at the end.
        """
        if search.last_stored is not None:
            notice(f"{search.name}: continuing after trial {search.last_stored}")
        is_timed = search.budget.seconds is not None
        shown = search.seconds_spent if is_timed else search.stored_spent
        nodes_written_at = -math.inf

        with progress(search.name, search.budget.total, done=shown) as advance:

            def on_tell(search: Search) -> None:
                nonlocal shown, nodes_written_at
                spent = search.seconds_spent if is_timed else search.spent
                advance(max(spent - shown, 0), note=self._progress_note(search))
                shown = max(shown, spent)
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
        if self.pool is not None and self.spec.ray is not None:
            notes.append(f"{self.pool.alive} of {len(self.pool)} workers")
        return ", ".join(notes)

    def _write_nodes(self) -> None:
        """Write what the workers of each machine do."""
        if self.pool is not None:
            nodes = [dataclasses.asdict(node) for node in self.pool.nodes()]
            self.stored.set_attribute(NODES, {"seen_at": time.time(), "nodes": nodes})


def outcome_of(name: str, storage: RDBStorage) -> str:
    """One line for people: the result of a study."""
    study = HistoryReader(storage).read_summary(name)
    line = "no result on the search's noise"
    if study.searched is not None:
        line = f"best {study.sign * study.searched:.4g}"
    if study.held_out_loss is not None:
        line += f", held-out {study.sign * study.held_out_loss:.4g}"
    line += f" after {study.evaluations} evaluations"
    if study.seconds >= _SHOWN_SECONDS:
        line += f" (time: {shares_of_time(study)})"
    if study.summary.failed:
        line += f" ({study.summary.failed} failed: lcsc show {name})"
    return line


def larger_report(spec: StudySpec, stored: Attributes) -> str:
    """What makes the report that the study file asks for by now, if the study's has fewer images."""
    report = HeldOutReport.from_json(stored.get("held_out"))
    held_out = spec.held_out
    if report is None or not report.images or held_out is None or held_out.images is None:
        return ""
    if held_out.images <= report.images:
        return ""
    command = f"lcsc evaluate {spec.name} --images {held_out.images} --keep"
    return f"; the report is of {report.images} images: {command}"
