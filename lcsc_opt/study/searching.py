"""One study, searched by this process: compared once with the database, rehearsed, searched and reported.

::

    with Search.open(spec, objective, studies, …) as search:  # nothing is written
        search.rehearse([spec])
        with search.held(storage):
            search.run()  # ask → write → evaluate → write → tell
            search.report()  # the answer on held-out noise
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import ObjectiveError, StudyStoreError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import CONTIGUOUS, SEARCH, Candidate, Coefficients
from lcsc_opt.base.study_spec import BudgetSpec, StudySpec
from lcsc_opt.database.history import NODES
from lcsc_opt.database.names import split_name
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.states import Attributes, is_searched
from lcsc_opt.database.store import StoredStudy, StoredTrials
from lcsc_opt.evaluation.base import Evaluator, InProcessEvaluator, Outcome, persistently
from lcsc_opt.evaluation.layouts import InLayout
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.evaluation.pool import ProcessEvaluator, WorkerPool
from lcsc_opt.evaluation.spread import SpreadEvaluator
from lcsc_opt.evaluation.workers import open_workers
from lcsc_opt.exports.images import attach_images
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.objective.loading import fingerprint_of
from lcsc_opt.objective.of_study import loader_of
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.optimizers.registry import OURS, configure
from lcsc_opt.study.comparison import check_siblings, compare, with_workers
from lcsc_opt.study.held_out import HeldOutPlan, score_held_out
from lcsc_opt.study.loop import Loop, TrialCallback
from lcsc_opt.study.measuring import score_trained_models
from lcsc_opt.study.planning import (
    advice,
    check,
    first_attributes,
    first_candidate,
    new_driver,
    usable_budget,
    why_incomplete,
)
from lcsc_opt.study.rehearsal import rehearse
from lcsc_opt.study.timing import SEARCH_SECONDS, Pace, evaluations_in
from lcsc_opt.study.yardstick import yardstick_on

LAYOUT = "layout"  # the attribute that says how the network's weights lie in memory, the same for all trials
_NODES_SECONDS = 10.0  # between two writes of the workers' state
_PLANNED_IN_A_DRY_RUN = 100  # evaluations, of which none are made


class Search:
    """One study, being searched.

    Args:
        before: the attributes of the stored study, or those that a new one begins with.
        updated: those that have changed, which are written when the study is :meth:`held`.
        budget: of the specification, as far as the optimizer can spend it.
        retry_failed: whether trials that failed after the last success are asked again.

    Attributes:
        spec: its specification.
        objective: what is searched.
        attributes: ``before`` with ``updated`` and the layout, without what the search writes later.
        stored: the study in the database, from when it is first :meth:`held`.
    """

    stored: StoredStudy

    def __init__(
        self,
        spec: StudySpec,
        objective: Objective,
        before: Attributes,
        updated: Attributes,
        *,
        budget: BudgetSpec,
        retry_failed: bool,
    ) -> None:
        self.spec = spec
        self.objective = objective
        self.attributes = {**before, **updated}
        self._before = before
        self._updated = updated
        self._retry_failed = retry_failed
        self._repeated = 0  # trials that are asked again
        self._budget = budget
        origin = before.get("origin")
        self._origin = None if origin is None else np.array(origin, dtype=np.float64)
        self._pool: WorkerPool | None = None  # None: this process evaluates
        self._layout: str = self.attributes.get(LAYOUT, CONTIGUOUS)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        spec: StudySpec,
        objective: Objective,
        studies: Mapping[str, Attributes],
        *,
        context: BuildContext,
        trials: Callable[[str], StoredTrials],
        origin: Coefficients | None = None,
        accept_changes: bool = False,
        retry_failed: bool = False,
        measures: bool = True,
    ) -> Iterator[Search]:
        """Compare a study with what is stored, and open its workers. Nothing is written; what changed is a notice.

        Args:
            spec: of the study.
            objective: what it searches.
            studies: name → attributes of all stored studies, with which it is compared.
            context: where its files are, and the functions that the caller handed over.
            trials: gives the trials of a stored study.
            origin: where a new study begins: the answer of another one, if there is one.
            accept_changes: continue although the code, the versions or the reference have changed.
            retry_failed: trials that failed after the last success are repeated, and earlier failures do not end
                the search.
            measures: whether losses will be added; if not, other code and versions do not matter.

        Raises:
            StudyStoreError: it was created with other code, checkpoints or settings, or its losses would not compare
                with those of the experiment's other studies.
            LcscError: the objective, this machine or the Ray cluster does not allow the study.
                What a node lacks shows when its worker starts.
        """
        fingerprint = fingerprint_of(objective)
        stored = studies.get(spec.name)
        layout = _layout_of_experiment(spec, studies)
        spec = with_workers(spec)
        # the study file may have been edited in what changes no result, and its files may have moved
        updated: dict[str, Any] = {
            "specification": spec.model_dump(mode="json"),
            "places": dict(objective.places),
            "holds_out": objective.why_nothing_held_out() is None,
        }
        if stored is None:
            check_siblings(spec, studies, fingerprint, accept=accept_changes)
            check(spec, objective)
            for line in advice(spec, objective):
                notice(line)
            directory = None if context.directory is None else str(context.directory)
            first = first_attributes(spec, objective, origin)
            before: Attributes = {
                **first,
                **layout,
                "directory": directory,
                "fingerprint": fingerprint,
                **updated,
            }
        else:
            continuation = compare(spec, stored, fingerprint, trials, accept_changes=accept_changes, measures=measures)
            for line in continuation.notices:
                notice(line)
            check(spec, objective)
            before = stored
            updated |= continuation.changed
            retry_failed = retry_failed or continuation.starts_over
        incomplete = why_incomplete(spec, objective)
        if incomplete is not None:
            notice(incomplete)
        search = cls(
            spec,
            objective,
            before,
            updated,
            budget=usable_budget(spec, objective),
            retry_failed=retry_failed and stored is not None,
        )

        def loader() -> Callable[[], Objective]:
            # of all studies and this one, which may be new: workers find the same checkpoints
            return loader_of(spec, context, {**studies, spec.name: search.attributes})

        with open_workers(spec, objective, expected=fingerprint, loader=loader, context=context) as search._pool:
            yield search

    def rehearse(self, specs: Sequence[StudySpec]) -> Pace:
        """Evaluate one candidate on one batch, as the searches and the reports of these studies will.

        Args:
            specs: those of this objective that have no result yet; this study is one of them.

        Returns:
            How long the evaluations took, and the layout of the network for :meth:`use_layout`.

        Raises:
            StudySpecError: the objective does not allow one of them.
            ObjectiveError: the candidate could not be evaluated.
        """
        evaluator = self._in_any_layout(self._before["parallelism"])
        for spec in specs:
            check(spec, self.objective)
        first = first_candidate(self.spec, self.objective, self._origin)
        follows_gradient = [spec for spec in specs if configure(spec.optimizer).needs_gradient]
        if follows_gradient:
            # in its rows, and not at its origin, which may be the answer of a grid that is still to run
            first = first_candidate(follows_gradient[0], self.objective, None, gradient=True)
        with contextlib.closing(evaluator):
            return rehearse(
                self.spec.experiment,
                self.objective,
                persistently(evaluator, self.spec.failures.retries),
                dataclasses.replace(first, layout=self._layout),
                report=any(spec.held_out is not None for spec in specs),
                chooses_layout=LAYOUT not in self.attributes,
            )

    def use_layout(self, layout: str) -> None:
        """Evaluate in this layout from now on, unless the study or its experiment has one."""
        if LAYOUT not in self.attributes:
            self.attributes[LAYOUT] = layout
            self._layout = layout

    def ask_once(self) -> None:
        """Ask the optimizer for a candidate that nobody evaluates: a dry run shows so whether the optimizer works here.

        Raises:
            SearchFailedError: it does not, as one whose package is missing.
            StudySpecError: the study begins where its space has no point.
        """
        with self._new_driver(BudgetSpec(evaluations=_PLANNED_IN_A_DRY_RUN)) as driver:
            driver.ask()

    @contextlib.contextmanager
    def held(self, storage: RDBStorage) -> Iterator[None]:
        """Create or open the study, and hold its lock while this is open.

        What changed is written, and failed trials are forgotten if they are to be asked again.

        Raises:
            StudyStoreError: another process runs the study, or has changed it since it was compared.
        """
        study = StoredStudy.open_or_create(storage, self.spec.name, self.attributes)
        with study.hold():
            stored = study.attributes
            for name in ("specification", "fingerprint"):
                expected = json.loads(json.dumps(self._before.get(name)))  # tuples become lists, as in the database
                if stored[name] != expected:
                    raise StudyStoreError(f"{self.spec.name}: another process has just changed it; run this again")
            for name, value in self._updated.items():
                if value != stored.get(name):
                    study.set_attribute(name, value)
            if self._retry_failed:
                self._repeated = study.retry_failed()
                if self._repeated:
                    notice(
                        f"{study.name}: trials that failed after the last success are repeated: {self._repeated}; "
                        "earlier failures are kept, because later candidates depend on them"
                    )
            self.stored = study
            yield

    def run(self, callbacks: Sequence[TrialCallback] = (), *, seconds: float = 0.0) -> None:
        """Search until the budget is spent. Does nothing if the search has already ended.

        One that a callback has stopped has not ended: it continues the next time.

        Args:
            callbacks: are called with Optuna's study and the trial, after each trial that ends in this run.
            seconds: how long this run may search, if the budget is a time.

        Raises:
            LcscError: the search fails, or the optimizer does not ask the stored candidates again.
            Exception: what a callback raises; all results so far are stored.
        """
        study = self.stored
        if is_searched(self.spec, study.attributes):
            return
        with self._one_by_one() as evaluate:
            plan = self._report_plan()
            score_trained_models(study, self.objective, None if plan is None else plan.images, evaluate)
            begin = time.monotonic()
            yardstick = yardstick_on(SEARCH, study, self.objective, evaluate)
        budget = self._begun_budget(seconds)
        stored = study.attributes
        # grids ask what they list, and our other optimizers begin at the origin by themselves
        suggests_origin = self.spec.optimizer.name == "LCSC" or self.spec.optimizer.name not in OURS
        with (
            self._counting_seconds(begin),
            contextlib.closing(self._evaluator(stored["parallelism"])) as evaluator,
            self._new_driver(self._planned(seconds, evaluator)) as driver,
        ):
            loop = Loop(
                study,
                driver,
                evaluator,
                budget=budget,
                seconds=seconds - (time.monotonic() - begin),
                repeated=self._repeated,
                first=self._origin if suggests_origin else None,
                images_per_evaluation=self.objective.samples.per_evaluation,
                yardstick=yardstick,
                in_flight=stored["parallelism"]["in_flight"],
                failures=self.spec.failures,
                changed="; ".join(change["changed"] for change in stored.get("changes", ())),
                callbacks=callbacks,
            )
            with self._showing(loop) as on_progress:
                loop.run(on_progress)
        if loop.stopped:
            notice(f"{study.name}: a callback has stopped the search before its budget was spent")
            return
        ended = {"evaluations": loop.told, "exhausted": driver.finished, "at": time.time()}
        if self.spec.budget.seconds is not None:
            ended["deadline"] = self.spec.budget.seconds
        study.set_attribute("search_ended", ended)

    def report(self) -> None:
        """Report on held-out noise as the study file asks, unless there is a report.

        Where nothing is held out, a notice says why.

        Raises:
            LcscError: as :meth:`evaluate`.
        """
        if self.spec.held_out is None or self.stored.attributes.get("held_out") is not None:
            return
        plan = self._report_plan()
        if plan is None:
            notice(f"{self.spec.experiment}: nothing is held out: {self.objective.why_nothing_held_out()}")
            return
        self.evaluate(plan)

    def evaluate(self, plan: HeldOutPlan) -> HeldOutReport:
        """Choose among the best trials on selection noise, and report the chosen one on held-out noise.

        This is the last work of the workers. With ``plan.keep``, images of the answer are stored, too.

        Raises:
            ObjectiveError: this objective has no held-out loss.
            LcscError: as :func:`~lcsc_opt.study.held_out.score_held_out`.
        """
        reason = self.objective.why_nothing_held_out()
        if reason is not None:
            raise ObjectiveError(f"{self.stored.name}: nothing is held out, so nothing can be reported: {reason}")
        if not self.objective.samples.per_evaluation:
            plan = dataclasses.replace(plan, images=0)
        with self._one_by_one() as evaluate:
            report = score_held_out(self.stored, self.objective, plan, evaluate)
        if self._pool is not None:
            self._pool.close()  # which frees the devices
        if plan.keep:
            attach_images(self.stored, self.objective)
        return report

    def _report_plan(self) -> HeldOutPlan | None:
        """The plan of the report that the study file asks for; ``None`` if there will be none."""
        held_out = self.spec.held_out
        if held_out is None or self.objective.why_nothing_held_out() is not None:
            return None
        images = 0
        if self.objective.samples.per_evaluation:
            images = held_out.images_with(self.objective.samples.per_report)
        return HeldOutPlan(images, held_out.top)

    # the budget

    def _begun_budget(self, seconds: float) -> BudgetSpec:
        """The total for this run, which may search for ``seconds`` if the budget is a time.

        A total that differs from the stored one is stored, and reopens an ended search. An earlier report is cleared.
        """
        study = self.stored
        before = study.attributes
        budget = self._budget
        if budget.unit == "seconds":  # of which this study has a share
            budget = BudgetSpec(seconds=max(math.ceil(before.get(SEARCH_SECONDS, 0.0) + seconds), 1))
        if budget.model_dump() != before["budget"]:
            study.set_attribute("search_ended", None)  # first: a crash in between must leave work to do
            study.set_attribute("budget", budget.model_dump())
        if before.get("held_out") is not None:
            study.set_attribute("held_out", None)
        return budget

    @contextlib.contextmanager
    def _counting_seconds(self, begin: float) -> Iterator[None]:
        """Store how long the searches of all runs have taken, when this is closed; this one's began at ``begin``."""
        seconds_before = self.stored.attributes.get(SEARCH_SECONDS, 0.0)
        try:
            yield
        finally:
            self.stored.set_attribute(SEARCH_SECONDS, seconds_before + time.monotonic() - begin)

    def _planned(self, seconds: float, evaluator: Evaluator) -> BudgetSpec:
        """What the optimizer plans with: the study's first budget, or the evaluations that fit into a time.

        That number is estimated once and stored; a notice says it.
        """
        planned = BudgetSpec(**self.stored.attributes["optimizer_budget"])
        if planned.seconds is None:
            return planned
        gradient = configure(self.spec.optimizer).needs_gradient
        evaluations = evaluations_in(
            seconds * self.stored.attributes["parallelism"]["workers"],
            first_candidate(self.spec, self.objective, self._origin, gradient=gradient),
            self._new_driver,
            persistently(evaluator, self.spec.failures.retries),
        )
        notice(f"{self.stored.name}: {seconds:.3g} s are enough for about {evaluations} evaluations")
        planned = BudgetSpec(evaluations=evaluations)
        self.stored.set_attribute("optimizer_budget", planned.model_dump())
        return planned

    def _new_driver(self, planned: BudgetSpec) -> Driver:
        """A fresh optimizer that plans with this budget, and with the workers that the study began with.

        Others would make it ask other candidates than those that are stored.
        """
        return new_driver(
            self.spec,
            self.objective,
            planned,
            origin=self._origin,
            defaults=self._before["optimizer_defaults"],
            workers=self._before["parallelism"]["workers"],
        )

    # who evaluates

    def _evaluator(self, parallelism: Mapping[str, Any]) -> Evaluator:
        """Evaluates every candidate in the layout of the study."""
        return InLayout(self._in_any_layout(parallelism), self._layout)

    def _in_any_layout(self, parallelism: Mapping[str, Any]) -> Evaluator:
        """Uses the workers of this run; the study may have begun with others.

        One candidate at a time is shared by all workers. If stages overlap, each worker has two candidates.
        """
        in_flight = parallelism["in_flight"]
        staged = isinstance(self.objective, StagedObjective)
        overlaps = isinstance(self.objective, StagedObjective) and self.objective.overlaps
        if self._pool is None:
            if overlaps and in_flight > 1 and isinstance(self.objective, StagedObjective):
                return Pipeline(self.objective)
            return InProcessEvaluator(self.objective)
        if in_flight == 1 and staged:
            return SpreadEvaluator(self.objective, self._pool)
        most_jobs = 2 if overlaps and in_flight >= 2 * len(self._pool) else 1
        return ProcessEvaluator(self._pool, most_jobs=most_jobs)

    @contextlib.contextmanager
    def _one_by_one(self) -> Iterator[Callable[[Candidate], Outcome]]:
        """Evaluates one candidate at a time, by all workers together if the objective allows it; tries again."""
        evaluator: Evaluator
        if self._pool is not None and isinstance(self.objective, StagedObjective):
            evaluator = SpreadEvaluator(self.objective, self._pool)
        else:
            evaluator = InProcessEvaluator(self.objective)

        with contextlib.closing(InLayout(evaluator, self._layout)) as in_layout:
            yield persistently(in_layout, self.spec.failures.retries)

    # what is shown

    @contextlib.contextmanager
    def _showing(self, loop: Loop) -> Iterator[Callable[[Loop], None]]:
        """A progress line while this is open; yields what :meth:`Loop.run` calls.

        The state of each machine's workers is written now and then, and at the end.
        """
        if loop.last_stored is not None:
            notice(f"{loop.name}: continuing after trial {loop.last_stored}")
        is_timed = loop.budget.seconds is not None
        shown = loop.seconds_spent if is_timed else loop.stored_spent  # what is replayed is not shown again
        nodes_written_at = -math.inf

        with progress(loop.name, loop.budget.total, done=shown) as advance:

            def on_progress(loop: Loop) -> None:
                nonlocal shown, nodes_written_at
                spent = loop.seconds_spent if is_timed else loop.spent
                advance(max(spent - shown, 0), note=self._progress_note(loop))
                shown = max(shown, spent)
                if time.monotonic() - nodes_written_at >= _NODES_SECONDS:
                    nodes_written_at = time.monotonic()
                    self._write_nodes()

            on_progress(loop)
            yield on_progress
            self._write_nodes()

    def _progress_note(self, loop: Loop) -> str:
        notes = []
        if loop.best is not None:
            loss, number = loop.best
            notes.append(f"best {self.stored.sign * loss:.4g} in trial {number}")
        if loop.failed:
            notes.append(f"{loop.failed} failed")
        if self._pool is not None and self.spec.ray is not None:
            notes.append(f"{self._pool.alive} of {len(self._pool)} workers")
        return ", ".join(notes)

    def _write_nodes(self) -> None:
        """Write what the workers of each machine do."""
        if self._pool is not None:
            nodes = [dataclasses.asdict(node) for node in self._pool.nodes()]
            self.stored.set_attribute(NODES, {"seen_at": time.time(), "nodes": nodes})


def _layout_of_experiment(spec: StudySpec, studies: Mapping[str, Attributes]) -> dict[str, str]:
    """The layout that the experiment's other studies have, as an attribute; empty if there is none yet."""
    for name, attributes in studies.items():
        if split_name(name)[0] == spec.experiment and LAYOUT in attributes:
            return {LAYOUT: attributes[LAYOUT]}
    return {}
