"""One experiment: compared once with what is stored, its searches, what was measured, its report and its answer.

::

    with Experiment(specs, database, objectives) as experiment:  # nothing is loaded or written
        for spec in specs:
            experiment.search(spec.name)  # the objective is loaded, compared and rehearsed once
        experiment.report()  # all models once, and the answer
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError, ObjectiveError, StudyStoreError
from lcsc_opt.base.machine import short_waits
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import SEARCH, Candidate, Coefficients
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.study_spec import Rule, StudySpec
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.experiment import AVERAGES, CHOSEN, HAD, StoredExperiment
from lcsc_opt.database.lock import locked
from lcsc_opt.database.names import KEYS
from lcsc_opt.database.opened import Database
from lcsc_opt.database.report import Report, ReportPlan
from lcsc_opt.database.states import Attributes, compared_trials, is_searched, row_rule_of
from lcsc_opt.database.store import StoredStudy, has_succeeded, read_contents
from lcsc_opt.evaluation.base import Outcome, persistently
from lcsc_opt.evaluation.workers import Workers, check_workers, evaluator_of
from lcsc_opt.experiment.finalists import Searched
from lcsc_opt.experiment.looking import write_first_look
from lcsc_opt.experiment.measuring import Measurer, score_as_trained
from lcsc_opt.experiment.origin import origin_of, start_of
from lcsc_opt.experiment.outcome import outcome_of, outcome_of_finished
from lcsc_opt.experiment.rehearsal import Rehearsal, check_again, rehearse, warning_of_kept_state
from lcsc_opt.experiment.report import make_report
from lcsc_opt.experiment.sameness import (
    ACCEPT,
    ANEW,
    accepted_changes,
    attributes_now,
    check_environment,
    check_search,
    is_untouched,
)
from lcsc_opt.experiment.timing import about, evaluations_in, evaluations_within, report_seconds, searches_seconds
from lcsc_opt.exports.grid import first_look
from lcsc_opt.exports.images import attach_images
from lcsc_opt.objective.checkpoints_alone import checkpoint_changes
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.key import Key, differences, digest_of
from lcsc_opt.objective.loading import verify_weights
from lcsc_opt.objective.of_study import ObjectiveLoader
from lcsc_opt.study.loop import TrialCallback
from lcsc_opt.study.opening import Search
from lcsc_opt.study.planning import Plan
from lcsc_opt.views.artifacts import lacks_files


class Experiment:
    """One experiment of a database, for the searches of one run; a context manager that ends its workers.

    Args:
        specs: of the searches; all have one objective and one name.
        database: of the run; a missing one is made when the first search begins.
        objectives: loads the objective.
        accept_changes: continue although the code, the versions or what was read have changed.

    Attributes:
        name: of the experiment.
        specs: name of a search → the search, in the order of this run.
        database: the same.
        stored: what is stored of it; ``None`` before it begins.
        studies: name → attributes of its stored studies, as far as this process knows them.
        rehearsal: what this run has rehearsed; ``None`` before, and where all searches have results.
        refused: why the objective cannot be loaded or rehearsed, or is another one, so that no search can run; else
            ``None``.
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
        self.specs = {spec.name: spec for spec in specs}
        self.database = database
        self.rehearsal: Rehearsal | None = None
        self.refused: LcscError | None = None
        self._rehearsed_rows: Rule | None = None
        self._objectives = objectives
        self._accept = accept_changes
        contents = database.contents
        self._foreign = contents.foreign(self.name)
        self.studies = contents.searches(self.name)
        self.stored: StoredExperiment | None = None
        if self.name in contents.experiments:
            self.stored = StoredExperiment.open(database.existing(), self.name)
        self._is_begun = False  # by this run
        self._has_tried = False  # a stored candidate again
        self._changed = ""  # what was accepted that has changed since the experiment began
        self._spec = specs[0]  # for what all have
        self._newest = specs[-1]
        self._until_exit = contextlib.ExitStack()
        self._scored_as_trained = False
        self._has_estimate = False

    def __enter__(self) -> Experiment:
        self._until_exit.enter_context(short_waits())
        return self

    def __exit__(self, *_: object) -> None:
        self._until_exit.close()

    # what is stored, and whether it is still the same

    def is_finished(self, name: str) -> bool:
        """Whether nothing is left of a search. Nothing is loaded, unless something was written since.

        Raises:
            LcscError: the stored results are of something else than the study file asks for.
        """
        attributes = self.studies.get(name)
        if attributes is None or self.stored is None or not is_searched(self.specs[name], attributes):
            return False
        check_search(self.specs[name], self.studies)
        return self._is_same

    @property
    def reads_by_itself(self) -> bool:
        """Whether what is stored is of a score or another function, which may read data that no key knows."""
        return self.stored is not None and self.stored.attributes["sampling"] is None

    @functools.cached_property
    def _is_same(self) -> bool:
        """Whether the stored experiment is of what the study file asks for, and nothing has to be written about that.

        Raises:
            LcscError: it is of something else.
        """
        if self.stored is None:
            return False
        attributes = self.stored.attributes
        context = self._objectives.context
        changes = checkpoint_changes(attributes, context.files)
        if changes.written_again and not self._accept:
            raise StudyStoreError(
                f"{self.name}: the checkpoints were written again since it began. Give the new search another name: "
                f"{ANEW}; {ACCEPT}"
            )
        if changes.has_later_steps:
            notice(f"{self.name}: there are newer checkpoints now; to search with these: {ANEW}")
        if not context.functions and is_untouched(attributes, self._spec.objective, context.directory):
            return True
        _ = self.objective  # loaded and compared by its content
        settings = self._spec.objective.model_dump(mode="json")["settings"]
        is_elsewhere = settings != attributes["objective"]["settings"]  # with the same content: the new place is stored
        return not self._changed and not context.functions and not is_elsewhere  # functions have to be tried

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective, loaded and compared with what is stored.

        Raises:
            LcscError: it cannot be loaded, or its losses would not compare with those that are stored.
        """
        before = None if self.stored is None else self.stored.attributes
        objective = self._objectives.load(self._spec.objective, self._spec.space.rows, before)
        verify_weights(objective)
        if before is not None:
            objective.layout = before["machine"]["layout"]
            self._changed = accepted_changes(
                self.name,
                Key.from_json(before["key"]),
                objective.key,
                has_results=self._has_results,
                accept=self._accept,
            )
            if self._changed:
                notice(f"{self.name}: continues with changes: {self._changed}")
            for part in ("reported", "asked"):
                self._say_reports_change(part, Key.from_json(before["key"]), objective.key)
        else:  # of searches whose experiment was deleted, those of another key are none of it
            decides = objective.key.decides
            self._foreign = {name: found for name, found in self.studies.items() if found.get("key") != decides}
            self.studies = {name: found for name, found in self.studies.items() if name not in self._foreign}
        for name, attributes in self._foreign.items():
            notice(f"{self._why_foreign(name, attributes, objective)}; it is in no table")
        return objective

    @functools.cached_property
    def _plans(self) -> dict[str, Plan]:
        """The name of each search of this run → the search with its objective."""
        plans = {}
        for name, spec in self.specs.items():
            if spec.workers == "auto":  # as many as this machine has devices
                spec = spec.model_copy(update={"workers": spec.worker_count})
            plans[name] = Plan(spec, self.objective)
        return plans

    def _say_reports_change(self, part: str, before: Key, now: Key) -> None:
        """Say how what reports measure differs from what is stored."""
        changed = before.changes_to(now, part)
        if changed:
            notice(f"{self.name}: reports change: {'; '.join(changed)}")

    def _why_foreign(self, name: str, attributes: Attributes, objective: Objective) -> str:
        """How a study that has the experiment's name is of something else."""
        key = objective.key
        changed = "; ".join(differences(attributes.get("key") or {}, key.decides, None, key.inputs))
        return f"{name}: is of another problem than {self.name}: {changed}"

    @property
    def _has_results(self) -> bool:
        """Whether a trial of the experiment has a loss, or another process is about to have one."""
        storage = self.database.existing()
        return any(has_succeeded(storage, name) for name in self.studies) or bool(locked(storage, self.studies.keys()))

    def begin_or_continue(self) -> StoredExperiment:
        """What is stored of the experiment, which begins or continues in the database with the first call.

        A report that was measured before a change is forgotten then, and writes are guarded from then on.

        Raises:
            StudyStoreError: another process has just begun it with another problem.
        """
        objective = self.objective
        if self.stored is not None and self._is_begun:
            return self.stored
        before = {} if self.stored is None else self.stored.attributes
        attributes = attributes_now(self._spec, objective, self._objectives.context.directory, before)
        if self.stored is None:
            self.stored = StoredExperiment.open_or_create(self.database.made(), self.name, attributes)
            if Key.from_json(self.stored.attributes["key"]).decides != objective.key.decides:
                raise StudyStoreError(
                    f"{self.name}: another process has just begun it with another problem; run this again"
                )
        else:
            self._continue(self.stored, attributes)
        self.stored.record.guard = self._check_key
        self._is_begun = True
        return self.stored

    def _continue(self, stored: StoredExperiment, attributes: dict[str, Any]) -> None:
        """Write what is new, also the key of its searches; and forget a report that was measured before a change."""
        had_report = stored.attributes.get(CHOSEN) is not None
        searches: list[str] = []
        if self._changed:
            change = {"at": time.time(), "changed": self._changed}
            attributes["changes"] = [*(stored.attributes.get("changes") or ()), change]
            searches = list(self.studies)
        stored.update(attributes, searches, keep_yardstick=self._has_results)
        for name in searches:
            self.studies[name] = {**self.studies[name], "key": attributes["key"]["decides"]}
        if had_report and stored.report is None:
            notice(f"{self.name}: the stored report is forgotten: it was measured before the change")
            stored.set_attribute(CHOSEN, None)

    def _check_key(self) -> None:
        """Refuse to write once the experiment is of something else than this process began with, or deleted.

        Raises:
            StudyStoreError: it is.
        """
        assert self.stored is not None  # whoever writes has begun
        record = self.stored.record
        try:
            stored = record.storage.get_study_user_attrs(record.key)["key"]
        except KeyError as error:
            raise StudyStoreError(f"{self.name}: was deleted meanwhile; run this again") from error
        key = self.objective.key
        if stored["decides"] != key.decides:
            changed = key.changes_to(Key.from_json(stored))
            raise StudyStoreError(
                f"{self.name}: another process has continued it with changes: {'; '.join(changed)}; nothing more was "
                "written from here"
            )

    @functools.cached_property
    def _workers(self) -> Workers:
        """Who evaluates."""
        workers = Workers(self.objective, self._newest, self._objectives.context)
        self._until_exit.callback(workers.close)
        return workers

    def _evaluate_model(self, candidate: Candidate, study: str | None) -> Outcome:
        """Evaluate a model in the rows of the study that found it; ``None`` without a study."""
        return self._workers.evaluate(candidate, row_rule_of(study, self.studies))

    # searches

    def search(self, name: str, callbacks: Sequence[TrialCallback] = ()) -> str:
        """Search until the budget is spent. Finished work is not repeated.

        Args:
            name: of the search.
            callbacks: called with Optuna's study and the trial, after each trial that ends in this run.

        Returns:
            One line for people: the result.

        Raises:
            LcscError: the study cannot run, or fails.
            Exception: what a callback raises.
        """
        had_ended = False
        if name in self.studies:  # before anything is loaded, since it may be held for long
            StoredStudy.open(self.database.existing(), name).check_free()
            had_ended = is_searched(self.specs[name], self.studies[name])
        search = self._opened(name)
        self._say_how_long()
        stored = self.begin_or_continue()
        with search.held(stored.storage, guard=self._check_key):
            self._score_as_trained()
            search.run(self._measurer.yardstick(SEARCH), pool=self._workers.pool, callbacks=callbacks)
            self.studies[name] = search.stored.attributes
            rows = search.spec.space.rows
            if self.rehearsal is not None and rows == self._rehearsed_rows:  # else workers would have to start again
                self.rehearsal.check_drift(self.name, lambda candidate: self._workers.evaluate(candidate, rows))
        if had_ended:  # only what cannot be compared was tried again
            return outcome_of_finished(search.stored)
        return outcome_of(search.stored)

    def rehearse(self) -> dict[str, Attributes]:
        """Do all that comes before the first trial of each search; nothing is written.

        Returns:
            Name → attributes of each study, as stored or as it would begin or continue with.

        Raises:
            LcscError: the first thing that is wrong.
        """
        attributes: dict[str, Attributes] = dict(self.studies)
        for name in self.specs:
            if not self.is_finished(name):
                search = self._opened(name)
                search.ask_once()
                attributes[name] = {**search.attributes, "budget": self._plans[name].budget.model_dump()}
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

    def bought_by(self, seconds: Sequence[float]) -> dict[str, list[int]]:
        """Name of each search that has not ended → how many evaluations it makes in each of these times.

        Empty where nothing was rehearsed or timed.
        """
        if self.rehearsal is None or not self.rehearsal.pace.plain:
            return {}
        pace = self.rehearsal.pace
        return {
            name: [evaluations_within(time_given, self._plans[name], pace) for time_given in seconds]
            for name in self._unfinished()
        }

    def _say_how_long(self) -> None:
        """Say once how long the searches and the report take, if a rehearsal in this run could time an evaluation."""
        if self.rehearsal is None or not self.rehearsal.pace.plain or self._has_estimate:
            return
        pace = self.rehearsal.pace
        self._has_estimate = True
        searches = searches_seconds([self._plans[name] for name in self._unfinished()], pace)
        reports = report_seconds([*self._plans.values()], pace)
        prepared = time.perf_counter() - self._objectives.made_at
        parts = [f"{about(prepared)} until now", f"{about(searches)} for its searches"]
        if reports:
            parts.append(f"{about(reports)} to score what was trained, to choose and to report")
        total = about(prepared + searches + reports)
        notice(f"{self.name}: the whole run takes up to {total}: {', '.join(parts)}")

    def _unfinished(self) -> list[str]:
        """The searches of this run that have not finished, without those that cannot run: :meth:`_opened` says why."""
        unfinished = []
        for name in self.specs:
            with contextlib.suppress(LcscError):
                if not self.is_finished(name):
                    unfinished.append(name)
        return unfinished

    def _opened(self, name: str) -> Search:
        """A search that may run: compared, and rehearsed by the first one that has no result.

        Raises:
            LcscError: it may not. Where the objective cannot be loaded or rehearsed, no other search is tried.
        """
        if self.refused is not None:
            raise self.refused
        spec = self.specs[name]
        check_workers(spec)
        before = self.studies.get(name)
        start = start_of(spec, [*self.specs.values()], self.database) if before is None else None
        try:
            objective = self.objective
        except LcscError as error:
            self.refused = error
            raise
        if name in self._foreign:
            foreign = self._why_foreign(name, self._foreign[name], objective)
            raise StudyStoreError(f"{foreign}. Delete it, or give the new search another name: {ANEW}")
        now = environment()
        check_search(spec, self.studies)
        changed = self._changed
        if before is not None:
            changed_here = check_environment(name, before["environment"], now, accept=self._accept)
            changed = "; ".join(filter(None, (changed, changed_here)))
        plan = self._plans[name]
        plan.check()  # what is wrong with this search alone stops no other
        if before is not None and before["specification"]["workers"] != plan.spec.model_dump(mode="json")["workers"]:
            in_flight = before["parallelism"]["in_flight"]
            notice(f"{name}: continues with other workers; candidates are still asked {in_flight} at a time")
        origin = origin_of(spec, start, self.database, objective) if start is not None else None
        self._choose_layout()
        self._workers.use(plan.spec, spec.space.rows)
        if self.rehearsal is None and not self._has_result(name):
            self._rehearse(plan)
        self._try_again()
        self._workers.use(plan.spec, spec.space.rows)
        planned = None
        if before is None and spec.budget.seconds is not None and self.rehearsal is not None:
            planned = evaluations_in(plan, self.rehearsal.pace)
        return Search(plan, before, now, origin=origin, planned=planned, changed=changed)

    def _choose_layout(self) -> None:
        """Choose the layout of a new experiment's network, once, before workers are opened with it."""
        if self.stored is not None or self.rehearsal is not None:
            return
        follows_gradient = any(plan.optimizer.needs_gradient for plan in self._plans.values())
        with contextlib.suppress(Exception):  # of a sampler that fails, the rehearsal says why
            self.objective.layout = self.objective.fastest_layout(gradient=follows_gradient)

    def _try_again(self) -> None:
        """Evaluate a stored candidate again, once: nobody can compare functions that were handed over, nor what a score
        reads by itself.

        Raises:
            StudyStoreError: it has another loss; or it cannot be evaluated, and functions were handed over.
        """
        if self.stored is None or self._has_tried or self.objective.is_random:
            return
        functions = self._objectives.context.functions
        if not functions and (self._accept or not self.reads_by_itself):
            return
        for name in self.studies:
            trials = compared_trials(StoredStudy.open(self.database.existing(), name).trials())
            if not trials:
                continue
            outcome = self._evaluate_model(self._candidate(coefficients_of(trials[-1])), name)
            self._has_tried = True
            try:
                check_again(f"{name}: trial {trials[-1].number}", trials[-1].value or 0.0, outcome, functions)
            except StudyStoreError as error:  # no other search may go on, either
                self.refused = error
                raise
            return

    def _rehearse(self, plan: Plan) -> None:
        """Evaluate one candidate on a few images, as the searches without a result and the report will; once.

        It is that of a search that follows the gradient, if there is one: this runs what the others run, and more.
        """
        without_result = [self._plans[name] for name in self.specs if not self._has_result(name)]
        try:
            for other in without_result:
                other.check()
            follow_gradient = [other for other in without_result if other.optimizer.needs_gradient]
            rehearsed = next(iter(follow_gradient), plan)
            self._rehearsed_rows = rehearsed.spec.space.rows
            self._workers.use(plan.spec, self._rehearsed_rows)
            first = rehearsed.first_candidate(gradient=bool(follow_gradient))
            notice(f"{self.name}: rehearsing what a search and its report will do")
            pool = self._workers.pool
            if pool is not None:
                pool.wait_until_ready()  # which is no part of the time that an evaluation takes
            with contextlib.closing(evaluator_of(self.objective, pool, plan.parallelism["in_flight"])) as evaluator:
                self.rehearsal = rehearse(
                    self.name,
                    self.objective,
                    persistently(evaluator, plan.spec.failures.retries),
                    first,
                    report=any(other.spec.held_out is not None for other in without_result),
                )
        except LcscError as error:
            self.refused = error
            raise

    def _has_result(self, name: str) -> bool:
        """Whether a search has ended, or a trial of it has a loss."""
        if name not in self.studies:
            return False
        return is_searched(self.specs[name], self.studies[name]) or has_succeeded(self.database.existing(), name)

    # what is measured

    @functools.cached_property
    def _measurer(self) -> Measurer:
        """What measures models that no search has asked for, on as many images as a candidate of a search has."""
        return Measurer(self.begin_or_continue(), self.objective, self._evaluate_model, images=0, role=HAD)

    def _candidate(self, coefficients: Coefficients, *, rehearsal: bool = False) -> Candidate:
        """A candidate of a search: its loss is relative to what theirs are."""
        yardstick = None
        if self.objective.fixed_average is not None:
            yardstick = self._measurer.yardstick(SEARCH)
        return Candidate(coefficients, rehearsal=rehearsal, yardstick=yardstick)

    def _score_as_trained(self) -> None:
        """Score what the trainer has made, before the first search."""
        if self._scored_as_trained:
            return
        self._scored_as_trained = True
        plan = self._plan()
        images = plan.images if plan is not None else None
        score_as_trained(self._measurer, images)

    def _plan(self) -> ReportPlan | None:
        """The plan of the report that the study file asks for, by what is stored; ``None`` if there will be none."""
        if self.stored is None or self._spec.held_out is None or not self.stored.attributes["holds_out"]:
            return None
        return ReportPlan.of(
            self._spec.held_out,
            self.stored.report,
            own_images=self.stored.attributes["report_images"],
            samples=self.stored.attributes["samples"],
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
        if self.stored is None:
            return None
        if self._spec.held_out is None:
            return self.stored.report
        if self._is_loaded:
            self.begin_or_continue()  # what is stored is of today then
        plan = self._plan()
        if plan is None:
            if self._is_loaded:
                notice(f"{self.name}: nothing is held out: {self.objective.why_nothing_held_out()}")
            return None
        report = self.stored.report
        chosen = self.stored.attributes.get(CHOSEN)
        if report is not None and chosen is not None and chosen["of"] == self._depends_on(plan, self._evaluations()):
            if lacks_files(self.stored.record, report):
                self._make_images_again(report)
            return report
        return self.evaluate(plan)

    def _make_images_again(self, report: Report) -> None:
        """Store the images of a report anew; where that is not possible, its answer is known all the same."""
        notice(f"{self.name}: the images of its report are not beside the database, and are made again")
        try:
            attach_images(self.begin_or_continue(), self.objective, report, self.studies)
        except (LcscError, OSError) as error:  # such as checkpoints that are gone, or a disk that refuses
            notice(f"{self.name}: they cannot be made: {error}")

    @property
    def _is_loaded(self) -> bool:
        """Whether the objective was loaded: else nothing has changed that anybody could see."""
        return "objective" in self.__dict__

    def _depends_on(self, plan: ReportPlan, evaluations: Mapping[str, int]) -> str:
        """A digest of all that a report depends on.

        Args:
            plan: of the report.
            evaluations: study → how many of its trials have ended.
        """
        assert self.stored is not None  # whoever asks has begun or continued it
        attributes = self.stored.attributes
        averages = attributes.get(AVERAGES)
        today = next(iter(attributes[KEYS]))
        asked = attributes["key"]["asked"]
        return digest_of([dataclasses.asdict(plan), today, asked, averages, dict(sorted(evaluations.items()))])

    def _evaluations(self) -> dict[str, int]:
        """Study → how many of its trials have ended, of those that no other process runs."""
        storage = self.database.existing()
        running = locked(storage, list(self.studies))
        return {
            name: StoredStudy.open(storage, name).summary.evaluations for name in self.studies if name not in running
        }

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
        stored = self.begin_or_continue()
        stored.refresh()
        searches = self._searches(stored.storage)
        while True:
            report = make_report(self._measurer, searches, plan)
            rows = row_rule_of(report.of_answer.model.study, self.studies)
            if self.rehearsal is not None:
                report = dataclasses.replace(report, warnings=(*report.warnings, *self.rehearsal.warnings))
            if keep:
                self._workers.use_rows(rows)
                attach_images(stored, self.objective, report, self.studies)
            self.studies = read_contents(stored.storage).searches(self.name)  # others may have begun, or deleted some
            searches = self._searches(stored.storage)
            if {search.study: search.evaluations for search in searches} == dict(report.evaluations):
                break  # else another process has ended a search meanwhile
        depends_on = self._depends_on(plan, report.evaluations)
        if keep:
            stored.choose(report, depends_on)  # whoever is interrupted before makes it again
        # only now: a machine without memory for two networks kills the process
        warning = None if self.objective.is_random else self._warning_of_new_network(report, rows)
        if warning is not None:
            notice(f"{self.name}: {warning}")
            report = dataclasses.replace(report, warnings=(*report.warnings, warning))
            if keep:
                stored.choose(report, depends_on)
        self._workers.close()  # which frees the devices
        return report

    def _warning_of_new_network(self, report: Report, rows: Rule | None) -> str | None:
        """What is wrong if the answer, which has these rows, has another loss in a network of its own."""
        answer = self._candidate(report.of_answer.model.coefficients, rehearsal=True)
        load = self._workers.loader(rows)

        def load_the_same() -> Objective:
            """Raises StudyStoreError if something was written meanwhile: then nothing can be compared."""
            objective = load()
            changed = self.objective.key.changes_to(objective.key)
            if changed:
                notice(
                    f"{self.name}: while it ran, there were changes: {'; '.join(changed)}; all results are of what it "
                    "began with"
                )
                raise StudyStoreError("changed meanwhile")
            return objective

        return warning_of_kept_state(answer, lambda candidate: self._workers.evaluate(candidate, rows), load_the_same)

    def _searches(self, storage: RDBStorage) -> list[Searched]:
        """All searches that are known, as they are now, but for those that another process runs."""
        running = locked(storage, list(self.studies))
        return [
            Searched(name, StoredStudy.open(storage, name).trials()) for name in self.studies if name not in running
        ]
