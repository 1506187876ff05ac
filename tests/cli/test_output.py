"""Tables on terminals of any width."""

from __future__ import annotations

import io

import pytest

from lcsc_opt.cli.output import print_table


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
