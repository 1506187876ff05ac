"""Tables on terminals of any width."""

from __future__ import annotations

import io

import pytest

from lcsc_opt.cli import output


@pytest.mark.parametrize("width", [140, 80, 60, 40])
def test_no_table_cuts_a_number_or_a_name(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """``120,0…`` of 120,000 could be any number."""
    written = io.StringIO()
    monkeypatch.setattr(output.sys, "stdout", written)
    console = output.console()
    console.width = width
    cells = ["mine/LCSCQuadratic/0", "unfinished", "27/40", "1.713 ± 0.012", "120,000", "two words"]
    shown = output.table("study", "state", "evaluations", "searched", "images", "optimizer options")
    shown.add_row(*cells)
    console.print(shown)
    words = written.getvalue().split()
    assert set(" ".join(cells).split()) <= set(words)
    assert "…" not in written.getvalue()
    assert (len(max(written.getvalue().splitlines(), key=len)) <= width) == (width >= 80)
