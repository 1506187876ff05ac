"""How commands print: tables for people and JSON for programs on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

from lcsc_opt.base.progress import log


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


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None, left: int = 1
) -> None:
    """Print a plain table. The first ``left`` columns are left-aligned, and words of the first one stay in a line."""
    shown = _Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    for i, column in enumerate(header):
        shown.add_column(column, justify="left" if i < left else "right", no_wrap=i == 0, overflow="fold")
    for row in rows:
        shown.add_row(*map(str, row))
    width = None if sys.stdout.isatty() else 140
    Console(width=width, highlight=False, emoji=False, markup=False).print(shown, crop=False)


def print_described(title: str, described: Mapping[str, Any]) -> None:
    """Print names and values of any kind as a table of two columns."""
    rows = [(name.replace("_", " "), _readable(value)) for name, value in described.items()]
    print_table((title, ""), rows, left=2)


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_readable(part)}" for key, part in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return "; ".join(_readable(part) for part in value) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else "-" if value in (None, "") else str(value)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def say(message: str) -> None:
    """One line of progress on standard error, unless messages are silenced."""
    if log.isEnabledFor(logging.INFO):
        sys.stderr.write(f"{message}\n")


def print_report(stored: Mapping[str, Any] | None, title: str = "held out") -> None:
    """Print the rows of a held-out report as a table; nothing if there is none."""
    from lcsc_opt.database.report import HeldOut
    from lcsc_opt.views.ranking import report_table

    if (report := HeldOut.parse(stored)) is not None and report.rows:
        print_table(*report_table(report.rows), title=title)
