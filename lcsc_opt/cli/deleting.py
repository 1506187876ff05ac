"""``lcsc delete``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.files import shown_size
from lcsc_opt.cli.options import Storage, open_database
from lcsc_opt.cli.output import say

if TYPE_CHECKING:
    from optuna.storages import RDBStorage


def delete(
    names: Annotated[list[str], typer.Argument(metavar="STUDY|EXPERIMENT...", help="experiment/optimizer/seed")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    storage: Storage = None,
) -> None:
    """Delete studies with their trials, or whole experiments.

    With its last study goes all that was measured. A study that is being run is not deleted. A report that has a
    deleted study goes, too: lcsc run makes it again.
    """
    from lcsc_opt.database.deleting import free_bytes
    from lcsc_opt.database.lock import locked
    from lcsc_opt.database.names import split_name
    from lcsc_opt.database.store import StoredStudy, read_contents
    from lcsc_opt.database.urls import masked

    database = open_database(storage, database_of=names[0], write=True)
    contents = read_contents(database)
    studies: dict[str, None] = {}
    for name in names:
        is_experiment = name in contents.experiments
        studies |= dict.fromkeys(contents.of(name) if is_experiment else [name])
    chosen = [StoredStudy.open(database, name) for name in studies]
    running = locked(database, list(studies))
    if running:
        raise StudyStoreError(f"still running: {', '.join(sorted(running))}; wait for them, or stop them")
    for study in chosen:
        say(f"{study.name}: {study.summary.trials} trials")
    if not _confirmed(f"Delete {len(chosen)} of the studies of {masked(database.url)}?", yes=yes):
        return
    for study in chosen:
        with study.hold():
            study.delete()
        say(f"deleted: {study.name}")
    of_studies = {split_name(name)[0] for name in studies}
    for experiment in of_studies.union(names) & contents.experiments.keys():
        _delete_rest(database, experiment)
    free = free_bytes(database)
    if free:
        size = shown_size(free)
        say(f"the file keeps its size; {size} of it can be reused (SQLite's VACUUM frees them)")


def _delete_rest(database: RDBStorage, name: str) -> None:
    """Delete what belongs to an experiment without studies; of others the report, if it has a study that is gone."""
    from lcsc_opt.database.experiment import StoredExperiment
    from lcsc_opt.database.report import REPORT
    from lcsc_opt.database.store import read_contents
    from lcsc_opt.views.artifacts import files_of

    experiment = StoredExperiment.open(database, name)
    left = read_contents(database).of(name)
    if not left:
        files = files_of(experiment.record)
        experiment.record.delete()
        for file in files:
            file.unlink(missing_ok=True)
        say(f"deleted: {name}, with what was measured, and {len(files)} images")
    elif experiment.report is not None and not experiment.report.evaluations.keys() <= left.keys():
        experiment.set_attribute(REPORT, None)
        say(f"{name}: its report is deleted, too; lcsc run makes it again")


def _confirmed(question: str, *, yes: bool) -> bool:
    """Whether the user answers yes at the terminal, or gave ``--yes``."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise StudySpecError(f"{question} There is no terminal to ask on; pass --yes")
    return typer.confirm(question, err=True)
