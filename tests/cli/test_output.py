"""Tables on terminals of any width, and JSON that every program reads."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable

import pytest

from lcsc_opt.cli.output import print_json, print_table
from lcsc_opt.views import Table

NAMES = ("study", "state", "evaluations", "searched", "images", "optimizer options")
CELLS = ("mine/LCSCQuadratic/0", "unfinished", "27/40", "1.713 ± 0.012", "120,000", "two words")

METRICS = ("precision", "recall", "kid", "fid_held_out", "cross_check", "near", "fid@dinov2", "coverage")
COMPARED = (
    ("optimizer", "held-out fid", *METRICS),
    [("LCSCGradient", "5.51 ± 0.2", *("0.158 ± 0.01",) * 8), ("EMA* (EMA 0.985287)", "31.92", *("0.099",) * 8)],
)

Terminal = Callable[[int], io.StringIO]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard output a terminal of so many characters; 0 is a file."""

    def of_width(width: int) -> io.StringIO:
        written = io.StringIO()
        monkeypatch.setattr("sys.stdout", written)
        monkeypatch.setattr(written, "isatty", lambda: width > 0)
        for name, value in {"TERM": "dumb", "COLUMNS": str(width or 20), "LINES": "24"}.items():
            monkeypatch.setenv(name, value)
        return written

    return of_width


def longest(text: str) -> int:
    return len(max(text.splitlines(), key=len))


@pytest.mark.parametrize("width", [140, 80, 60, 40])
def test_no_table_cuts_a_number_or_a_name(terminal: Terminal, width: int) -> None:
    """``120,0…`` of 120,000 could be any number."""
    written = terminal(width)
    print_table(Table(NAMES, [CELLS]))
    words = written.getvalue().split()
    assert set(" ".join(CELLS).split()) <= set(words)
    assert "…" not in written.getvalue()
    assert (longest(written.getvalue()) <= width) == (width >= 80)


@pytest.mark.parametrize("width", [*range(40, 141, 4), 200])
def test_a_terminal_gets_the_columns_that_fit_it_and_the_names_of_the_others(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    header, rows = COMPARED
    written = terminal(width)
    print_table(Table(header, rows, "held out", optional=METRICS))
    said = capsys.readouterr().err
    words = written.getvalue().split()
    shown = [name for name in METRICS if name in words]
    dropped = [name for name in METRICS if name not in shown]
    assert shown == list(METRICS[: len(shown)]), "whole names, the first ones"
    assert longest(written.getvalue()) <= width
    assert written.getvalue().count("0.158 ± 0.01") == len(shown), "a number and its spread stay in one line"
    assert said == (f"not shown: {', '.join(dropped)}; in a wider terminal, or --format json\n" if dropped else "")
    assert (dropped == []) == (width >= 143)


def test_a_file_gets_every_column_with_each_row_in_a_line(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    header, rows = COMPARED
    written = terminal(0)
    print_table(Table(header * 2, [row * 2 for row in rows], optional=METRICS))
    lines = written.getvalue().splitlines()
    assert len(lines) <= 4
    assert [line.split()[-1] for line in lines[-2:]] == ["0.01", "0.099"]
    assert capsys.readouterr().err == ""


def test_numbers_that_are_not_finite_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"metrics": {"fid": math.nan, "kid": 0.5}, "losses": [(1.0, math.inf), -math.inf]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert printed == {"metrics": {"fid": None, "kid": 0.5}, "losses": [[1.0, None], None]}


def test_lines_of_a_table_in_a_file_end_where_their_text_ends(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(Table(("name", "value"), [("a", "x" * 300), ("b", "y")], text=2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line == line.rstrip() for line in lines)
