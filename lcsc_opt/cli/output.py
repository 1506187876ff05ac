"""How commands print: tables for people and JSON for programs on stdout, everything else on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pydantic_core
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table

from lcsc_opt.base.progress import log
from lcsc_opt.base.streams import is_terminal, printable, results, write_message

if TYPE_CHECKING:
    from lcsc_opt.database.report import Report

_WIDTH_OF_FILES = 140  # characters, where the output is not a terminal; wider where a table needs it
_GAP = 2  # characters between two columns


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    left: int = 1,
    optional: Sequence[str] = (),
) -> None:
    """Print a plain table. Only the last column wraps, between words, so no number is cut.

    Args:
        header: the headings.
        rows: a cell for each heading.
        title: printed above it.
        left: how many columns are left-aligned.
        optional: headings of columns that a narrow terminal goes without, the last of these first. A message names
            them; the command has ``--format json``.
    """
    columns = [[name] for name in header]
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            column.append(printable(str(cell)))
    has_reader = is_terminal(results())
    width = None if has_reader else _WIDTH_OF_FILES
    console = Console(file=results(), width=width, highlight=False, emoji=False, markup=False)
    dropped: list[str] = []
    for name in reversed([name for name in optional if has_reader and name in header]):
        if _width(columns) <= console.width:
            break
        dropped.insert(0, name)
        columns = [column for column in columns if column[0] != name]
    words_of_last = [word for text in columns[-1] for word in text.split()]
    narrowest = _width([*columns[:-1], words_of_last]) if has_reader else _width(columns)
    console.width = max(console.width, narrowest)

    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        justify: JustifyMethod = "left" if index < left else "right"
        table.add_column(column[0], justify=justify, no_wrap=index < len(columns) - 1)
    for cells in list(zip(*columns, strict=True))[1:]:
        table.add_row(*cells)
    if title is not None:
        console.print(title, soft_wrap=True)  # not as the table's own, which wraps where the table ends
    console.print(table, crop=False)
    if dropped:
        say(f"not shown: {', '.join(dropped)}; in a wider terminal, or --format json")


def _width(columns: Sequence[Sequence[str]]) -> int:
    """The characters that a table needs whose cells do not wrap."""
    widths = [max(map(cell_len, column), default=0) for column in columns]
    return sum(widths) + _GAP * (len(widths) - 1)


def print_described(title: str, described: Mapping[str, Any]) -> None:
    """Print names and values of any kind as a table of two columns, without those that are empty."""
    filled = {name: value for name, value in described.items() if value not in (None, "", {}, [], ())}
    rows = [(name.replace("_", " "), _readable(value)) for name, value in filled.items()]
    print_table((title, ""), rows, left=2)


def _readable(value: Any) -> str:
    """A value of any kind as people read it."""
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
    print_line(pydantic_core.to_json(value, indent=2, inf_nan_mode="null").decode())


def print_line(text: str) -> None:
    """A line, or several, of the result."""
    results().write(f"{printable(text)}\n")


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
    if name is None:
        return
    for index, part in enumerate(report.parts):
        measured = part.measured(name)
        if measured is None:
            continue
        title = f"\nheld out, {measured.images:,} images" if measured.images else "\nheld out"
        if len(measured.seeds) > 1:
            title += f", noise groups {', '.join(map(str, measured.seeds))}"
        if part.sampler:
            title += f", {part.sampler}"
        header, rows = report_table(report, name, part=index)
        optional = [column for column in header[2:] if not column.startswith("gain")]
        print_table(header, rows, title=title, optional=optional)
