"""``lcsc delete`` and ``lcsc cache``."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from tqdm import tqdm

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.cli.options import Output, Storage, open_database
from lcsc_opt.cli.output import print_json, print_table, say

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

    opened = open_database(storage, write=True)
    chosen = [StoredStudy.open(opened, name) for name in dict.fromkeys(studies)]
    if running := locked(opened, studies):
        raise StudyStoreError(f"{', '.join(sorted(running))}: is being run; wait for it, or end it")
    for study in chosen:
        say(f"{study.name}: {len(study.trials())} trials and {len(files_of(study))} files")
    if not _confirmed(f"Delete {len(chosen)} of the studies of {masked(opened.url)}?", yes=yes):
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
    known = our_studies(open_database(storage)) if clear or is_there(storage_url(storage)) else {}
    found = Cached.all_in(folder, known)
    rows = [
        {
            "path": str(entry.path.relative_to(folder)),
            "kind": entry.kind,
            "studies": list(entry.studies),
            "bytes": entry.bytes,
            "last_used": datetime.datetime.fromtimestamp(entry.used_at).astimezone().isoformat(timespec="seconds"),
        }
        for entry in found
    ]
    if output == "json":
        print_json(rows)
    else:
        cells = [
            (row["path"], row["kind"], ", ".join(entry.studies), _size([entry]), str(row["last_used"])[:10])
            for row, entry in zip(rows, found, strict=True)
        ]
        print_table(("", "kind", "studies", "size", "last used"), cells, title=f"{folder}: {_size(found)}", left=3)
    entries = [entry for entry in found if not entry.studies]
    if clear and entries and _confirmed(f"Remove {len(entries)} of these, {_size(entries)}?", yes=yes):
        kept = [entry.path for entry in entries if not entry.remove()]
        say(f"removed: {len(entries) - len(kept)}")
        if kept:
            say(f"not removed: {len(kept)}, such as {kept[0]}; somebody makes it now, or you may not write its folder")


def _confirmed(question: str, *, yes: bool) -> bool:
    """Whether the user answers yes at the terminal, or gave ``--yes``."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise StudySpecError(f"{question} Nobody can be asked here: give --yes")
    return typer.confirm(question, err=True)


def _size(entries: Sequence[Any]) -> str:
    return str(tqdm.format_sizeof(sum(entry.bytes for entry in entries), "B"))
