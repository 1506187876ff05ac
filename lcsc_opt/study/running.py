"""Runs the studies of one database, one after the other. A dry run is a run that stops before the first trial."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError, SearchFailedError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.study_file import OptimizerSpec, SpaceSpec, StudySpec
from lcsc_opt.database.connection import open_existing, open_storage
from lcsc_opt.database.names import EMA_GRID
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.database.urls import files_directory, masked
from lcsc_opt.objective.checkpoints_alone import checkpoints_written_again, new_checkpoints
from lcsc_opt.objective.contract import Objective
from lcsc_opt.study.callbacks import TrialCallback
from lcsc_opt.study.comparison import Attributes, StoredTrials, changed_since_finished, is_complete, is_finished
from lcsc_opt.study.defaults import completed
from lcsc_opt.study.held_out import HeldOutPlan
from lcsc_opt.study.opening import PreparedStudy, larger_report, outcome_of, prepared
from lcsc_opt.study.origin import ended_grid, origin_at
from lcsc_opt.study.plan import Plan, plans
from lcsc_opt.study.rehearsal import say_duration
from lcsc_opt.study.resources import ObjectiveLoader, code_now, loader_of, moved, read_trials
from lcsc_opt.study.timing import Pace, report_seconds, searches_seconds, seconds_for


class Run:
    """Studies of one database that run one after the other; those of one objective follow each other.

    Args:
        plans: of the studies.
        url: of the database.
        accept_changes: continue although the code, the versions or the reference have changed since a study began.
        retry_failed: repeat trials that failed after the last success of a study.
        objectives: keeps an objective that is loaded already.

    Attributes:
        plans: in the order in which they run.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        url: str,
        *,
        accept_changes: bool = False,
        retry_failed: bool = False,
        objectives: ObjectiveLoader | None = None,
    ) -> None:
        self._url = url
        self._accept_changes = accept_changes
        self._retry_failed = retry_failed
        self._objectives = ObjectiveLoader() if objectives is None else objectives
        self._rehearsed: dict[str, Pace] = {}  # by keys of objectives
        self._refused: dict[str, LcscError] = {}  # key of an objective → why its studies cannot run
        self._storage = open_existing(url)
        files = files_directory(url)
        self.plans = [dataclasses.replace(plan, files=files) for plan in _by_objective(plans)]

    def rehearse(self) -> dict[str, Attributes]:
        """Do all that comes before the first trial of each objective, and say how long a run takes; write no study.

        Returns:
            Name → attributes of each study, as stored or as it would begin with.

        Raises:
            LcscError: the first thing that is wrong.
        """
        studies = self._studies()
        attributes = dict(studies)
        timed: set[str] = set()  # keys of objectives
        searches = 0.0
        reports = 0.0
        for plan in self.plans:
            key = plan.objective_key
            if self._is_finished(plan, studies.get(plan.name)):
                continue
            with self._prepared(plan, studies) as study:
                study.ask_once()
                attributes[plan.name] = study.attributes
                to_run = self._without_result(key, studies)
                if to_run and key not in timed:
                    timed.add(key)
                    searches += searches_seconds(to_run, study.objective, self._rehearsed[key])
                    reports += report_seconds(to_run, study.objective, self._rehearsed[key])
        limits = [plan.spec.budget.seconds or 0.0 for plan in self.plans]  # one time, for all together
        if timed:
            name = self.plans[0].spec.sweep
            say_duration(f"{name}: the whole run takes at most", max([searches, *limits]) + reports)
            if reports:
                say_duration(f"{name}: of these, reports take", reports)
        return attributes

    def evaluations(self) -> dict[str, int]:
        """Name → number of evaluations, of those of the studies that are stored."""
        if self._storage is None:
            return {}
        summaries = HistoryReader(self._storage).summaries([plan.name for plan in self.plans])
        return {study.study: study.evaluations for study in summaries}

    def run(self, plan: Plan, callbacks: Sequence[TrialCallback] = ()) -> str:
        """Search until the budget is spent, then report on held-out noise. Finished work is not repeated.

        Args:
            plan: of the study.
            callbacks: called with Optuna's study and the trial, after each trial that ends in this run.

        Returns:
            One line for people: the result.

        Raises:
            LcscError: the study cannot run, or fails.
            Exception: what a callback raises.
        """
        studies = self._studies()
        stored = studies.get(plan.name)
        if stored is not None and is_finished(plan, stored) and not self._retry_failed:
            changed = changed_since_finished(plan, stored, code_now(plan))
            if changed is not None:
                notice(f"{changed}. lcsc run FILE name=... starts a new search")
        if self._storage is not None and stored is not None and self._is_finished(plan, stored):
            return _finished(plan, stored, self._storage)
        with contextlib.ExitStack() as stack:
            study = stack.enter_context(self._prepared(plan, studies))
            if self._storage is None:
                self._storage = open_storage(self._url, write=True)
            stack.enter_context(study.held(self._storage))
            seconds = 0.0
            if plan.spec.budget.seconds is not None:
                seconds = seconds_for(plan, self.plans, studies)
            study.search(callbacks, seconds=seconds)
            study.report()
            return outcome_of(plan, self._storage)

    def _studies(self) -> Mapping[str, Attributes]:
        """Name → attributes of all stored studies. A missing database is made when the first study is written."""
        return {} if self._storage is None else our_studies(self._storage)

    def _trials(self, name: str) -> StoredTrials:
        """The trials of a stored study."""
        assert self._storage is not None  # it is stored
        return read_trials(self._storage, name)

    def _is_finished(self, plan: Plan, stored: Attributes | None) -> bool:
        """Whether nothing is left to do. What now lies at another place is loaded, and compared by its content."""
        if stored is None or self._retry_failed:
            return False
        return is_complete(plan, stored) and not moved(plan, stored)

    @property
    def is_hopeless(self) -> bool:
        """Whether no objective of these studies could be loaded and rehearsed."""
        return {plan.objective_key for plan in self.plans} == self._refused.keys()

    @contextlib.contextmanager
    def _prepared(self, plan: Plan, studies: Mapping[str, Attributes]) -> Iterator[PreparedStudy]:
        """A study that may run, whose objective has been rehearsed.

        Raises:
            LcscError: it may not run; no other study of the same objective is tried then.
        """
        key = plan.objective_key
        if key in self._refused:
            raise self._refused[key]
        plan.check_devices()
        stored = studies.get(plan.name)
        source = self._start_of(plan, studies) if stored is None else None
        try:
            objective = self._objectives.load(plan, studies)
        except LcscError as error:
            self._refused[key] = error
            raise
        if source is not None:
            origin = origin_at(source, objective, plan.spec.space.rows)
            plan = dataclasses.replace(plan, origin=origin.tolist())
        with prepared(
            plan,
            objective,
            studies,
            trials=self._trials,
            accept_changes=self._accept_changes,
            retry_failed=self._retry_failed and stored is not None,
            # a finished study is opened only to store where its files are now
            measures=self._retry_failed or self._accept_changes or stored is None or not is_finished(plan, stored),
        ) as study:
            if key not in self._rehearsed:
                try:
                    pace = study.rehearse(self._without_result(key, studies))
                except LcscError as error:
                    self._refused[key] = error
                    raise
                self._rehearsed[key] = pace
            yield study

    def _start_of(self, plan: Plan, studies: Mapping[str, Attributes]) -> StoredStudy | None:
        """The study at whose answer a new one begins: its ``start``, else the experiment's EMA grid if that has ended.

        Raises:
            StudyStoreError: there is no such study.
        """
        start = plan.specification["start"]
        if start is None and plan.begins_at_ema:
            start = ended_grid(plan.spec.name, studies)
        if start is None:
            return None
        return StoredStudy.open(self._storage or open_storage(self._url, write=False), start)

    def _without_result(self, key: str, studies: Collection[str]) -> list[Plan]:
        """The plans with this objective of whose studies no trial has succeeded."""

        def has_result(name: str) -> bool:
            return name in studies and self._trials(name).succeeded

        return [plan for plan in self.plans if plan.objective_key == key and not has_result(plan.name)]


