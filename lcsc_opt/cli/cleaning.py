"""``lcsc delete`` and ``lcsc cache``."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.cli.options import Output, Storage, open_database
from lcsc_opt.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from lcsc_opt.maintenance.cleaning import Cached

_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def delete(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="experiment/optimizer/seed")],
    yes: _Yes = False,
    storage: Storage = None,
) -> None:
    """Delete studies from the database, but none that is being run. Their trials and images go, too."""
    from lcsc_opt.database.lock import locked
    from lcsc_opt.database.store import StoredStudy
    from lcsc_opt.database.urls import masked
    from lcsc_opt.maintenance.cleaning import files_of

    database = open_database(storage, write=True)
    chosen = [StoredStudy.open(database, name) for name in dict.fromkeys(studies)]
    running = locked(database, studies)
    if running:
        raise StudyStoreError(f"{', '.join(sorted(running))}: is being run; wait for it, or end it")
    for study in chosen:
        say(f"{study.name}: {len(study.trials())} trials and {len(files_of(study))} files")
    if not _confirmed(f"Delete {len(chosen)} of the studies of {masked(database.url)}?", yes=yes):
        return
    for study in chosen:
        with study.hold():
            files = files_of(study)
            study.delete()
            for file in files:
                file.unlink(missing_ok=True)
        say(f"deleted: {study.name}")


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all but trajectories that a study uses.")] = False,
    yes: _Yes = False,
    storage: Storage = None,
    output: Output = "table",
) -> None:
    """List what lies in the cache, or remove it. The list has the size, the last use, and the studies that use it."""
    from lcsc_opt.database.store import our_studies
    from lcsc_opt.database.urls import is_there, storage_url
    from lcsc_opt.maintenance.cleaning import Cached

    folder = cache_directory()
    studies: Mapping[str, Mapping[str, Any]] = {}
    if clear or is_there(storage_url(storage)):
        studies = our_studies(open_database(storage))
    entries = Cached.all_in(folder, studies)
    rows = [_row(entry, folder) for entry in entries]
    if output == "json":
        print_json(rows)
    else:
        cells = [
            (
                row["path"],
                row["kind"],
                ", ".join(row["studies"]),
                _size([entry]),
                row["last_used"][:10],
            )
            for row, entry in zip(rows, entries, strict=True)
        ]
        header = ("", "kind", "studies", "size", "last used")
        print_table(header, cells, title=f"{folder}: {_size(entries)}", left=3)
    if clear:
        _clear([entry for entry in entries if not entry.studies], yes=yes)


def _row(entry: Cached, folder: Path) -> dict[str, Any]:
    used_at = datetime.datetime.fromtimestamp(entry.used_at).astimezone()
    return {
        "path": str(entry.path.relative_to(folder)),
        "kind": entry.kind,
        "studies": list(entry.studies),
        "bytes": entry.bytes,
        "last_used": used_at.isoformat(timespec="seconds"),
    }


def _clear(unused: Sequence[Cached], *, yes: bool) -> None:
    """Remove these entries, once the user has agreed, and say which could not be removed."""
    if not unused or not _confirmed(f"Remove {len(unused)} of these, {_size(unused)}?", yes=yes):
        return
    remaining = [entry.path for entry in unused if not entry.remove()]
    say(f"removed: {len(unused) - len(remaining)}")
    if remaining:
        say(
            f"not removed: {len(remaining)}, such as {remaining[0]}; another process writes it now, or you may not "
            "write its folder"
        )


def _confirmed(question: str, *, yes: bool) -> bool:
    """Whether the user answers yes at the terminal, or gave ``--yes``."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise StudySpecError(f"{question} Nobody can be asked here: give --yes")
    return typer.confirm(question, err=True)


def _size(entries: Sequence[Cached]) -> str:
    return str(tqdm.format_sizeof(sum(entry.bytes for entry in entries), "B"))
