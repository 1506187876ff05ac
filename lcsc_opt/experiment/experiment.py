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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError, ObjectiveError, StudyStoreError
from lcsc_opt.base.machine import short_waits
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import SEARCH, Candidate, plain
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.study_spec import Rule, StudySpec
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.experiment import AVERAGES, CHOSEN, HAD, KEYS, StoredExperiment, metrics_to_json
from lcsc_opt.database.lock import locked
from lcsc_opt.database.opened import Database
from lcsc_opt.database.report import Report, ReportPlan
from lcsc_opt.database.states import Attributes, compared_trials, is_searched
from lcsc_opt.database.store import StoredStudy, has_succeeded, read_contents
from lcsc_opt.evaluation.base import Failure, Outcome, persistently
from lcsc_opt.evaluation.pool import WorkerPool
from lcsc_opt.evaluation.workers import check_workers, open_workers
from lcsc_opt.experiment.finalists import Searched
from lcsc_opt.experiment.looking import write_first_look
from lcsc_opt.experiment.measuring import Measurer, averages_now, score_as_trained
from lcsc_opt.experiment.origin import origin_of, start_of
from lcsc_opt.experiment.outcome import outcome_of, outcome_of_finished
from lcsc_opt.experiment.rehearsal import Rehearsal, about, is_one_score, rehearse, warning_of_kept_state
from lcsc_opt.experiment.report import make_report
from lcsc_opt.experiment.sameness import (
    ACCEPT,
    ANEW,
    accepted_changes,
    check_environment,
    check_search,
    is_untouched,
    key_to_json,
    stored_key,
)
from lcsc_opt.experiment.timing import evaluations_in, evaluations_within, report_seconds, searches_seconds
from lcsc_opt.exports.grid import first_look
from lcsc_opt.exports.images import attach_images
from lcsc_opt.objective.checkpoints_alone import checkpoint_changes
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.key import Key, agree, differences, digest_of
from lcsc_opt.objective.loading import load_objective, verify_weights
from lcsc_opt.objective.of_study import ObjectiveLoader
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.study.loop import TrialCallback
from lcsc_opt.study.opening import Search, evaluator_of
from lcsc_opt.study.planning import check, first_candidate, parallelism, usable_budget
from lcsc_opt.trajectory import Trajectory