def plans_of(
    specs: Sequence[StudySpec],
    directory: Path | None,
    url: str,
    objectives: ObjectiveLoader,
    *,
    optimizers: Sequence[str] = (),
    seeds: Sequence[int] = (),
    budget: int | None = None,
) -> list[Plan]:
    """The studies of a study file or a stored study; :mod:`lcsc_opt.study.defaults` chooses what it leaves open.

    The objective of the first point of a sweep decides for all.

    Args:
        specs: the study file, or all points of its sweep.
        directory: its folder, if it has one.
        url: of the database.
        objectives: loads an objective, if something is to be chosen, and keeps it for the run.
        optimizers: only these; one that the file does not list has its default options.
        seeds: only these; the file need not list them.
        budget: another total for each study, in the unit of the study file.

    Raises:
        StudySpecError: an unknown optimizer or option; or ``budget`` is given, and the sweep varies the budget.
        LcscError: an objective that must be known cannot be loaded.
    """
    files = files_directory(url)

    @functools.cache
    def stored() -> Mapping[str, Attributes]:
        storage = open_existing(url)
        if storage is None:
            return {}
        studies = our_studies(storage)
        storage.engine.dispose()
        return studies

    @functools.cache
    def objective() -> Objective:
        grid = (OptimizerSpec(name=EMA_GRID),)  # which has the checkpoints that the experiment was begun with
        plan = Plan(specs[0], directory, files=files).changed(space=SpaceSpec(), optimizers=grid)
        return objectives.load(plan, stored())

    complete: list[StudySpec] = []
    for spec in specs:
        complete += completed(spec, stored, objective, optimizers=optimizers)
    return plans(complete, directory, seeds=seeds, budget=budget)


