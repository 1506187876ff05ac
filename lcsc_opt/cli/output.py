"""How commands print: tables for people and JSON for programs on stdout, everything else on stderr."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic_core
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table as RichTable

from lcsc_opt.base.progress import log
from lcsc_opt.base.streams import is_terminal, printable, results, write_message
from lcsc_opt.views import Table

_WIDTH_OF_FILES = 140  # characters, where the output is not a terminal; wider where a table needs it
_GAP = 2  # characters between two columns


def print_table(printed: Table) -> None:
    """Print a plain table. Only the last column wraps, between words, so no number is cut.

    A message names the columns that a narrow terminal goes without; their command has ``--format json``.
    """
    columns = [[name] for name in printed.header]
    for row in printed.rows:
        for column, cell in zip(columns, row, strict=True):
            column.append(printable(str(cell)))
    has_reader = is_terminal(results())
    width = None if has_reader else _WIDTH_OF_FILES
    console = Console(file=results(), width=width, highlight=False, emoji=False, markup=False)
    dropped: list[str] = []
    for name in reversed([name for name in printed.optional if has_reader and name in printed.header]):
        if _width(columns) <= console.width:
            break
        dropped.insert(0, name)
        columns = [column for column in columns if column[0] != name]
    words_of_last = [word for text in columns[-1] for word in text.split()]
    narrowest = _width([*columns[:-1], words_of_last]) if has_reader else _width(columns)
    console.width = max(console.width, narrowest)

    table = RichTable(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        justify: JustifyMethod = "left" if index < printed.text else "right"
        table.add_column(column[0], justify=justify, no_wrap=index < len(columns) - 1)
    for cells in list(zip(*columns, strict=True))[1:]:
        table.add_row(*cells)
    if printed.title:
        console.print(printed.title, soft_wrap=True)  # not as the table's own, which wraps where the table ends
    if has_reader:
        console.print(table, crop=False)
    else:  # cells are padded to their column's width, which in a file would be lines of blanks
        with console.capture() as captured:
            console.print(table, crop=False)
        results().write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
    if dropped:
        say(f"not shown: {', '.join(dropped)}; in a wider terminal, or --format json")


def print_tables(*printed: Table) -> None:
    """Print tables with an empty line between them."""
    first, *others = printed
    print_table(first)
    for table in others:
        print_line("")
        print_table(table)


def _width(columns: Sequence[Sequence[str]]) -> int:
    """The characters that a table needs whose cells do not wrap."""
    widths = [max(map(cell_len, column), default=0) for column in columns]
    return sum(widths) + _GAP * (len(widths) - 1)


def described_table(title: str, described: Mapping[str, Any]) -> Table:
    """Names and values of any kind as a table of two columns, without those that are empty."""
    filled = {name: value for name, value in described.items() if value not in (None, "", {}, [], ())}
    rows = [(name.replace("_", " "), _readable(value)) for name, value in filled.items()]
    return Table((title, ""), rows, text=2)


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
