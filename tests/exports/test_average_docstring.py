"""``lcsc_opt.average``."""

from __future__ import annotations

import doctest
from pathlib import Path

from lcsc_opt.exports import averaging


def test_the_docstring_runs(workplace: Path) -> None:
    assert doctest.testmod(averaging) == doctest.TestResults(failed=0, attempted=4)
