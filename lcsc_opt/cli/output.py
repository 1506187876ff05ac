"""How commands print: tables for people and JSON for programs on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table

from lcsc_opt.base.progress import log
from lcsc_opt.base.streams import is_terminal, printable, results, write_message

if TYPE_CHECKING:
    from lcsc_opt.database.report import Report

_WIDTH_OF_FILES = 140  # characters, where the output is not a terminal; wider where a table needs it
_LONGEST_IN_ONE_LINE = 24  # characters of a cell
_GAP = 2  # characters between two columns


class _TableColumn(NamedTuple):
    """A column of a table, as texts.

    Attributes:
        name: its heading.
        cells: one for each row.
        fewest: characters it needs: words are never cut, and short cells stay in one line where there is room.
        most: characters with which nothing wraps.
    """

    name: str
    cells: Sequence[str]
    fewest: int
    most: int

    @classmethod
    def of(cls, name: str, cells: Sequence[str], *, most_in_one_line: float) -> _TableColumn:
        """Measure a column, in which cells of more characters than ``most_in_one_line`` wrap."""
        fewest = max((cell_len(word) for word in name.split()), default=0)
        most = cell_len(name)
        for cell in cells:
            length = cell_len(cell)
            most = max(most, length)
            if length > most_in_one_line:
                length = max((cell_len(word) for word in cell.split()), default=0)
            fewest = max(fewest, length)
        return cls(name, cells, fewest, most)


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    left: int = 1,
    optional: Sequence[str] = (),
) -> None:
    """Print a plain table. On a narrow terminal headings and long texts wrap between words, and no word is cut.

    Args:
        header: the headings.
        rows: a cell for each heading.
        title: printed above it.
        left: how many columns are left-aligned; the first of them never wraps.
        optional: headings of columns that a narrow terminal goes without, the last of these first. A message names
            them; the command has ``--format json``.
    """
    texts = [[printable(str(cell)) for cell in row] for row in rows]
    columns = []
    for index, name in enumerate(header):
        cells = [row[index] for row in texts]
        columns.append(_TableColumn.of(name, cells, most_in_one_line=_LONGEST_IN_ONE_LINE if index else math.inf))

    has_reader = is_terminal(results())
    width = None if has_reader else _WIDTH_OF_FILES
    console = Console(file=results(), width=width, highlight=False, emoji=False, markup=False)
    dropped = []
    for name in reversed([name for name in optional if has_reader and name in header]):
        if _width(columns) <= console.width:
            break
        dropped.append(name)
        columns = [column for column in columns if column.name != name]
    if has_reader and _width(columns) > console.width:
        first, *others = columns
        columns = [first, *(_TableColumn.of(column.name, column.cells, most_in_one_line=0) for column in others)]

    console.width = max(console.width, _width(columns))
    table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    free = console.width - _width(columns)
    for index, column in enumerate(columns):
        extra = min(free, column.most - column.fewest)
        free -= extra
        justify: JustifyMethod = "left" if index < left else "right"
        table.add_column(column.name, justify=justify, width=column.fewest + extra)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    console.print(table, crop=False)
    if dropped:
        names = ", ".join(reversed(dropped))
        say(f"{len(dropped)} more column{'s' * (len(dropped) > 1)}: {names}; in a wider terminal, or --format json")


def _width(columns: Sequence[_TableColumn]) -> int:
    """The fewest characters that a table of these columns needs, with two between neighbours."""
    return sum(column.fewest for column in columns) + _GAP * (len(columns) - 1)


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
        if name is None or part.measured(name) is None:
            continue
        title = f"\nheld out, {report.images:,} images" if report.images else "\nheld out"
        title += f", {part.sampler}" if part.sampler else ""
        header, rows = report_table(report, name, part=index)
        others = [column for column in header[2:] if not column.startswith("gain")]
        print_table(header, rows, title=title, optional=others)
