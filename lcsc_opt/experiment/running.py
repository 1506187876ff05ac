"""Runs the experiment of a study file. A dry run is a run that stops before the first trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from lcsc_opt.base.errors import LcscError, SearchFailedError, StudySpecError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.study_file import StudyFile
from lcsc_opt.base.study_spec import HeldOutSpec, StudySpec
from lcsc_opt.database.experiment import CHOSEN
from lcsc_opt.database.lock import locked
from lcsc_opt.database.names import has_study_form, split_name
from lcsc_opt.database.opened import Database
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.report import Report, ReportPlan
from lcsc_opt.database.states import Attributes, ended_search
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.experiment.defaults import completed
from lcsc_opt.experiment.experiment import Experiment
from lcsc_opt.experiment.outcome import COMMAND, outcome_of_finished, what_goes_on
from lcsc_opt.experiment.stored import spec_of
from lcsc_opt.objective.checkpoints_alone import stored_context
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.of_study import ObjectiveLoader
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.study.loop import TrialCallback
from lcsc_opt.views.answer import answer_line


def experiment_of(
    study_file: StudyFile, database: Database, objectives: ObjectiveLoader, *, accept_changes: bool = False
) -> Experiment:
    """The experiment of a study file; :mod:`lcsc_opt.experiment.defaults` chooses what the file leaves open.

    Args:
        study_file: the study file.
        database: of the run.
        objectives: loads the objective, if something is to be chosen, and keeps it for the run.
        accept_changes: as of :class:`Experiment`.

    Raises:
        StudySpecError: an unknown optimizer or option.
        LcscError: the database cannot be opened, or the objective must be known and cannot be loaded.
    """

    def load_objective() -> Objective:
        """With the checkpoints that the experiment began with, and one row of coefficients."""
        stored = database.contents.experiments.get(study_file.name)
        return objectives.load(study_file.objective, None, stored)

    chosen = searches_of(completed(study_file, lambda: database.contents.studies, load_objective))
    stored = database.contents.of(study_file.name)
    specs = [_or_ended_grid(spec, stored) for spec in chosen]
    return Experiment(specs, database, objectives, accept_changes=accept_changes)


def _or_ended_grid(spec: StudySpec, stored: Mapping[str, Attributes]) -> StudySpec:
    """The search; in place of a new grid, one that ended with another seed, since its candidates are the same."""
    if spec.is_grid and spec.name not in stored:
        ended = ended_search(stored, spec.optimizer.name)
        if ended is not None:
            return spec.model_copy(update={"seed": split_name(ended)[2]})
    return spec


def searches_of(study_files: Sequence[StudyFile]) -> list[StudySpec]:
    """The studies that complete study files describe.

    Args:
        study_files: those that :func:`lcsc_opt.experiment.defaults.completed` makes of one.

    Raises:
        StudySpecError: an unknown optimizer or option; or two choices of a device.
    """
    specs = []
    for study_file in study_files:
        for optimizer in study_file.optimizers:
            configure(optimizer)  # raises if an option is wrong
        specs += study_file.studies()
    return specs


def run_studies(
    experiment: Experiment,
    *,
    on_end: Callable[[str], None] = notice,
    callbacks: Sequence[TrialCallback] = (),
    how_to_continue: str = COMMAND,
) -> None:
    """Run the searches of an experiment, and report it. A search that fails does not stop the others.

    Where another process runs one of them, the report is left to that process. A missing database is created when the
    first search has been rehearsed.

    Args:
        experiment: its workers are stopped at the end.
        on_end: called with one line when a search has ended or cannot run, with the answer of the experiment, and with
            what would go on.
        callbacks: as of :meth:`Experiment.search`.
        how_to_continue: what the user types or calls to go on with a search, with places for ``study`` and ``budget``.

    Raises:
        LcscError: the database cannot be opened, the objective cannot be loaded and rehearsed, the only search failed,
            or all searches ended and cannot be reported.
        SearchFailedError: some of several searches failed; the message says which, and why.
        Exception: what a callback raises, which ends the run.
    """
    specs = experiment.specs
    database = experiment.database
    failed: dict[str, str] = {}  # name of a study → why
    unreported = ""  # why there is no report, in addition
    with experiment:
        for name in specs:
            try:
                if experiment.is_finished(name):
                    study = StoredStudy.open(database.existing(), name)
                    outcome = outcome_of_finished(study, reads_by_itself=experiment.reads_by_itself)
                else:
                    outcome = experiment.search(name, callbacks)
            except LcscError as error:
                if len(specs) == 1 or experiment.refused is not None:
                    raise
                outcome = str(error).removeprefix(f"{name}: ")
                failed[name] = outcome
            on_end(f"{name}: {outcome}")
        try:
            running = locked(database.storage, failed) if database.storage is not None else set()
            if running:
                unreported = f". The report is left to the process that runs {', '.join(sorted(running))}"
            elif len(failed) < len(specs):
                report = experiment.report()
                if report is not None:
                    on_end(f"{experiment.name}: {answer_line(report)}")
        except LcscError as error:
            if not failed:
                raise
            unreported = f"; no new report: {error}"
    if failed:
        count = f"{len(failed)} of {len(specs)}"
        raise SearchFailedError(f"{count} studies did not succeed: {_reasons_in_words(failed)}{unreported}")
    goes_on = what_goes_on(database.existing(), [*specs], how_to_continue)
    if goes_on:
        on_end(f"{experiment.name}: {goes_on}")


def _reasons_in_words(failed: Mapping[str, str]) -> str:
    """``NAME, NAME: why; NAME: why``: the names of studies by the reasons for which they failed, each given once."""
    names_of: dict[str, list[str]] = {}
    for name, reason in failed.items():
        names_of.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in names_of.items())


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
        keep: whether the report becomes the experiment's. The first one does, too, if it is no smaller than planned.
        accept_changes: as of :class:`Experiment`.

    Returns:
        The report, and whether it is the experiment's now.

    Raises:
        StudySpecError: ``keep`` with fewer images than the study file asks for.
        LcscError: there is no such experiment; losses would no longer compare; the objective has no held-out loss; or
            no trial is complete.
    """
    if has_study_form(name):
        raise StudySpecError(f"{name}: reports are of experiments: lcsc evaluate {split_name(name)[0]}")
    HistoryReader(database.existing()).read(name)  # raises if there is none
    contents = database.contents
    specs = [spec_of(study, contents) for study in contents.of(name)]
    stored = contents.experiment(name)
    asked = HeldOutSpec(**(stored.get("held_out") or {}))
    planned = ReportPlan.of(asked, None, own_images=stored["report_images"], samples=stored["samples"])
    plan = ReportPlan(planned.images, top or planned.top, seeds)
    if images is not None and stored["samples"]:
        plan = dataclasses.replace(plan, images=images)
    if keep and stored.get("held_out") is not None and plan.images < planned.images:
        fewer = f"{plan.images:,} images are fewer than the {planned.images:,} that the study file asks for"
        raise StudySpecError(f"--keep: {fewer}; increase --images, or leave out --keep for a preview")
    keep = keep or (stored.get(CHOSEN) is None and plan.images >= planned.images)
    objectives = ObjectiveLoader(stored_context(stored, database.files))
    with Experiment(specs, database, objectives, accept_changes=accept_changes) as experiment:
        return experiment.evaluate(plan, keep=keep), keep
