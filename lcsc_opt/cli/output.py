"""How commands print: tables for people, JSON for programs, complaints on stderr."""

from __future__ import annotations

import enum
import errno
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

from lcsc_opt.base.errors import LcscError, StudySpecError


class Format(str, enum.Enum):
    """How a command prints its answer."""

    table = "table"
    json = "json"


class OutputError(LcscError):
    """Nobody reads the output any more. Without this error, click would exit silently."""

    exit_status = 141

    def __init__(self) -> None:
        super().__init__(f"the output cannot be written: {os.strerror(errno.EPIPE)}")


class _Output(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """Like ``rich``; a table whose words do not fit is wider than the terminal, which then breaks its lines."""
        super().print(*objects, **{"crop": False, **options})

    def on_broken_pipe(self) -> None:
        """Raise an error that is printed like any other."""
        raise OutputError


class _Table(Table):
    """On a narrow terminal headings break, but no word of a cell is cut: a number without its end is another one."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, as wide as the longest words of its cells need."""
        wide = options.update(max_width=1000)
        for column in self.columns:
            found = [Measurement.get(console, wide, cell) for cell in column.cells]
            column.min_width = max((one.maximum if column.no_wrap else one.minimum for one in found), default=0)
        needed = sum((column.min_width or 0) + 2 for column in self.columns)
        yield from super().__rich_console__(console, options.update(max_width=max(options.max_width, needed)))


def console() -> Console:
    """Standard output; wide enough for a table if it is not a terminal."""
    return _Output(width=None if sys.stdout.isatty() else 140, highlight=False, emoji=False)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    try:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise OutputError from None


class _Terminal(io.FileIO):
    """What is written to a terminal; after it was closed, nobody reads it, and writing is no error."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(content)


def outlive_terminals() -> None:
    """Let this process go on where its terminal is closed, as after ``lcsc run STUDY & disown``."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if os.isatty(descriptor) and os.name == "posix":
            raw = io.BufferedWriter(_Terminal(descriptor, "w", closefd=False))
            encoding = getattr(sys, name).encoding
            setattr(sys, name, io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True))


def complain(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"lcsc: {message}\n")


def say(message: str) -> None:
    """One line of progress on standard error."""
    sys.stderr.write(f"{message}\n")


def number(value: float | None, spread: float | None = None) -> str:
    """A loss to four digits, with its spread over seeds."""
    if value is None:
        return "-"
    return f"{value:.4g}" if spread is None else f"{value:.4g} ± {spread:.2g}"


def duration(seconds: float) -> str:
    """A time in a unit that suits it."""
    for unit, scale in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.0f} s"


def confirmed(question: str, *, yes: bool) -> bool:
    """Whether the user answers yes at the terminal, or gave ``--yes``.

    Raises:
        StudySpecError: there is no terminal to ask the user.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise StudySpecError(f"{question} Nobody can be asked here: give --yes")
    return typer.confirm(question, err=True)


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; columns after the first are right-aligned."""
    made = _Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    return made


def print_texts(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str) -> None:
    """Print a table whose cells are texts already."""
    shown = table(*header, title=title)
    for row in rows:
        shown.add_row(*row)
    console().print(shown)


def print_report(stored: Mapping[str, Any] | None, title: str = "held out") -> None:
    """Print the rows of a held-out report as a table; nothing if there is none."""
    from lcsc_opt.database.report import HeldOut
    from lcsc_opt.views.ranking import report_table

    if (report := HeldOut.parse(stored)) is not None and report.rows:
        print_texts(*report_table(report.rows), title=title)
