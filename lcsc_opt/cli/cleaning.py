"""``lcsc delete`` and ``lcsc cache``."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.files import shown_size
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.cli.options import Output, Storage, chosen_storage, open_database
from lcsc_opt.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from lcsc_opt.maintenance.cleaning import CacheEntry

_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def delete(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="experiment/optimizer/seed")],
    yes: _Yes = False,
    storage: Storage = None,
) -> None:
    """Delete studies with their trials and images from the database, unless one is being run."""
    from lcsc_opt.database.deleting import free_bytes
    from lcsc_opt.database.lock import locked
    from lcsc_opt.database.store import StoredStudy, trial_count
    from lcsc_opt.database.urls import masked
    from lcsc_opt.views.artifacts import files_of  # not from maintenance, which imports torch

    database = open_database(storage, wanted=studies[0], write=True)
    chosen = [StoredStudy.open(database, name) for name in dict.fromkeys(studies)]
    running = locked(database, studies)
    if running:
        raise StudyStoreError(f"{', '.join(sorted(running))}: is being run; wait for it, or end it")
    for study in chosen:
        say(f"{study.name}: {trial_count(database, study.key)} trials and {len(files_of(study))} files")
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
        say(f"the file keeps its size: {size} of it are free for new trials; SQLite's VACUUM would return them")


def cache(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these entries.")] = None,
    clear: Annotated[
        bool,
        typer.Option("--clear", help="Remove them; trajectories and trained models only if they are named."),
    ] = False,
    yes: _Yes = False,
    storage: Storage = None,
    output: Output = "table",
) -> None:
    """List the cache, or clear it. For each entry the list has its size, its last use and the studies that use it."""
    from lcsc_opt.database.store import our_studies
    from lcsc_opt.database.urls import is_there
    from lcsc_opt.maintenance.cleaning import cache_entries

    studies: dict[str, dict[str, Any]] = {}
    # before entries are removed, a mistyped --storage is an error: its studies would protect nothing
    if is_there(chosen_storage(storage)) or (clear and storage is not None):
        studies = our_studies(open_database(storage))
    entries = cache_entries(cache_directory(), studies)
    if names:
        entries = _named(entries, names)
    if output == "json":
        print_json([_row(entry) for entry in entries])
    else:
        _print_entries(entries)
    if clear:
        _clear(entries, by_name=bool(names), yes=yes)


def _named(entries: Sequence[CacheEntry], names: Sequence[str]) -> list[CacheEntry]:
    """The entries of these names."""
    by_name = {entry.name: entry for entry in entries}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise StudySpecError(f"the cache has no entry {', '.join(missing)}; lcsc cache lists the entries")
    return [by_name[name] for name in dict.fromkeys(names)]


def _row(entry: CacheEntry) -> dict[str, Any]:
    last_used = datetime.datetime.fromtimestamp(entry.used_at).astimezone()
    return {
        "path": entry.name,
        "kind": entry.kind,
        "studies": list(entry.studies),
        "bytes": entry.bytes,
        "last_used": last_used.isoformat(timespec="seconds"),
    }


def _print_entries(entries: Sequence[CacheEntry]) -> None:
    lines = []
    for entry in entries:
        last_day = _row(entry)["last_used"][:10]
        lines.append((entry.name, entry.kind, ", ".join(entry.studies), _size([entry]), last_day))
    header = ("", "kind", "studies", "size", "last used")
    print_table(header, lines, title=f"{cache_directory()}: {_size(entries)}", left=3)


def _clear(entries: Sequence[CacheEntry], *, by_name: bool, yes: bool) -> None:
    """Remove the entries that were named, or all that can be computed or downloaded again."""
    removable = [entry for entry in entries if by_name or entry.is_replaceable]
    for entry in removable:
        if entry.studies:
            raise StudyStoreError(f"{entry.name}: used by {', '.join(entry.studies)}; lcsc delete deletes studies")
    question = f"Remove {len(removable)} of these, {_size(removable)}?"
    if not all(entry.is_replaceable for entry in removable):
        question += " Studies of other databases may use them."
    if removable and _confirmed(question, yes=yes):
        refused = [entry for entry in removable if not entry.remove()]
        say(f"removed: {len(removable) - len(refused)}")
        if refused:
            say(
                f"not removed: {len(refused)}, such as {refused[0].path}; "
                "a process may be writing it, or you have no permission"
            )
    retained_count = len(entries) - len(removable)
    if retained_count:
        say(f"kept: {retained_count} trajectories and files of trained models; name those that no study needs")


def _confirmed(question: str, *, yes: bool) -> bool:
    """Whether the user answers yes at the terminal, or gave ``--yes``."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise StudySpecError(f"{question} There is no terminal to ask at: give --yes")
    return typer.confirm(question, err=True)


def _size(entries: Sequence[CacheEntry]) -> str:
    return shown_size(sum(entry.bytes for entry in entries))
