"""How commands print: tables for people and JSON for programs on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

from lcsc_opt.base.progress import log

if TYPE_CHECKING:
    from lcsc_opt.database.report import HeldOutReport

_WIDTH_OF_FILES = 140  # characters, where the output is not a terminal


class _Table(Table):
    """On a narrow terminal headings wrap, but words in cells are never cut: a cut number would be a wrong number."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, as wide as the longest words of its cells need."""
        unlimited = options.update(max_width=1000)
        needed = 0
        for column in self.columns:
            measurements = [Measurement.get(console, unlimited, cell) for cell in column.cells]
            if column.no_wrap:
                widths = [measurement.maximum for measurement in measurements]
            else:
                widths = [measurement.minimum for measurement in measurements]
            column.min_width = max(widths, default=0)
            needed += column.min_width + 2
        yield from super().__rich_console__(console, options.update(max_width=max(options.max_width, needed)))


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None, left: int = 1
) -> None:
    """Print a plain table. The first ``left`` columns are left-aligned, and words of the first one stay in a line."""
    table = _Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    for i, column in enumerate(header):
        table.add_column(
            column,
            justify="left" if i < left else "right",
            no_wrap=i == 0,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(str, row))
    width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
    Console(width=width, highlight=False, emoji=False, markup=False).print(table, crop=False)


def print_described(title: str, described: Mapping[str, Any]) -> None:
    """Print names and values of any kind as a table of two columns."""
    rows = [(name.replace("_", " "), _readable(value)) for name, value in described.items()]
    print_table((title, ""), rows, left=2)


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_readable(item)}" for key, item in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return "; ".join(_readable(item) for item in value) or "none"
    if value is None or value == "":
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def print_json(value: Any) -> None:
    """One JSON document on standard output. JSON has no NaN and no infinity: they become ``null``."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The value with ``None`` for each number in it that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def say(message: str) -> None:
    """One line of progress on standard error, unless messages are silenced."""
    if log.isEnabledFor(logging.INFO):
        sys.stderr.write(f"{message}\n")


def print_report(report: HeldOutReport | None, title: str = "held out") -> None:
    """Print the rows of a held-out report as a table; nothing if there is none."""
    from lcsc_opt.views.tables import report_table

    if report is not None and report.rows:
        print_table(*report_table(report.rows), title=title)