def run_plans(
    to_run: Sequence[Plan],
    url: str,
    *,
    on_end: Callable[[str], None] = lambda _: None,
    accept_changes: bool = False,
    retry_failed: bool = False,
    objectives: ObjectiveLoader | None = None,
    callbacks: Sequence[TrialCallback] = (),
) -> None:
    """Run studies, one after the other. One that fails, or that another process runs, does not stop the others.

    A missing database is created when the first study has been rehearsed.

    Args:
        to_run: the plans.
        url: the URL of the database.
        on_end: called with one line when a study has ended or cannot run, and with the database's URL at the end.
        accept_changes: as of :class:`Run`.
        retry_failed: as of :class:`Run`.
        objectives: as of :class:`Run`.
        callbacks: as of :meth:`Run.run`.

    Raises:
        LcscError: no objective could be loaded and rehearsed, or the only study failed.
        SearchFailedError: some of several studies failed; the message names them, and says why the first one did.
        Exception: what a callback raises, which ends the run.
    """
    run = Run(
        to_run,
        url,
        accept_changes=accept_changes,
        retry_failed=retry_failed,
        objectives=objectives,
    )
    failed: dict[str, str] = {}
    try:
        for plan in run.plans:
            try:
                outcome = run.run(plan, callbacks)
            except LcscError as error:
                if len(run.plans) == 1 or run.is_hopeless:
                    raise
                outcome = str(error).removeprefix(f"{plan.name}: ")
                failed[plan.name] = outcome
            on_end(f"{plan.name}: {outcome}")
    finally:
        on_end(f"database: {masked(url)}")
    if failed:
        first, reason = next(iter(failed.items()))
        raise SearchFailedError(
            f"{len(failed)} of {len(run.plans)} studies did not finish: {', '.join(failed)}. {first}: {reason}"
        )


def evaluate(plan: Plan, storage: RDBStorage, held_out: HeldOutPlan, *, accept_changes: bool = False) -> HeldOutReport:
    """Choose among a stored study's best trials on selection noise, and report the chosen one on held-out noise.

    With ``held_out.keep`` the report becomes the study's result.

    Raises:
        LcscError: as :func:`prepared`, such as losses that no longer compare; the objective has no held-out loss; no
            trial is complete, or none of the best can be evaluated.
    """
    studies = our_studies(storage)
    with contextlib.ExitStack() as stack:
        study = stack.enter_context(
            prepared(
                plan,
                ObjectiveLoader().load(plan, studies),
                studies,
                trials=lambda name: read_trials(storage, name),
                accept_changes=accept_changes,
            )
        )
        stack.enter_context(study.held(storage))
        return study.evaluate(held_out)


def objective_of(study: StoredStudy, functions: Mapping[str, Callable[..., Any]] | None = None) -> Objective:
    """The objective of a stored study. Loading it may read a model.

    Args:
        study: the study.
        functions: those that its caller handed over, where its settings name such.
    """
    plan = Plan.of(study)
    if functions is not None:
        plan = dataclasses.replace(plan, functions=functions)
    return loader_of(plan, our_studies(study.storage))()


def finished_already(stored: Attributes) -> str:
    """``finished already, 2026-11-27 08:41``: that a result is not new, and from when it is."""
    ended_at = stored["search_ended"].get("at")
    if ended_at is None:
        return "finished already"
    return f"finished already, {datetime.datetime.fromtimestamp(ended_at):%Y-%m-%d %H:%M}"


def _finished(plan: Plan, stored: Attributes, storage: RDBStorage) -> str:
    """The result of a finished study."""
    line = f"{finished_already(stored)}; " + outcome_of(plan, storage) + larger_report(plan, stored)
    if stored["search_ended"]["exhausted"]:
        line += "; the optimizer has nothing more to ask"
    if plan.is_grid:
        return line
    study = StoredStudy.open(storage, plan.name)
    if checkpoints_written_again(study):
        line += f"; its checkpoints were written again since, which lcsc run {plan.name} name=NEW searches"
    new = new_checkpoints(study)
    return f"{line}; {new}" if new else line


def _by_objective(plans: Sequence[Plan]) -> list[Plan]:
    """The plans in their order, but those of one objective together: only one objective is in memory at a time."""
    groups: dict[str, list[Plan]] = {}
    for plan in plans:
        groups.setdefault(plan.objective_key, []).append(plan)
    return [plan for group in groups.values() for plan in group]
