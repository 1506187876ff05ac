"""How commands print: tables for people and JSON for programs on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from lcsc_opt.base.progress import log
from lcsc_opt.base.streams import is_terminal, printable, results, write_message

if TYPE_CHECKING:
    from lcsc_opt.database.report import Report

_WIDTH_OF_FILES = 140  # characters, where the output is not a terminal; wider where a table needs it
_LONGEST_IN_ONE_LINE = 24  # characters of a cell
_GAP = 2  # characters between two columns


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    left: int = 1,
    optional: Sequence[str] = (),
) -> None:
    """Print a plain table. On a narrow terminal headings and long texts wrap between words, and no word is cut.

    Rich itself cuts words, and so numbers, where others could still wrap: it is told the width of each column.

    Args:
        header: the headings.
        rows: a cell for each heading.
        title: printed above it.
        left: how many columns are left-aligned; the first of them never wraps.
        optional: headings of columns that a narrow terminal goes without, the last of these first. A message names
            them; the command has ``--format json``.
    """
    texts = [[printable(str(cell)) for cell in row] for row in rows]
    columns = [[name, *(row[index] for row in texts)] for index, name in enumerate(header)]
    has_reader = is_terminal(results())
    width = None if has_reader else _WIDTH_OF_FILES
    console = Console(file=results(), width=width, highlight=False, emoji=False, markup=False)
    dropped: list[str] = []
    for name in reversed([name for name in optional if has_reader and name in header]):
        if _total(_least_widths(columns)) <= console.width:
            break
        dropped.insert(0, name)
        columns = [column for column in columns if column[0] != name]
    widths = _least_widths(columns)
    if has_reader and _total(widths) > console.width:
        widths = _least_widths(columns, in_one_line=0)
    console.width = max(console.width, _total(widths))

    table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    free = console.width - _total(widths)
    for index, (name, *cells) in enumerate(columns):
        widest = max(cell_len(text) for text in (name, *cells))
        extra = min(free, widest - widths[index])
        free -= extra
        table.add_column(name, justify="left" if index < left else "right", width=widths[index] + extra)
    for row in list(zip(*columns, strict=True))[1:]:
        table.add_row(*row)
    console.print(table, crop=False)
    if dropped:
        plural = "s" if len(dropped) > 1 else ""
        say(f"{len(dropped)} more column{plural}: {', '.join(dropped)}; in a wider terminal, or --format json")


def _least_widths(columns: Sequence[Sequence[str]], *, in_one_line: int = _LONGEST_IN_ONE_LINE) -> list[int]:
    """The characters that columns need, each a heading and its cells.

    No word is cut. Cells of at most ``in_one_line`` characters, and all of the first column, stay in one line.
    """
    widths = []
    for index, (name, *cells) in enumerate(columns):
        unbroken = name.split()
        for cell in cells:
            if index == 0 or cell_len(cell) <= in_one_line:
                unbroken.append(cell)
            else:
                unbroken += cell.split()
        widths.append(max((cell_len(text) for text in unbroken), default=0))
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def print_described(title: str, described: Mapping[str, Any]) -> None:
    """Print names and values of any kind as a table of two columns, without those that are empty."""
    told = {name: value for name, value in described.items() if value not in (None, "", {}, [], ())}
    rows = [(name.replace("_", " "), _readable(value)) for name, value in told.items()]
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
    print_line(json.dumps(_finite(value), indent=2, allow_nan=False))


def print_line(text: str) -> None:
    """A line, or several, of the result."""
    results().write(f"{printable(text)}\n")


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
        write_message(f"{message}\n")


def print_report(report: Report | None, study: str | None = None) -> None:
    """Print the metrics of a study's best model, else of the answer, a table for each sampler."""
    from lcsc_opt.views.tables import report_table

    if report is None:
        return
    name = report.answer if study is None else report.found.get(study)
    for index, part in enumerate(report.parts):
        measured = None if name is None else part.measured(name)
        if name is None or measured is None:
            continue
        title = f"\nheld out, {measured.images:,} images" if measured.images else "\nheld out"
        if len(measured.seeds) > 1:
            title += f", noise groups {', '.join(map(str, measured.seeds))}"
        title += f", {part.sampler}" if part.sampler else ""
        header, rows = report_table(report, name, part=index)
        others = [column for column in header[2:] if not column.startswith("gain")]
        print_table(header, rows, title=title, optional=others)
