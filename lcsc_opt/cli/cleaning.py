"""``lcsc delete`` and ``lcsc cache``."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.files import size_in_words
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.cli.options import Output, Storage, open_database
from lcsc_opt.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from lcsc_opt.diagnostics.cleaning import Cached

_SHOWN = 3  # studies named for each thing that they use
_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def delete(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="experiment/optimizer/seed")],
    yes: _Yes = False,
    storage: Storage = None,
) -> None:
    """Delete studies from the database, but none that is being run. Their trials, figures and images go, too."""
    from lcsc_opt.database.urls import masked
    from lcsc_opt.diagnostics.cleaning import deletable, delete_study

    opened = open_database(storage, write=True)
    chosen = [deletable(opened, name) for name in dict.fromkeys(studies)]
    for study, files in chosen:
        say(f"{study.name}: {len(study.trials())} trials" + (f" and {len(files)} files" if files else ""))
    if not _confirmed(f"Delete {len(chosen)} of the studies of {masked(opened.url)}?", yes=yes):
        return
    for study, files in chosen:
        delete_study(study, files)
    say(f"deleted: {', '.join(study.name for study, _ in chosen)}")


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is listed, but what is in use.")] = False,
    unused: Annotated[bool, typer.Option("--unused", help="Only what no study uses, or was left unfinished.")] = False,
    yes: _Yes = False,
    storage: Storage = None,
    output: Output = "table",
) -> None:
    """List what lies in the cache, or remove it. The list has the size, the last use, and the studies that use it."""
    from lcsc_opt.diagnostics.cleaning import Cached

    folder = cache_directory()
    try:
        opened = open_database(storage)
    except StudyStoreError as error:
        if unused:
            raise
        say(f"which studies use what is not known: {error}")
        opened = None
    found = [entry for entry in Cached.all_in(folder, opened) if entry.unused or not unused]
    rows = [_row(entry, folder) for entry in found]
    if output == "json":
        print_json(rows)
    elif not found:
        say(f"{folder}: nothing to list")
    else:
        cells = [
            (row["path"], row["kind"], _studies(entry), size_in_words(entry.bytes), str(row["last_used"])[:10])
            for row, entry in zip(rows, found, strict=True)
        ]
        header = ("", "kind", "studies", "size", "last used")
        print_table(header, cells, title=f"{folder}: {_total(found)}", left=3)
    entries = [entry for entry in found if not entry.in_use]
    if clear and not entries:
        say("nothing to remove")
    elif clear and _confirmed(f"Remove {len(entries)} of these, {_total(entries)}?", yes=yes):
        removed = [entry for entry in entries if entry.remove()]
        say(f"removed: {len(removed)}, {_total(removed)} freed")
        if kept := [entry.path for entry in entries if entry not in removed]:
            say(f"not removed: {len(kept)}, such as {kept[0]}; somebody makes it now, or you may not write its folder")


def _confirmed(question: str, *, yes: bool) -> bool:
    """Whether the user answers yes at the terminal, or gave ``--yes``."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise StudySpecError(f"{question} Nobody can be asked here: give --yes")
    return typer.confirm(question, err=True)


def _total(entries: Sequence[Cached]) -> str:
    return size_in_words(sum(entry.bytes for entry in entries))


def _studies(entry: Cached) -> str:
    if entry.studies is None:
        return "not known"
    more = [f"{len(entry.studies) - _SHOWN} more"] * (len(entry.studies) > _SHOWN)
    return ", ".join([*entry.studies[:_SHOWN], *more, *["in use now"] * entry.in_use]) or "none"


def _row(entry: Cached, folder: Path) -> dict[str, object]:
    return {
        "path": str(entry.path.relative_to(folder)),
        "kind": entry.kind,
        "bytes": entry.bytes,
        "last_used": datetime.datetime.fromtimestamp(entry.used_at).astimezone().isoformat(timespec="seconds"),
        "studies": None if entry.studies is None else list(entry.studies),
        "in_use": entry.in_use,
    }
