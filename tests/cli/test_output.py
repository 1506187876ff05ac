"""Tables on terminals of any width, and JSON that every program reads."""

from __future__ import annotations

import io
import json
import math

import pytest

from lcsc_opt.cli.output import print_json, print_table


@pytest.mark.parametrize("width", [140, 80, 60, 40])
def test_no_table_cuts_a_number_or_a_name(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """``120,0…`` of 120,000 could be any number."""
    written = io.StringIO()
    monkeypatch.setattr("sys.stdout", written)
    monkeypatch.setattr(written, "isatty", lambda: True)
    for name, value in {"TERM": "dumb", "COLUMNS": str(width), "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    cells = ["mine/LCSCQuadratic/0", "unfinished", "27/40", "1.713 ± 0.012", "120,000", "two words"]
    print_table(("study", "state", "evaluations", "searched", "images", "optimizer options"), [cells])
    words = written.getvalue().split()
    assert set(" ".join(cells).split()) <= set(words)
    assert "…" not in written.getvalue()
    assert (len(max(written.getvalue().splitlines(), key=len)) <= width) == (width >= 80)


def test_numbers_that_are_not_finite_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"metrics": {"fid": math.nan, "kid": 0.5}, "losses": [(1.0, math.inf), -math.inf]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert printed == {"metrics": {"fid": None, "kid": 0.5}, "losses": [[1.0, None], None]}
