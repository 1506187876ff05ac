"""``lcsc delete``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.files import shown_size
from lcsc_opt.cli.options import Storage, open_database
from lcsc_opt.cli.output import say


def delete(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="experiment/optimizer/seed")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    storage: Storage = None,
) -> None:
    """Delete studies with their trials and images.

    A study that is being run is not deleted.
    """
    from lcsc_opt.database.deleting import free_bytes
    from lcsc_opt.database.lock import locked
    from lcsc_opt.database.store import StoredStudy
    from lcsc_opt.database.urls import masked
    from lcsc_opt.views.artifacts import files_of

    database = open_database(storage, database_of=studies[0], write=True)
    chosen = [StoredStudy.open(database, name) for name in dict.fromkeys(studies)]
    running = locked(database, studies)
    if running:
        raise StudyStoreError(f"still running: {', '.join(sorted(running))}; wait for them, or stop them")
    for study in chosen:
        say(f"{study.name}: {study.summary.trials} trials and {len(files_of(study))} files")
    if not _confirmed(f"Delete {len(chosen)} of the studies of {masked(database.url)}?", yes=yes):
        return
    for study in chosen:
        with study.hold():
            files = files_of(study)
            study.delete()
            for file in files:
                file.unlink(missing_ok=True)
        say(f"deleted: {study.name}")
    free = free_bytes(database)
    if free:
        size = shown_size(free)
        say(f"the file keeps its size; {size} of it can be reused (SQLite's VACUUM frees them)")


def _confirmed(question: str, *, yes: bool) -> bool:
    """Whether the user answers yes at the terminal, or gave ``--yes``."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise StudySpecError(f"{question} There is no terminal to ask on; pass --yes")
    return typer.confirm(question, err=True)