class Experiment:
    """One experiment of a database, for the searches of one run; a context manager that ends its workers.

    Args:
        specs: of the searches; all have one objective and one name.
        database: of the run; a missing one is made when the first search begins.
        objectives: loads the objective.
        accept_changes: continue although the code, the versions or what was read have changed.

    Attributes:
        name: of the experiment.
        specs, database: the same.
        stored: what is stored of it; ``None`` before it begins.
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
        contents = database.contents
        self._foreign = contents.foreign(self.name)
        self.studies = {name: found for name, found in contents.of(self.name).items() if name not in self._foreign}
        self.stored: StoredExperiment | None = None
        if self.name in contents.experiments:
            self.stored = StoredExperiment.open(database.existing(), self.name, contents.experiments[self.name])
        self._is_begun = False  # by this run
        self._has_tried = False  # a stored candidate again
        self._changed = ""  # what was accepted that has changed since the experiment began
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
        """Whether nothing is left to search. Nothing is loaded, unless something was written since.

        Raises:
            LcscError: the stored results are of something else than the study file asks for.
        """
        attributes = self.studies.get(spec.name)
        if attributes is None or self.stored is None or not is_searched(spec, attributes):
            return False
        check_search(spec, self.studies)
        return self._is_same

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
        if not context.functions and is_untouched(attributes, self.specs[0].objective, context.directory):
            return True
        _ = self.objective  # loaded and compared by its content
        settings = self.specs[0].objective.model_dump(mode="json")["settings"]
        is_elsewhere = settings != attributes["objective"]["settings"]  # with the same content: the new place is stored
        return not self._changed and not context.functions and not is_elsewhere  # functions have to be tried

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective, loaded and compared with what is stored.

        Raises:
            LcscError: it cannot be loaded, or its losses would not compare with those that are stored.
        """
        spec = self.specs[0]
        before = None if self.stored is None else self.stored.attributes
        objective = self._objectives.load(spec.objective, spec.space.rows, before)
        verify_weights(objective)
        if before is not None:
            objective.layout = before["machine"]["layout"]
            self._changed = accepted_changes(
                self.name, stored_key(before), objective.key, has_results=self._has_results, accept=self._accept
            )
            if self._changed:
                notice(f"{self.name}: continues with changes: {self._changed}")
            for part in ("reported", "asked"):
                self._say_reports_change(part, stored_key(before), objective.key)
        else:  # of searches whose experiment was deleted, those of another key are none of it
            decides = objective.key.decides
            self._foreign = {name: found for name, found in self.studies.items() if found.get("key") != decides}
            self.studies = {name: found for name, found in self.studies.items() if name not in self._foreign}
        for name, attributes in self._foreign.items():
            notice(f"{self._why_foreign(name, attributes, objective)}; it is in no table")
        return objective

    def _say_reports_change(self, part: str, before: Key, now: Key) -> None:
        """Say how what reports measure differs from what is stored."""
        changed = differences(getattr(before, part), getattr(now, part), before.inputs, now.inputs)
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

    def begun(self) -> StoredExperiment:
        """What is stored of the experiment, which begins or continues in the database with the first call.

        Raises:
            StudyStoreError: another process has just begun it with another problem.
        """
        objective = self.objective
        if self.stored is not None and self._is_begun:
            return self.stored
        attributes = self._attributes(objective)
        if self.stored is None:
            self.stored = StoredExperiment.open_or_create(self.database.made(), self.name, attributes)
            if stored_key(self.stored.attributes).decides != objective.key.decides:
                raise StudyStoreError(f"{self.name}: another process has just begun it otherwise; run this again")
        else:
            self._continue(self.stored, attributes)
        self.stored.record.guard = self._check_key
        self._is_begun = True
        return self.stored

    def _attributes(self, objective: Objective) -> dict[str, Any]:
        """What is stored of an experiment with this objective."""
        directory = self._objectives.context.directory
        packed = objective.trajectory if isinstance(objective.trajectory, Trajectory) else None
        known = {} if self.stored is None else self.stored.attributes.get(AVERAGES) or {}
        renaming = None if packed is None or not any(packed.renaming) else [*packed.renaming]
        sampler = objective.sampler
        attributes: dict[str, Any] = {
            "key": key_to_json(objective.key),
            KEYS: self._keys(objective.key),
            "objective": self.specs[0].objective.model_dump(mode="json"),
            "directory": None if directory is None else str(directory),
            "places": dict(objective.places),
            "report_images": objective.samples.per_report,
            "samples": bool(objective.samples.per_evaluation),
            "holds_out": objective.why_nothing_held_out() is None,
            AVERAGES: averages_now(objective, known),
            "checkpoints": None if packed is None else packed.sha256,
            "steps": [int(step) for step in objective.steps],
            "renaming": renaming,
            "sampling": None if sampler is None else plain(sampler.describe()),
            "maximize": objective.maximizes,
            "machine": {"layout": objective.layout},
        }
        if self._held_out is not None:
            attributes["held_out"] = self._held_out.model_dump(mode="json")
        return attributes

    def _keys(self, key: Key) -> dict[str, Any]:
        """Digest → what trials of it are of: today's first, then others under which nothing was measured otherwise."""
        today = key.of_trials
        earlier = {} if self.stored is None else self.stored.attributes[KEYS]
        valid = {digest: of_trials for digest, of_trials in earlier.items() if agree(of_trials, today)}
        return {digest_of(today): today, **valid}

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
        try:
            decides = self.stored.record.attributes["key"]["decides"]
        except KeyError as error:
            raise StudyStoreError(f"{self.name}: was deleted meanwhile; run this again") from error
        now = self.objective.key.decides
        if decides != now:
            changed = differences(now, decides)
            raise StudyStoreError(
                f"{self.name}: another process has continued it with changes: {'; '.join(changed)}; nothing more was "
                "written from here"
            )

    # who evaluates

    def _use(self, spec: StudySpec, rows: Rule | None) -> None:
        """Merge in these rows from now on, in this process and in the workers of a search, which are opened for it."""
        objective = self.objective
        self._objectives.load(spec.objective, rows, None)  # the same object, whose rows this changes
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
        had_ended = spec.name in self.studies and is_searched(spec, self.studies[spec.name])
        search = self._opened(spec)
        self._say_how_long()
        stored = self.begun()
        with search.held(stored.storage, guard=self._check_key):
            self._score_as_trained()
            search.run(self._measurer(0, HAD).yardstick(SEARCH), pool=self._pool, callbacks=callbacks)
            self.studies[spec.name] = search.stored.attributes
            rows = spec.space.rows
            if self.rehearsal is not None and rows == self._rehearsed_rows:  # else workers would have to start again
                self.rehearsal.check_drift(self.name, lambda candidate: self._evaluate(candidate, rows))
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
        for spec in self.specs:
            if not self.is_finished(spec):
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

    def bought_by(self, seconds: Sequence[float]) -> dict[str, list[int]]:
        """Name of each search that has not ended → how many evaluations it makes in each of these times.

        Empty where nothing was rehearsed or timed.
        """
        if self.rehearsal is None or not self.rehearsal.pace.plain:
            return {}
        pace = self.rehearsal.pace
        return {
            spec.name: [evaluations_within(time_given, spec, self.objective, pace) for time_given in seconds]
            for spec in self._unfinished()
        }

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
        start = start_of(spec, self.specs, self.database) if spec.name not in self.studies else None
        try:
            objective = self.objective
        except LcscError as error:
            self.refused = error
            raise
        if spec.name in self._foreign:
            foreign = self._why_foreign(spec.name, self._foreign[spec.name], objective)
            raise StudyStoreError(f"{foreign}. Delete it, or give the new search another name: {ANEW}")
        before = self.studies.get(spec.name)
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
        self._try_functions(spec)
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
            changed="; ".join(filter(None, (self._changed, changed))),
        )

    def _choose_layout(self) -> None:
        """Choose the layout of a new experiment's network, once, before workers are opened with it."""
        if self.stored is not None or self.rehearsal is not None:
            return
        follows_gradient = any(configure(spec.optimizer).needs_gradient for spec in self.specs)
        with contextlib.suppress(Exception):  # of a sampler that fails, the rehearsal says why
            self.objective.layout = self.objective.fastest_layout(gradient=follows_gradient)

    def _try_functions(self, spec: StudySpec) -> None:
        """Evaluate a stored candidate again where the objective calls functions that nobody can compare.

        Raises:
            StudyStoreError: it has another loss, or cannot be evaluated.
        """
        functions = self._objectives.context.functions
        if not functions or self._has_tried or self.stored is None or self.objective.is_random:
            return
        for name, attributes in self.studies.items():
            trials = compared_trials(StoredStudy.open(self.database.existing(), name).trials())
            if not trials:
                continue
            rows = attributes["specification"]["space"]["rows"]
            candidate = Candidate(coefficients_of(trials[-1]), yardstick=self._measurer(0, HAD).yardstick(SEARCH))
            outcome = self._evaluate(candidate, rows)
            self._has_tried = True
            loss = trials[-1].value or 0.0
            if isinstance(outcome, Failure):
                raise StudyStoreError(
                    f"{name}: trial {trials[-1].number} could not be evaluated again, so nobody knows whether a "
                    f"function has changed ({', '.join(functions)}): {outcome.reason}"
                )
            if not is_one_score(outcome.loss, loss):
                raise StudyStoreError(
                    f"{name}: trial {trials[-1].number} had the loss {loss:.6g}, and has another one now "
                    f"({outcome.loss:.6g}): a function has changed ({', '.join(functions)}). Leave out resume, or give "
                    "the new search another name"
                )
            break
        self._use(spec, spec.space.rows)

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
            if self._pool is not None:
                self._pool.wait_until_ready()  # which is no part of the time that an evaluation takes
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

    def _measurer(self, images: int, role: str) -> Measurer:
        """What measures models on so many images; 0 for as many as a candidate of a search has."""
        return Measurer(self.begun(), self.objective, self._evaluate_model, images=images, role=role)

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
        score_as_trained(self.begun(), self.objective, self._measurer(images or 0, HAD), images)

    def _plan(self) -> ReportPlan | None:
        """The plan of the report that the study file asks for, by what is stored; ``None`` if there will be none."""
        if self.stored is None or self._held_out is None or not self.stored.attributes["holds_out"]:
            return None
        return ReportPlan.of(
            self._held_out,
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
        if self._held_out is None:
            return self.stored.report
        if self._is_loaded:
            self.begun()  # what is stored is of today then
        plan = self._plan()
        if plan is None:
            if self._is_loaded:
                notice(f"{self.name}: nothing is held out: {self.objective.why_nothing_held_out()}")
            return None
        report = self.stored.report
        chosen = self.stored.attributes.get(CHOSEN)
        if report is not None and chosen is not None and chosen["of"] == self._depends_on(plan, self._evaluations()):
            return report
        return self.evaluate(plan)

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
        stored = self.begun() if self._is_loaded else self.stored
        assert stored is not None  # whoever asks has one
        attributes = stored.attributes
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
            self._read_again(stored.storage)
            searches = self._searches(stored.storage)
            if {search.study: search.evaluations for search in searches} == dict(report.evaluations):
                break  # else another process has ended a search meanwhile
        depends_on = self._depends_on(plan, report.evaluations)
        if keep:
            stored.set_attribute("metrics", metrics_to_json(report.metrics))
            stored.choose(report, depends_on)  # whoever is interrupted before makes it again
        # only now: a machine without memory for two networks kills the process
        warning = None if self.objective.is_random else self._warning_of_new_network(report, rows)
        if warning is not None:
            notice(f"{self.name}: {warning}")
            report = dataclasses.replace(report, warnings=(*report.warnings, warning))
            if keep:
                stored.choose(report, depends_on)
        self._workers.close()  # which frees the devices
        self._workers_of = None
        return report

    def _warning_of_new_network(self, report: Report, rows: Rule | None) -> str | None:
        """What is wrong if the answer, which has these rows, has another loss in a network of its own."""
        coefficients = report.of_answer.model.coefficients
        answer = Candidate(coefficients, rehearsal=True, yardstick=self._measurer(0, HAD).yardstick(SEARCH))
        load = self._loader(rows)

        def load_the_same() -> Objective:
            """Raises StudyStoreError if something was written meanwhile: then nothing can be compared."""
            objective = load()
            changed = differences(self.objective.key.decides, objective.key.decides, None, objective.key.inputs)
            if changed:
                notice(
                    f"{self.name}: while it ran, there were changes: {'; '.join(changed)}; all results are of what it "
                    "began with"
                )
                raise StudyStoreError("changed meanwhile")
            return objective

        return warning_of_kept_state(answer, lambda candidate: self._evaluate(candidate, rows), load_the_same)

    def _read_again(self, storage: RDBStorage) -> None:
        """Other processes may have begun searches, or deleted some."""
        contents = read_contents(storage)
        foreign = contents.foreign(self.name)
        self.studies = {name: found for name, found in contents.of(self.name).items() if name not in foreign}

    def _searches(self, storage: RDBStorage) -> list[Searched]:
        """All searches that are known, as they are now, but for those that another process runs."""
        running = locked(storage, list(self.studies))
        return [
            Searched(name, StoredStudy.open(storage, name).trials()) for name in self.studies if name not in running
        ]
