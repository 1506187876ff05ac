"""One experiment: compared once with what is stored, its searches, what was measured, its report and its answer.

::

    with Experiment(specs, database, objectives) as experiment:  # nothing is loaded or written
        for spec in specs:
            experiment.search(spec)  # the objective is loaded, compared and rehearsed once
        experiment.report()  # all models once, and the answer
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError, ObjectiveError, StudyStoreError
from lcsc_opt.base.machine import short_waits
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import SEARCH, Candidate
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.study_spec import HeldOutSpec, ObjectiveSpec, Rule, StudySpec
from lcsc_opt.database.experiment import LAYOUT, PROBLEM, StoredExperiment
from lcsc_opt.database.lock import locked
from lcsc_opt.database.opened import Database
from lcsc_opt.database.report import REPORT, Report, ReportPlan
from lcsc_opt.database.states import Attributes, is_searched
from lcsc_opt.database.store import StoredStudy, has_succeeded, read_contents
from lcsc_opt.evaluation.base import Outcome, persistently
from lcsc_opt.evaluation.pool import WorkerPool
from lcsc_opt.evaluation.workers import check_workers, open_workers
from lcsc_opt.experiment.finalists import Searched
from lcsc_opt.experiment.looking import write_first_look
from lcsc_opt.experiment.measuring import Measurer, score_as_trained
from lcsc_opt.experiment.origin import origin_of, start_of
from lcsc_opt.experiment.outcome import outcome_of
from lcsc_opt.experiment.problem import (
    ACCEPT,
    ANEW,
    Problem,
    check_environment,
    check_search,
    code_changes,
    differences,
    settings_of,
)
from lcsc_opt.experiment.rehearsal import Rehearsal, about, rehearse, warning_of_kept_state
from lcsc_opt.experiment.report import is_reported, make_report
from lcsc_opt.experiment.timing import evaluations_in, report_seconds, searches_seconds
from lcsc_opt.exports.grid import first_look
from lcsc_opt.exports.images import attach_images
from lcsc_opt.objective.checkpoints_alone import checkpoint_changes
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective, verify_weights
from lcsc_opt.objective.of_study import ObjectiveLoader, code_now, moved
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.study.loop import TrialCallback
from lcsc_opt.study.opening import Search, evaluator_of
from lcsc_opt.study.planning import check, first_candidate, is_maximized, parallelism, usable_budget
from lcsc_opt.trajectory import Trajectory


class Experiment:
    """One experiment of a database, for the searches of one run; a context manager that ends its workers.

    Args:
        specs: of the searches; all have one objective and one name.
        database: of the run; a missing one is made when the first search begins.
        objectives: loads the objective.
        accept_changes: continue although the code, the versions or the reference have changed.

    Attributes:
        name: of the experiment.
        specs, database: the same.
        studies: name → attributes of its stored studies, as far as this process knows them.
        rehearsal: what this run has rehearsed; ``None`` before, and where all searches have results.
        refused: why the objective cannot be loaded or rehearsed, so that no search can run; ``None`` otherwise.
    """

    def __init__(
        self,
        specs: Sequence[StudySpec],
        database: Database,
        objectives: ObjectiveLoader,
        *,
        accept_changes: bool = False,
    ) -> None:
        self.name = specs[0].experiment
        self.specs = list(specs)
        self.database = database
        self.rehearsal: Rehearsal | None = None
        self.refused: LcscError | None = None
        self._rehearsed_rows: Rule | None = None
        self._objectives = objectives
        self._accept = accept_changes
        self.studies = database.contents.of(self.name)
        self._before: Attributes | None = database.contents.experiments.get(self.name)  # None for a new one
        self._stored: StoredExperiment | None = None  # from when this run has begun it
        self._accepted = ""  # what changed since the experiment began
        self._workers = contextlib.ExitStack()
        self._waits = contextlib.ExitStack()
        self._workers_of: tuple[Any, Rule | None] | None = None  # which workers are open, in which rows
        self._pool: WorkerPool | None = None
        self._scored_as_trained = False
        self._has_estimate = False
        self._held_out = specs[0].held_out

    def __enter__(self) -> Experiment:
        self._waits.enter_context(short_waits())
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()
        self._waits.close()

    # what is stored, and whether it is still the same

    def is_finished(self, spec: StudySpec) -> bool:
        """Whether nothing is left to search. What now lies at another place is loaded, and compared by its content."""
        stored = self.studies.get(spec.name)
        if stored is None or self._before is None or not is_searched(spec, stored):
            return False
        if self._accept and self._code_changes("decides"):  # the search stores what was accepted
            return False
        before = ObjectiveSpec(**self._before["objective"])
        before_decides, _ = settings_of(before, {})
        now_decides, _ = settings_of(spec.objective, {})
        if before.file != spec.objective.file or before_decides != now_decides:
            return False
        check_search(spec, self.studies)
        return not moved(self._objectives.context.directory, self._before)

    def check_finished(self, spec: StudySpec) -> None:
        """Refuse to return what a finished search found by other code, or in checkpoints that were written again.

        Raises:
            StudyStoreError: that is so, and nobody has accepted it. What is no longer there counts as unchanged.
        """
        if self._accept or self._before is None:
            return
        changed = self._code_changes("decides")
        checkpoints = checkpoint_changes(self._before, self._objectives.context.files)
        if not changed and checkpoints.written_again:
            changed = "the checkpoints were written again"
        if changed:
            raise StudyStoreError(
                f"{spec.name}: the stored results are older than a change: {changed}. Give the new search another "
                f"name: {ANEW}; {ACCEPT}"
            )
        if checkpoints.has_later_steps:
            notice(f"{self.name}: there are newer checkpoints now; to search with these: {ANEW}")

    def _code_changes(self, part: str) -> str:
        """What of the stored code is other by now; what is no longer there counts as unchanged. Nothing is loaded.

        ``part`` is a field of :class:`Problem`: ``decides`` or ``reported``.
        """
        if self._before is None:
            return ""
        before = self._before[PROBLEM][part]["code"]
        now = {**before, **code_now(self.specs[0].objective, self._objectives.context.directory)}
        return "; ".join(code_changes(before, {name: now[name] for name in before}))

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective, loaded and compared with what is stored.

        Raises:
            LcscError: it cannot be loaded, or its losses would not compare with those that are stored.
        """
        spec = self.specs[0].objective
        objective = self._objectives.load(spec, self.specs[0].space.rows, self._before)
        verify_weights(objective)
        if self._before is not None:
            objective.layout = self._before[LAYOUT]
        self._problem = Problem.of(spec, objective, self._objectives.context.directory)
        if self._before is not None:
            self._compare(self._before, objective)
        return objective

    def _compare(self, before: Attributes, objective: Objective) -> None:
        """Compare the problem with the stored one, and say what changed and may change.

        Raises:
            StudyStoreError: losses would not compare with those that are stored.
        """
        changes = Problem(**before[PROBLEM]).changes(self._problem)
        changes.check(self.name, succeeded=self._has_succeeded, accept=self._accept)
        # what is stored once for all trials cannot become that of other ones, whatever is accepted
        other = [
            *differences(before["steps"], list(objective.steps), "steps"),
            *differences(before["maximize"], is_maximized(objective), "maximize"),
        ]
        if other:
            raise StudyStoreError(
                f"{self.name}: differs from the stored experiment: {'; '.join(other)}. Give the new one another name: "
                f"{ANEW}"
            )
        self._accepted = changes.decides
        if changes.decides:
            notice(f"{self.name}: continues with changes: {changes.decides}")
        if changes.reported:
            notice(f"{self.name}: reports change: {'; '.join(changes.reported)}")

    @property
    def _has_succeeded(self) -> bool:
        """Whether a trial of the experiment has a loss."""
        return any(has_succeeded(self.database.existing(), name) for name in self.studies)

    def begun(self) -> StoredExperiment:
        """What is stored of the experiment, which begins or continues in the database with the first call.

        Raises:
            StudyStoreError: another process has just begun it with another problem.
        """
        if self._stored is not None:
            return self._stored
        objective = self.objective
        trajectory = objective.trajectory
        directory = self._objectives.context.directory
        spec = self.specs[0]
        updated = {
            PROBLEM: dataclasses.asdict(self._problem),
            "objective": spec.objective.model_dump(mode="json"),
            "directory": None if directory is None else str(directory),
            "places": dict(objective.places),
            "report_images": objective.samples.per_report,
            "holds_out": objective.why_nothing_held_out() is None,
        }
        if self._held_out is not None:
            updated["held_out"] = self._held_out.model_dump(mode="json")
        written_once = {
            "checkpoints": trajectory.sha256 if isinstance(trajectory, Trajectory) else None,
            "steps": list(objective.steps),
            "maximize": is_maximized(objective),
            LAYOUT: objective.layout,
        }
        stored = StoredExperiment.open_or_create(self.database.made(), self.name, {**updated, **written_once})
        if self._before is None and stored.attributes[PROBLEM]["decides"] != self._problem.decides:
            raise StudyStoreError(f"{self.name}: another process has just begun it otherwise; run this again")
        if self._before is not None:
            self._note_changes(stored)
        for name, value in updated.items():
            stored.set_attribute(name, value)
        self._stored = stored
        return stored

    def _note_changes(self, stored: StoredExperiment) -> None:
        """Note what was accepted, and forget what would be measured otherwise now."""
        changes = Problem(**stored.attributes[PROBLEM]).changes(self._problem)
        if stored.report is not None and (changes.decides or changes.measures_otherwise):
            notice(f"{self.name}: the stored report is forgotten: it was measured before the change")
        if changes.decides:
            change = {"at": time.time(), "changed": changes.decides}
            stored.set_attribute("changes", [*(stored.attributes.get("changes") or ()), change])
            # stored losses are relative to what the earlier ones are relative to
            stored.forget_measured(yardsticks=not self._has_succeeded)
        elif changes.measures_otherwise:
            stored.forget_measured(yardsticks=False)

    # who evaluates

    def _use(self, spec: StudySpec, rows: Rule | None) -> None:
        """Merge in these rows from now on, in this process and in the workers of a search, which are opened for it."""
        objective = self.objective
        self._objectives.load(spec.objective, rows, self._before)  # the same object, whose rows this changes
        if self._workers_of == (spec.workers, rows):
            return
        self._workers.close()
        self._workers_of = None
        workers = open_workers(spec, objective, loader=self._loader(rows), context=self._objectives.context)
        self._pool = self._workers.enter_context(workers)
        # the rehearsal and the report evaluate one candidate at a time, which all workers share
        self._evaluator = evaluator_of(objective, self._pool, in_flight=1)
        self._workers.callback(self._evaluator.close)
        self._workers_of = (spec.workers, rows)  # only now: another search must not go on without its workers

    def _loader(self, rows: Rule | None) -> Callable[[], Objective]:
        """What loads the objective once more, in these rows and with the checkpoints of this process; picklable."""
        trajectory = self.objective.trajectory
        context = self._objectives.context
        if isinstance(trajectory, Trajectory):
            checkpoints = KnownCheckpoints(trajectory.sha256, trajectory.steps)
            context = dataclasses.replace(context, checkpoints=checkpoints)
        spec = self.specs[0].objective
        return functools.partial(load_objective, spec, context, rows=rows, layout=self.objective.layout)

    def _use_rows(self, rule: Rule | None) -> None:
        """Have workers for coefficients in these rows, whosever are open; one row can be evaluated in any."""
        if self._workers_of is None or rule not in (None, self._workers_of[1]):
            self._use(self.specs[-1], rule)  # of a stored experiment, those of its newest search

    def _evaluate(self, candidate: Candidate, rule: Rule | None) -> Outcome:
        """Evaluate a candidate in these rows, by all workers together if the objective allows it.

        One that fails is tried again.
        """
        self._use_rows(rule)
        return persistently(self._evaluator, self.specs[-1].failures.retries)(candidate)

    # searches

    def search(self, spec: StudySpec, callbacks: Sequence[TrialCallback] = ()) -> str:
        """Search until the budget is spent. Finished work is not repeated.

        Args:
            spec: of the study.
            callbacks: called with Optuna's study and the trial, after each trial that ends in this run.

        Returns:
            One line for people: the result.

        Raises:
            LcscError: the study cannot run, or fails.
            Exception: what a callback raises.
        """
        if spec.name in self.studies:  # before anything is loaded, since it may be held for long
            StoredStudy.open(self.database.existing(), spec.name).check_free()
        search = self._opened(spec)
        self._say_how_long()
        stored = self.begun()
        with search.held(stored.storage):
            self._score_as_trained()
            search.run(self._measurer(0).yardstick(SEARCH), pool=self._pool, callbacks=callbacks)
            self.studies[spec.name] = search.stored.attributes
            rows = spec.space.rows
            if self.rehearsal is not None and rows == self._rehearsed_rows:  # else workers would have to start again
                self.rehearsal.check_drift(self.name, lambda candidate: self._evaluate(candidate, rows))
        return outcome_of(stored.storage, spec.name)

    def rehearse(self) -> dict[str, Attributes]:
        """Do all that comes before the first trial of each search; nothing is written.

        Returns:
            Name → attributes of each study, as stored or as it would begin or continue with.

        Raises:
            LcscError: the first thing that is wrong.
        """
        attributes: dict[str, Attributes] = dict(self.studies)
        for spec in self.specs:
            if self.is_finished(spec):
                self.check_finished(spec)
            else:
                search = self._opened(spec)
                search.ask_once()
                budget = usable_budget(spec, self.objective).model_dump()
                attributes[spec.name] = {**search.attributes, "budget": budget}
        self._say_how_long()
        return attributes

    def first_look(self) -> Path | None:
        """Write a picture of the first, the middle and the last checkpoint of a new experiment, and return its path.

        ``None`` where nothing was rehearsed, or nothing samples images.

        Raises:
            ObjectiveError: sampling fails.
        """
        if self.rehearsal is None or self.objective.sampler is None:
            return None
        return write_first_look(first_look(self.objective), self.name, self._objectives.context.files)

    def _say_how_long(self) -> None:
        """Say once how long the searches and the report take, if a rehearsal in this run could time an evaluation."""
        if self.rehearsal is None or not self.rehearsal.pace.plain or self._has_estimate:
            return
        pace = self.rehearsal.pace
        self._has_estimate = True
        searches = searches_seconds(self._unfinished(), self.objective, pace)
        reports = report_seconds(self.specs, self.objective, pace)
        prepared = time.perf_counter() - self._objectives.made_at
        parts = [f"what came before {about(prepared)}", f"its searches {about(searches)}"]
        if reports:
            parts.append(f"scores as trained, the choice and its report {about(reports)}")
        total = about(prepared + searches + reports)
        notice(f"{self.name}: the whole run takes up to {total}: {', '.join(parts)}")

    def _unfinished(self) -> list[StudySpec]:
        """The searches of this run that have not finished, without those that cannot run: :meth:`_opened` says why."""
        unfinished = []
        for spec in self.specs:
            with contextlib.suppress(LcscError):
                if not self.is_finished(spec):
                    unfinished.append(spec)
        return unfinished

    def _opened(self, spec: StudySpec) -> Search:
        """A search that may run: compared, and rehearsed by the first one that has no result.

        Raises:
            LcscError: it may not. Where the objective cannot be loaded or rehearsed, no other search is tried.
        """
        if self.refused is not None:
            raise self.refused
        check_workers(spec)
        before = self.studies.get(spec.name)
        start = start_of(spec, self.specs, self.database) if before is None else None
        try:
            objective = self.objective
        except LcscError as error:
            self.refused = error
            raise
        now = environment()
        check_search(spec, self.studies)
        changed = ""
        if before is not None:
            changed = check_environment(spec.name, before["environment"], now, accept=self._accept)
        check(spec, objective)  # what is wrong with this search alone stops no other
        if spec.workers == "auto":  # as many as this machine has devices
            spec = spec.model_copy(update={"workers": spec.worker_count})
        if before is not None and before["specification"]["workers"] != spec.model_dump(mode="json")["workers"]:
            in_flight = before["parallelism"]["in_flight"]
            notice(f"{spec.name}: continues with other workers; candidates are still asked {in_flight} at a time")
        origin = origin_of(spec, start, self.database, objective) if start is not None else None
        self._choose_layout()
        self._use(spec, spec.space.rows)
        self._rehearse(spec)
        planned = None
        if before is None and spec.budget.seconds is not None and self.rehearsal is not None:
            planned = evaluations_in(spec, objective, self.rehearsal.pace)
        return Search(
            spec,
            objective,
            before,
            now,
            origin=origin,
            planned=planned,
            changed="; ".join(filter(None, (self._accepted, changed))),
        )

    def _choose_layout(self) -> None:
        """Choose the layout of a new experiment's network, once, before workers are opened with it."""
        if self._before is not None or self._stored is not None or self.rehearsal is not None:
            return
        follows_gradient = any(configure(spec.optimizer).needs_gradient for spec in self.specs)
        with contextlib.suppress(Exception):  # of a sampler that fails, the rehearsal says why
            self.objective.layout = self.objective.fastest_layout(gradient=follows_gradient)

    def _rehearse(self, spec: StudySpec) -> None:
        """Evaluate one candidate on a few images, as the searches without a result and the report will; once.

        It is that of a search that follows the gradient, if there is one: this runs what the others run, and more.
        """
        if self.rehearsal is not None or self._has_result(spec):
            return
        without_result = [search for search in self.specs if not self._has_result(search)]
        try:
            for search in without_result:
                check(search, self.objective)
            follows_gradient = [search for search in without_result if configure(search.optimizer).needs_gradient]
            rehearsed = next(iter(follows_gradient), spec)
            self._rehearsed_rows = rehearsed.space.rows
            self._use(spec, self._rehearsed_rows)
            first = first_candidate(rehearsed, self.objective, gradient=bool(follows_gradient))
            in_flight = parallelism(spec, self.objective)["in_flight"]
            notice(f"{self.name}: rehearsing what a search and its report will do")
            with contextlib.closing(evaluator_of(self.objective, self._pool, in_flight)) as evaluator:
                self.rehearsal = rehearse(
                    self.name,
                    self.objective,
                    persistently(evaluator, spec.failures.retries),
                    first,
                    report=any(search.held_out is not None for search in without_result),
                )
        except LcscError as error:
            self.refused = error
            raise
        self._use(spec, spec.space.rows)

    def _has_result(self, spec: StudySpec) -> bool:
        """Whether a search has ended, or a trial of it has a loss."""
        if spec.name not in self.studies:
            return False
        return is_searched(spec, self.studies[spec.name]) or has_succeeded(self.database.existing(), spec.name)

    # what is measured

    def _measurer(self, images: int) -> Measurer:
        """What measures models on so many images; 0 for as many as a candidate of a search has."""
        return Measurer(self.begun(), self.objective, self._evaluate_model, images=images)

    def _evaluate_model(self, candidate: Candidate, study: str | None) -> Outcome:
        """Evaluate a model in the rows of the study that found it, as :meth:`_evaluate`."""
        return self._evaluate(candidate, self._rows_of(study))

    def _rows_of(self, study: str | None) -> Rule | None:
        """The rule of a study's rows; ``None`` without a study."""
        if study is None:
            return None
        rule: Rule | None = self.studies[study]["specification"]["space"]["rows"]
        return rule

    def _score_as_trained(self) -> None:
        """Score what the trainer has made, before the first search."""
        if self._scored_as_trained:
            return
        self._scored_as_trained = True
        plan = self._plan()
        images = plan.images if plan is not None else None
        score_as_trained(self.begun(), self.objective, self._measurer(images or 0), images)

    def _plan(self) -> ReportPlan | None:
        """The plan of the report that the study file asks for; ``None`` if there will be none."""
        if self._held_out is None or self.objective.why_nothing_held_out() is not None:
            return None
        return ReportPlan.of(
            self._held_out,
            self.begun().report,
            own_images=self.objective.samples.per_report,
            samples=bool(self.objective.samples.per_evaluation),
        )

    # the report

    def report(self) -> Report | None:
        """Report as the study file asks, unless the stored report is that.

        Where nothing is held out, a notice says why.

        Returns:
            The report; ``None`` if there is none.

        Raises:
            LcscError: as :func:`~lcsc_opt.experiment.report.make_report`.
        """
        if self._held_out is None or self._has_report(self._held_out):
            if self._stored is not None:
                return self._stored.report
            return Report.from_json((self._before or {}).get(REPORT))
        plan = self._plan()
        if plan is None:
            notice(f"{self.name}: nothing is held out: {self.objective.why_nothing_held_out()}")
            return None
        return self.evaluate(plan)

    def _has_report(self, held_out: HeldOutSpec) -> bool:
        """Whether the report that was stored before this run is what the study file asks for; nothing is loaded."""
        if self._before is None or self._unfinished():
            return False
        is_same = is_reported(held_out, self._before, self.studies, self.specs[0].objective)
        return is_same and not self._code_changes("reported")

    def evaluate(self, plan: ReportPlan, *, keep: bool = True) -> Report:
        """Measure all models of the experiment, and choose the answer; with ``keep``, store the report and images.

        Searches that another process runs are not in it.

        Raises:
            ObjectiveError: this objective has no held-out loss.
            LcscError: as :func:`~lcsc_opt.experiment.report.make_report`.
        """
        reason = self.objective.why_nothing_held_out()
        if reason is not None:
            raise ObjectiveError(f"{self.name}: nothing is held out, so nothing can be reported: {reason}")
        stored = self.begun()
        stored.refresh()
        searches = self._searches(stored.storage)
        while True:
            report = make_report(stored, searches, self.objective, plan, self._evaluate_model)
            rows = self._rows_of(report.of_answer.model.study)
            if self.rehearsal is not None:
                report = dataclasses.replace(report, warnings=(*report.warnings, *self.rehearsal.warnings))
            if keep:
                self._use_rows(rows)
                attach_images(stored, self.objective, report, self.studies)
            searches = self._searches(stored.storage)
            if {search.study: search.evaluations for search in searches} == dict(report.evaluations):
                break  # else another process has ended a search meanwhile
        if keep:
            stored.set_attribute(REPORT, report.to_json())  # whoever is interrupted before makes it again
        # only now: a machine without memory for two networks kills the process
        warning = None if self.objective.is_random else self._warning_of_new_network(report, rows)
        if warning is not None:
            notice(f"{self.name}: {warning}")
            report = dataclasses.replace(report, warnings=(*report.warnings, warning))
            if keep:
                stored.set_attribute(REPORT, report.to_json())
        self._workers.close()  # which frees the devices
        self._workers_of = None
        return report

    def _warning_of_new_network(self, report: Report, rows: Rule | None) -> str | None:
        """What is wrong if the answer, which has these rows, has another loss in a network of its own."""
        coefficients = report.of_answer.model.coefficients
        answer = Candidate(coefficients, rehearsal=True, yardstick=self._measurer(0).yardstick(SEARCH))
        return warning_of_kept_state(answer, lambda candidate: self._evaluate(candidate, rows), self._loader(rows))

    def _searches(self, storage: RDBStorage) -> list[Searched]:
        """All stored searches, as they are now, but for those that another process runs."""
        self.studies = read_contents(storage).of(self.name)
        running = locked(storage, list(self.studies))
        return [
            Searched(name, StoredStudy.open(storage, name).trials()) for name in self.studies if name not in running
        ]
