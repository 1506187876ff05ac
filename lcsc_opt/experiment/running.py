"""Runs the experiments of a study file, one after the other. A dry run is a run that stops before the first trial."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage

from lcsc_opt.base.errors import LcscError, SearchFailedError, StudySpecError, StudyStoreError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_file import StudyFile
from lcsc_opt.base.study_spec import (
    EMA_GRID,
    LANDSCAPE,
    OF_EXPERIMENT,
    HeldOutSpec,
    OptimizerSpec,
    SpaceSpec,
    StudySpec,
)
from lcsc_opt.database.names import is_ranked, split_name
from lcsc_opt.database.opened import Database
from lcsc_opt.database.report import REPORT, Report, ReportPlan
from lcsc_opt.database.states import Attributes
from lcsc_opt.database.store import Contents, read_contents
from lcsc_opt.database.urls import files_directory, masked
from lcsc_opt.experiment.defaults import completed
from lcsc_opt.experiment.experiment import Experiment
from lcsc_opt.experiment.outcome import outcome_of_finished
from lcsc_opt.experiment.rehearsal import about
from lcsc_opt.experiment.timing import report_seconds, searches_seconds
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.of_study import ObjectiveLoader, known_checkpoints, loader_of
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.study.landscape import landscape_spec
from lcsc_opt.study.loop import TrialCallback
from lcsc_opt.views.answer import answer_line


def studies_of(points: Sequence[StudyFile], database: Database, objectives: ObjectiveLoader) -> list[StudySpec]:
    """The studies of a study file; :mod:`lcsc_opt.experiment.defaults` chooses what it leaves open.

    The objective of the first point of a sweep decides for all.

    Args:
        points: the study file, or all points of its sweep.
        database: of the run.
        objectives: loads an objective, if something is to be chosen, and keeps it for the run.

    Raises:
        StudySpecError: an unknown optimizer or option.
        LcscError: the database cannot be opened, or an objective that must be known cannot be loaded.
    """

    @functools.cache
    def objective() -> Objective:
        spec = any_study(points[0])
        directory = objectives.context.directory
        known = known_checkpoints(spec.experiment, spec.objective, directory, database.contents.experiments)
        return objectives.load(spec.objective, None, known)

    complete: list[StudyFile] = []
    for point in points:
        complete += completed(point, lambda: database.contents.studies, objective)
    return searches_of(complete)


def any_study(point: StudyFile) -> StudySpec:
    """A study that has the objective of a study file, before its optimizers are chosen: a grid, in one row."""
    grid = OptimizerSpec(name=EMA_GRID)
    [spec] = point.model_copy(update={"optimizers": (grid,), "seeds": (0,), "space": SpaceSpec()}).studies()
    return spec


def searches_of(points: Sequence[StudyFile]) -> list[StudySpec]:
    """The studies that complete study files describe; those of a sweep point by point.

    Args:
        points: the study file, or all points of its sweep, which :func:`lcsc_opt.experiment.defaults.completed` gives.

    Raises:
        StudySpecError: an unknown optimizer or option; or two choices of a device.
    """
    specs = []
    for point in points:
        for optimizer in point.optimizers:
            configure(optimizer)  # raises if an option is wrong
        for spec in point.studies():
            if spec.optimizer.name == LANDSCAPE:
                specs.append(landscape_spec(spec))
            elif spec.is_grid:  # its list is the same wherever searches begin
                specs.append(spec.model_copy(update={"start": None}))
            else:
                specs.append(spec)
    return specs


def run_studies(
    specs: Sequence[StudySpec],
    database: Database,
    objectives: ObjectiveLoader,
    *,
    on_end: Callable[[str], None] = lambda _: None,
    on_finished: Callable[[str], None] = lambda _: None,
    accept_changes: bool = False,
    retry_failed: bool = False,
    callbacks: Sequence[TrialCallback] = (),
) -> None:
    """Run searches, experiment after experiment, and report each. One that fails does not stop the others.

    A missing database is created when the first search has been rehearsed.

    Args:
        specs: of the searches.
        database: of the run.
        objectives: loads their objectives.
        on_end: called with one line when a search has ended or cannot run, with the answer of each experiment, and
            with the database's URL at the end, if there is a database.
        on_finished: called with that line of a search that had finished before.
        accept_changes: continue although the code, the versions or the reference have changed.
        retry_failed: repeat trials that failed after the last success of a search.
        callbacks: as of :meth:`Experiment.search`.

    Raises:
        LcscError: the database cannot be opened, no objective could be loaded and rehearsed, or the only search failed.
        SearchFailedError: some of several searches failed; the message says which, and why.
        Exception: what a callback raises, which ends the run.
    """
    failed: dict[str, str] = {}
    unreported: dict[str, str] = {}  # experiments
    is_alone = len(specs) == 1
    experiments = _by_experiment(specs)
    try:
        for of_experiment in experiments:
            with Experiment(
                of_experiment,
                database,
                objectives,
                accept_changes=accept_changes,
                retry_failed=retry_failed,
            ) as experiment:
                for spec in of_experiment:
                    try:
                        if experiment.is_finished(spec):
                            experiment.check_finished(spec)
                            outcome = outcome_of_finished(database, spec)
                            on_finished(f"{spec.name}: {outcome}")
                        else:
                            outcome = experiment.search(spec, callbacks)
                    except LcscError as error:
                        if is_alone or (experiment.is_hopeless and len(experiments) == 1):
                            raise
                        outcome = str(error).removeprefix(f"{spec.name}: ")
                        failed[spec.name] = outcome
                    on_end(f"{spec.name}: {outcome}")
                if all(spec.name in failed for spec in of_experiment):
                    continue
                try:
                    _reported(experiment, on_end)
                except LcscError as error:
                    if not failed and len(experiments) == 1:
                        raise
                    unreported[experiment.name] = str(error).removeprefix(f"{experiment.name}: ")
    finally:
        if database.storage is not None:
            on_end(f"database: {masked(database.url)}")
    lines = []
    if failed:
        lines.append(f"{len(failed)} of {len(specs)} studies did not finish: {_by_reason(failed)}")
    if unreported:
        lines.append(f"no new report: {_by_reason(unreported)}")
    if lines:
        raise SearchFailedError("; ".join(lines))


def _by_reason(failed: Mapping[str, str]) -> str:
    """Names and why they failed, each reason once."""
    names_of: dict[str, list[str]] = {}
    for name, reason in failed.items():
        names_of.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in names_of.items())


def _reported(experiment: Experiment, on_end: Callable[[str], None]) -> None:
    """Report an experiment, and say its answer."""
    if experiment.is_hopeless or experiment.database.storage is None:
        return
    report = experiment.report()
    if report is not None:
        on_end(f"{experiment.name}: {answer_line(report)}")


def _by_experiment(specs: Sequence[StudySpec]) -> list[list[StudySpec]]:
    """The searches of each experiment, in their order."""
    experiments: dict[str, list[StudySpec]] = {}
    for spec in specs:
        experiments.setdefault(spec.experiment, []).append(spec)
    return list(experiments.values())


def rehearse_studies(
    specs: Sequence[StudySpec],
    database: Database,
    objectives: ObjectiveLoader,
    *,
    accept_changes: bool = False,
    retry_failed: bool = False,
) -> dict[str, Attributes]:
    """Do all that comes before the first trial of each experiment, and say how long a run takes; write nothing.

    Arguments are those of :func:`run_studies`.

    Returns:
        Name → attributes of each study, as stored or as it would begin with.

    Raises:
        LcscError: the first thing that is wrong.
    """
    attributes: dict[str, Attributes] = {}
    searches = 0.0
    reports = 0.0
    for of_experiment in _by_experiment(specs):
        with Experiment(
            of_experiment, database, objectives, accept_changes=accept_changes, retry_failed=retry_failed
        ) as experiment:
            attributes |= experiment.rehearse()
            if experiment.pace is not None:  # it has no pace where each search has a result already
                searches += searches_seconds(experiment.to_search, experiment.objective, experiment.pace)
                reports += report_seconds(of_experiment, experiment.objective, experiment.pace)
    if searches:
        estimate = f"{specs[0].sweep}: the whole run takes up to {about(searches + reports)}"
        if reports:
            estimate += f", of which reports take {about(reports)}"
        notice(estimate)
    return attributes


def evaluate_again(
    database: Database,
    name: str,
    *,
    images: int | None = None,
    top: int | None = None,
    seeds: tuple[int, ...] = (0,),
    keep: bool = False,
    accept_changes: bool = False,
) -> tuple[Report, bool]:
    """Report a stored experiment, with other numbers of images or groups of noise.

    Args:
        database: of the experiment.
        name: of the experiment.
        images: for each model and group; ``None`` is what its study file asks for.
        top: how many trials of all searches are compared; likewise.
        seeds: of the groups of held-out noise.
        keep: whether the report becomes the experiment's. The first one does if it is no smaller than planned.
        accept_changes: as of :func:`run_studies`.

    Returns:
        The report, and whether it is the experiment's now.

    Raises:
        StudySpecError: ``keep`` with fewer images than the study file asks for.
        LcscError: there is no such experiment; losses would no longer compare; the objective has no held-out loss; or
            no trial is complete.
    """
    database.existing()  # raises if there is none
    contents = database.contents
    specs = [spec_of(study, contents) for study in contents.of(name) if is_ranked(study)]
    if not specs:
        others = ", ".join(contents.experiments) or "none"
        raise StudyStoreError(f"{name}: no such experiment; the database holds: {others}")
    stored = contents.experiments[name]
    planned = HeldOutSpec(**(stored.get("held_out") or {}))
    planned_images = planned.images_with(stored["report_images"])
    wanted = images or planned_images
    if keep and stored.get("held_out") is not None and wanted < planned_images:
        fewer = f"{wanted:,} images are fewer than the {planned_images:,} that the study file asks for"
        raise StudySpecError(f"--keep: {fewer}; increase --images, or leave out --keep for a preview")
    keep = keep or (stored.get(REPORT) is None and wanted >= planned_images)
    objectives = ObjectiveLoader(context_of(stored, database.url))
    with Experiment(specs, database, objectives, accept_changes=accept_changes) as experiment:
        has_samples = bool(experiment.objective.samples.per_evaluation)
        plan = ReportPlan(wanted if has_samples else 0, top or planned.top, seeds)
        return experiment.evaluate(plan, keep=keep), keep


def objective_of(
    storage: RDBStorage, study: str, functions: Mapping[str, Callable[..., Any]] | None = None
) -> Objective:
    """The objective of a stored study, in its rows. Loading it may read a model.

    Args:
        storage: the database.
        study: its name.
        functions: those that its caller handed over, where its settings name such.

    Raises:
        LcscError: it cannot be loaded: its file, its checkpoints, its data or a function is not there.
    """
    contents = read_contents(storage)
    spec = spec_of(study, contents)
    stored = contents.experiments[spec.experiment]
    context = dataclasses.replace(context_of(stored, storage.url), functions=functions or {})
    known = known_checkpoints(spec.experiment, spec.objective, context.directory, contents.experiments)
    return loader_of(spec.objective, spec.space.rows, context, known)()


def spec_of(study: str, contents: Contents) -> StudySpec:
    """The specification of a stored study, so that it can be continued without its study file.

    Raises:
        StudyStoreError: there is no such study, or another version of lcsc_opt wrote it.
    """
    stored = contents.studies.get(study)
    experiment = contents.experiments.get(split_name(study)[0])
    if stored is None or experiment is None:
        raise StudyStoreError(f"{study}: no such study; lcsc list has them")
    shared = {key: experiment.get(key) for key in OF_EXPERIMENT}
    try:
        return parse_settings(StudySpec, {**stored["specification"], **shared}, source="its specification")
    except StudySpecError as error:
        raise StudyStoreError(f"{study}: not a study of lcsc_opt, or of another version ({error})") from error


def context_of(experiment: Attributes, url: str) -> BuildContext:
    """Where the files of a stored experiment are."""
    directory = experiment["directory"]
    return BuildContext(
        directory=None if directory is None else Path(directory),
        files=files_directory(url),
    )
