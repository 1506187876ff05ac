"""``lcsc delete``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
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

    Deleting the last study of an experiment also deletes its measurements. A study that is being run is not deleted. A
    report that has a deleted study is deleted, too; lcsc run makes it again.
    """
    from lcsc_opt.database.lock import locked
    from lcsc_opt.database.names import split_name
    from lcsc_opt.database.store import StoredStudy, read_contents
    from lcsc_opt.database.urls import masked

    database = open_database(storage, database_of=names[0], write=True)
    contents = read_contents(database)
    studies: dict[str, None] = {}  # an ordered set
    for name in names:
        is_experiment = name in contents.experiments
        studies |= dict.fromkeys(contents.of(name) if is_experiment else [name])
    chosen = [StoredStudy.open(database, name) for name in studies]
    running = locked(database, list(studies))
    if running:
        raise StudyStoreError(f"still running: {', '.join(sorted(running))}; wait for them, or stop them")
    for study in chosen:
        say(f"{study.name}: {study.summary.trials} trials")
    if not yes:
        question = f"Delete {len(chosen)} studies from {masked(database.url)}?"
        if not sys.stdin.isatty():
            raise StudySpecError(f"{question} This is not a terminal, so nobody can be asked; pass --yes")
        if not typer.confirm(question, err=True):
            return
    of_studies = {split_name(name)[0] for name in studies}
    experiments = of_studies.union(names) & contents.experiments.keys()  # a named one may have no studies left
    for experiment in experiments:  # first: an interruption must not leave a report of deleted studies
        _delete_report(database, experiment, set(studies))
    for study in chosen:
        with study.hold():
            study.delete()
        say(f"deleted: {study.name}")
    for experiment in experiments:
        _delete_rest(database, experiment)


def _delete_report(database: RDBStorage, name: str, studies: set[str]) -> None:
    """Delete the report of an experiment that has one of these studies.

    It goes before they do: an interruption leaves no report about a study that is gone.
    """
    from lcsc_opt.database.experiment import CHOSEN, StoredExperiment

    experiment = StoredExperiment.open(database, name)
    chosen = experiment.attributes.get(CHOSEN)
    if chosen is not None and not studies.isdisjoint(chosen["evaluations"]):
        experiment.set_attribute(CHOSEN, None)
        say(f"{name}: its report was deleted, too; lcsc run makes a new one")


def _delete_rest(database: RDBStorage, name: str) -> None:
    """Delete what belongs to an experiment without studies."""
    from lcsc_opt.database.experiment import StoredExperiment
    from lcsc_opt.database.store import read_contents
    from lcsc_opt.views.artifacts import files_of

    if read_contents(database).of(name):
        return
    record = StoredExperiment.open(database, name).record
    files = files_of(record)
    record.delete()
    for file in files:
        file.unlink(missing_ok=True)
    say(f"deleted: {name}, with what was measured, and {len(files)} images")
