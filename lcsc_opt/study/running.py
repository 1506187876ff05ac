"""Runs the studies of one database, one after the other. A dry run is a run that stops before the first trial."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcsc_opt.base.errors import LcscError, SearchFailedError, StudySpecError, StudyStoreError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_file import StudyFile
from lcsc_opt.base.study_spec import EMA_GRID, LANDSCAPE, OptimizerSpec, SpaceSpec, StudySpec
from lcsc_opt.database.connection import open_existing, open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.states import Attributes, is_finished
from lcsc_opt.database.store import StoredStudy, StoredTrials, our_studies, read_trials
from lcsc_opt.database.urls import files_directory, masked
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.of_study import ObjectiveLoader, code_now, loader_of, moved
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.study.comparison import changed_since_finished, is_complete
from lcsc_opt.study.defaults import completed
from lcsc_opt.study.held_out import HeldOutPlan
from lcsc_opt.study.landscape import landscape_spec
from lcsc_opt.study.loop import TrialCallback
from lcsc_opt.study.origin import ended_grid, origin_at
from lcsc_opt.study.outcome import outcome_of, outcome_of_finished
from lcsc_opt.study.rehearsal import about
from lcsc_opt.study.searching import Search
from lcsc_opt.study.timing import Pace, report_seconds, searches_seconds, seconds_for


class Run:
    """Studies of one database that run one after the other; those that share an objective run consecutively.

    Args:
        specs: of the studies.
        url: of the database.
        objectives: loads them, or keeps one that is loaded already.
        accept_changes: continue although the code, the versions or the reference have changed since a study began.
        retry_failed: repeat trials that failed after the last success of a study.

    Attributes:
        specs: in the order in which they run.
    """

    def __init__(
        self,
        specs: Sequence[StudySpec],
        url: str,
        objectives: ObjectiveLoader,
        *,
        accept_changes: bool = False,
        retry_failed: bool = False,
    ) -> None:
        self._url = url
        self._accept_changes = accept_changes
        self._retry_failed = retry_failed
        self._objectives = objectives
        self._paces: dict[str, Pace] = {}  # key of an objective → how long its evaluations took in the rehearsal
        self._refused: dict[str, LcscError] = {}  # key of an objective → why its studies cannot run
        self._storage = open_existing(url)  # None until a missing file is made, for the first study that may run
        self.specs = _by_objective(specs)

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
        for spec in self.specs:
            key = objective_key(spec)
            if self._is_finished(spec, studies.get(spec.name)):
                continue
            with self._rehearsed(spec, studies) as search:
                search.ask_once()
                attributes[spec.name] = search.attributes
                if key in self._paces and key not in timed:  # it has no pace where each study has a result already
                    timed.add(key)
                    to_run = [
                        other
                        for other in self.specs
                        if objective_key(other) == key and not self._is_finished(other, studies.get(other.name))
                    ]
                    searches += searches_seconds(to_run, search.objective, self._paces[key])
                    reports += report_seconds(to_run, search.objective, self._paces[key])
        limits = [spec.budget.seconds or 0.0 for spec in self.specs]  # one time, for all together
        if timed:
            name = self.specs[0].sweep
            estimate = f"{name}: the whole run takes up to {about(max([searches, *limits]) + reports)}"
            if reports:
                estimate += f", of which reports take {about(reports)}"
            notice(estimate)
        return attributes

    def evaluations(self) -> dict[str, int]:
        """Name → number of evaluations, of those of these studies that are stored."""
        if self._storage is None:
            return {}
        summaries = HistoryReader(self._storage).read_studies([spec.name for spec in self.specs])
        return {study.study: study.evaluations for study in summaries}

    def run(self, spec: StudySpec, callbacks: Sequence[TrialCallback] = ()) -> str:
        """Search until the budget is spent, then report on held-out noise. Finished work is not repeated.

        Args:
            spec: of the study.
            callbacks: called with Optuna's study and the trial, after each trial that ends in this run.

        Returns:
            One line for people: the result.

        Raises:
            LcscError: the study cannot run, or fails.
            Exception: what a callback raises.
        """
        studies = self._studies()
        stored = studies.get(spec.name)
        if stored is not None and is_finished(spec, stored) and not self._retry_failed:
            code = code_now(spec.objective, self._objectives.context.directory)
            changed = changed_since_finished(spec.name, stored, code)
            if changed is not None:
                notice(f"{changed}. Under another name a new search starts: lcsc run FILE name=NEW")
        if self._storage is not None and self._is_finished(spec, stored):
            return outcome_of_finished(spec, StoredStudy.open(self._storage, spec.name))
        with self._rehearsed(spec, studies) as search:
            if self._storage is None:
                self._storage = open_storage(self._url, write=True)
            with search.held(self._storage):
                seconds = 0.0
                if spec.budget.seconds is not None:
                    seconds = seconds_for(spec, self.specs, studies)
                search.run(callbacks, seconds=seconds)
                search.report()
            return outcome_of(spec.name, self._storage)

    def _studies(self) -> Mapping[str, Attributes]:
        """Name → attributes of all stored studies. A missing database is made when the first study is written."""
        return {} if self._storage is None else our_studies(self._storage)

    def _trials(self, name: str) -> StoredTrials:
        """The trials of a stored study."""
        assert self._storage is not None  # it is stored
        return read_trials(self._storage, name)

    def _is_finished(self, spec: StudySpec, stored: Attributes | None) -> bool:
        """Whether nothing is left to do. What now lies at another place is loaded, and compared by its content."""
        if stored is None or self._retry_failed:
            return False
        return is_complete(spec, stored) and not moved(self._objectives.context.directory, stored)

    @property
    def has_database(self) -> bool:
        """Whether the database exists."""
        return self._storage is not None

    @property
    def is_hopeless(self) -> bool:
        """Whether no objective of these studies could be loaded and rehearsed."""
        return {objective_key(spec) for spec in self.specs} == self._refused.keys()

    @contextlib.contextmanager
    def _rehearsed(self, spec: StudySpec, studies: Mapping[str, Attributes]) -> Iterator[Search]:
        """A study that may run. Its objective has been rehearsed, by the first study of it that has no result.

        Raises:
            LcscError: it may not run. Where its objective cannot be loaded or rehearsed, no other study of that
                objective is tried.
        """
        key = objective_key(spec)
        if key in self._refused:
            raise self._refused[key]
        stored = studies.get(spec.name)
        source = self._start_of(spec, studies) if stored is None else None
        without_result = self._without_result(key, studies)
        try:
            objective = self._objectives.load(spec, studies)
        except LcscError as error:
            self._refused[key] = error
            raise
        with Search.open(
            spec,
            objective,
            studies,
            context=self._objectives.context,
            trials=self._trials,
            origin=None if source is None else origin_at(source, objective, spec.space.rows),
            accept_changes=self._accept_changes,
            retry_failed=self._retry_failed,
            # a finished study is opened only to store where its files are now
            measures=self._retry_failed or self._accept_changes or stored is None or not is_finished(spec, stored),
        ) as search:
            if spec in without_result and key not in self._paces:
                try:
                    self._paces[key] = search.rehearse(without_result)
                except LcscError as error:
                    self._refused[key] = error
                    raise
            if key in self._paces:
                search.use_layout(self._paces[key].layout)
            yield search

    def _start_of(self, spec: StudySpec, studies: Mapping[str, Attributes]) -> StoredStudy | None:
        """The study at whose answer a new one begins: its ``start``, else the experiment's EMA grid if that has ended.

        ``None`` if it begins where its space or its algorithm does.

        Raises:
            StudyStoreError: there is no such study.
        """
        start = spec.start
        if start is None and spec.begins_at_ema:
            start = ended_grid(spec.experiment, studies)
        if start is None:
            return None
        # opened to read, a missing database raises an error
        return StoredStudy.open(self._storage or open_storage(self._url, write=False), start)

    def _without_result(self, key: str, studies: Collection[str]) -> list[StudySpec]:
        """The studies of this objective without a successful trial."""

        def has_result(name: str) -> bool:
            return name in studies and self._trials(name).succeeded

        return [spec for spec in self.specs if objective_key(spec) == key and not has_result(spec.name)]


def objective_key(spec: StudySpec) -> str:
    """Studies with the same key have the same objective."""
    return spec.objective.model_dump_json()


def studies_of(
    points: Sequence[StudyFile],
    url: str,
    objectives: ObjectiveLoader,
    *,
    optimizers: Sequence[str] = (),
    seeds: Sequence[int] = (),
    budget: int | None = None,
) -> list[StudySpec]:
    """The studies of a study file; :mod:`lcsc_opt.study.defaults` chooses what it leaves open.

    The objective of the first point of a sweep decides for all.

    Args:
        points: the study file, or all points of its sweep.
        url: of the database.
        objectives: loads an objective, if something is to be chosen, and keeps it for the run.
        optimizers: only these; one that the file does not list has its default options.
        seeds: only these; the file need not list them.
        budget: another total for each study, in the unit of the study file.

    Raises:
        StudySpecError: an unknown optimizer or option; or ``budget`` is given, and the sweep varies the budget.
        LcscError: the database cannot be opened, or an objective that must be known cannot be loaded.
    """

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
        return objectives.load(any_study(points[0]), stored())

    complete: list[StudyFile] = []
    for point in points:
        complete += completed(point, stored, objective, optimizers=optimizers)
    return listed(complete, seeds=seeds, budget=budget)


def any_study(point: StudyFile) -> StudySpec:
    """A study that has the objective of a study file, before its optimizers are chosen: a grid, in one row."""
    grid = OptimizerSpec(name=EMA_GRID)
    [spec] = point.model_copy(update={"optimizers": (grid,), "seeds": (0,), "space": SpaceSpec()}).studies()
    return spec


def listed(points: Sequence[StudyFile], *, seeds: Sequence[int] = (), budget: int | None = None) -> list[StudySpec]:
    """The studies that complete study files describe; those of a sweep point by point.

    Args:
        points: the study file, or all points of its sweep, which :func:`lcsc_opt.study.defaults.completed` gives.
        seeds: only these; the file need not list them.
        budget: another total for each study, in the unit of the study file.

    Raises:
        StudySpecError: an unknown optimizer or option; two choices of a device; or ``budget`` is given, and the sweep
            varies the budget.
    """
    if budget is not None:
        points = _with_budget(points, budget)
    specs = []
    for point in points:
        for optimizer in point.optimizers:
            configure(optimizer)  # raises if an option is wrong
        for spec in point.studies(seeds):
            if spec.optimizer.name == LANDSCAPE:
                specs.append(landscape_spec(spec))
            elif spec.is_grid:  # its list is the same wherever searches begin
                specs.append(spec.model_copy(update={"start": None}))
            else:
                specs.append(spec)
    return specs


def _with_budget(points: Sequence[StudyFile], total: int) -> list[StudyFile]:
    """The points of a study file with another total, each in its unit; they all vary the same keys.

    Raises:
        StudySpecError: one of these keys is of the budget.
    """
    for key in points[0].vary:
        if key.split(".")[0] == "budget":
            raise StudySpecError(f"--budget: the study file varies {key}; give {key}={total} instead")
    return [point.model_copy(update={"budget": point.budget.with_total(total)}) for point in points]


def run_studies(
    specs: Sequence[StudySpec],
    url: str,
    objectives: ObjectiveLoader,
    *,
    on_end: Callable[[str], None] = lambda _: None,
    accept_changes: bool = False,
    retry_failed: bool = False,
    callbacks: Sequence[TrialCallback] = (),
) -> None:
    """Run studies, one after the other. One that fails, or that another process runs, does not stop the others.

    A missing database is created when the first study has been rehearsed.

    Args:
        specs: of the studies.
        url: the URL of the database.
        objectives: as of :class:`Run`.
        on_end: called with one line when a study has ended or cannot run, and with the database's URL at the end, if
            there is a database.
        accept_changes: as of :class:`Run`.
        retry_failed: as of :class:`Run`.
        callbacks: as of :meth:`Run.run`.

    Raises:
        LcscError: the database cannot be opened, no objective could be loaded and rehearsed, or the only study failed.
        SearchFailedError: some of several studies failed; the message says which, and why.
        Exception: what a callback raises, which ends the run.
    """
    run = Run(specs, url, objectives, accept_changes=accept_changes, retry_failed=retry_failed)
    failed: dict[str, str] = {}
    try:
        for spec in run.specs:
            try:
                outcome = run.run(spec, callbacks)
            except LcscError as error:
                if len(run.specs) == 1 or run.is_hopeless:
                    raise
                outcome = str(error).removeprefix(f"{spec.name}: ")
                failed[spec.name] = outcome
            on_end(f"{spec.name}: {outcome}")
    finally:
        if run.has_database:
            on_end(f"database: {masked(url)}")
    if failed:
        names_of: dict[str, list[str]] = {}
        for name, reason in failed.items():
            names_of.setdefault(reason, []).append(name)
        reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in names_of.items())
        raise SearchFailedError(f"{len(failed)} of {len(run.specs)} studies did not finish: {reasons}")


def evaluate(study: StoredStudy, plan: HeldOutPlan, *, accept_changes: bool = False) -> HeldOutReport:
    """Choose among a stored study's best trials on selection noise, and report the chosen one on held-out noise.

    With ``plan.keep`` the report becomes the study's result.

    Raises:
        LcscError: as :meth:`Search.open`, such as losses that no longer compare; another process runs the study; the
            objective has no held-out loss; no trial is complete, or one of the best cannot be evaluated.
    """
    spec = spec_of(study)
    context = context_of(study)
    studies = our_studies(study.storage)
    with contextlib.ExitStack() as stack:
        search = stack.enter_context(
            Search.open(
                spec,
                ObjectiveLoader(context).load(spec, studies),
                studies,
                context=context,
                trials=lambda name: read_trials(study.storage, name),
                accept_changes=accept_changes,
            )
        )
        stack.enter_context(search.held(study.storage))
        return search.evaluate(plan)


def objective_of(study: StoredStudy, functions: Mapping[str, Callable[..., Any]] | None = None) -> Objective:
    """The objective of a stored study. Loading it may read a model.

    Args:
        study: the study.
        functions: those that its caller handed over, where its settings name such.

    Raises:
        LcscError: it cannot be loaded: its file, its checkpoints, its data or a function is not there.
    """
    context = dataclasses.replace(context_of(study), functions=functions or {})
    return loader_of(spec_of(study), context, our_studies(study.storage))()


def spec_of(study: StoredStudy) -> StudySpec:
    """The specification of a stored study, so that it can be continued without its study file.

    Raises:
        StudyStoreError: lcsc_opt did not write the study, or another version did.
    """
    try:
        return parse_settings(StudySpec, study.attributes.get("specification"), source="its specification")
    except StudySpecError as error:
        raise StudyStoreError(f"{study.name}: not a study of lcsc_opt, or of another version ({error})") from error


def context_of(study: StoredStudy) -> BuildContext:
    """Where the files of a stored study are."""
    directory = study.attributes.get("directory")
    return BuildContext(
        directory=None if directory is None else Path(directory),
        files=files_directory(study.storage.url),
    )


def _by_objective(specs: Sequence[StudySpec]) -> list[StudySpec]:
    """The studies in their order, but those of one objective together: only one objective is in memory at a time."""
    groups: dict[str, list[StudySpec]] = {}
    for spec in specs:
        groups.setdefault(objective_key(spec), []).append(spec)
    return [spec for group in groups.values() for spec in group]
