"""``lcsc delete`` and ``lcsc cache``."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.files import size_in_words
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.cli.options import Output, Storage, to_change, to_read
from lcsc_opt.cli.output import Format, confirmed, console, print_json, say, table

if TYPE_CHECKING:
    from lcsc_opt.diagnostics.cleaning.cache import Cached

_SHOWN = 3  # studies named for each thing that they use
_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def delete(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="experiment/optimizer/seed")],
    yes: _Yes = False,
    storage: Storage = None,
) -> None:
    """Delete studies from the database, but none that is being run. Their trials, figures and images go, too."""
    from lcsc_opt.database.connection import shrink
    from lcsc_opt.database.urls import masked, storage_url
    from lcsc_opt.diagnostics.cleaning.studies import deletable

    url = storage_url(storage)
    opened = to_change(url)
    chosen = [deletable(opened, name) for name in dict.fromkeys(studies)]
    for one in chosen:
        files = f" and {len(one.files)} files" if one.files else ""
        say(f"{one.study.name}: {one.trials} trials{files}, {size_in_words(one.bytes)}")
    if not confirmed(f"Delete {len(chosen)} of the studies of {masked(url)}?", yes=yes):
        return
    for one in chosen:
        one.delete()
    kept = "" if shrink(url) else "; somebody is using the database, whose file keeps that room for later studies"
    freed = size_in_words(sum(one.bytes for one in chosen))
    say(f"deleted: {', '.join(one.study.name for one in chosen)}; {freed} freed{kept}")


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is listed, but what is in use.")] = False,
    unused: Annotated[
        bool, typer.Option("--unused", help="Only what no study of the database uses, and what was left unfinished.")
    ] = False,
    yes: _Yes = False,
    storage: Storage = None,
    output: Output = Format.table,
) -> None:
    """List what lies in the cache, or remove it. The list has the size, the last use, and the studies that use it."""
    from lcsc_opt.diagnostics.cleaning.cache import contents

    folder = cache_directory()
    try:
        opened = to_read(storage)
    except StudyStoreError as error:
        if unused:
            raise
        say(f"which studies use what is not known: {error}")
        opened = None
    found = [entry for entry in contents(folder, opened) if entry.unused or not unused]
    if output is Format.json:
        print_json([_row(entry, folder) for entry in found])
    elif not found:
        say(f"{folder}: nothing to list")
    else:
        shown = table("", "kind", "size", "last used", "studies", title=f"{folder}: {_total(found)}")
        shown.columns[1].justify = shown.columns[4].justify = "left"
        for entry in found:
            row = _row(entry, folder)
            day, size = str(row["last_used"]).partition("T")[0], size_in_words(entry.bytes)
            shown.add_row(str(row["path"]), entry.kind, size, day, _studies(entry))
        console().print(shown)
    if clear:
        _clear([entry for entry in found if not entry.in_use], yes=yes)


def _clear(entries: Sequence[Cached], *, yes: bool) -> None:
    if not entries:
        say("nothing to remove")
    elif confirmed(f"Remove {len(entries)} of these, {_total(entries)}?", yes=yes):
        removed = [entry for entry in entries if entry.remove()]
        say(f"removed: {len(removed)}, {_total(removed)} freed")
        if kept := [entry.path for entry in entries if entry not in removed]:
            say(f"not removed: {len(kept)}, such as {kept[0]}; somebody makes it now, or you may not write its folder")


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
