"""How many of the library's functions a reader meets between ``lcsc run`` and a trial. It may only get shorter."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import lcsc_opt
from lcsc_opt.study import runner
from tests.commands import Typed

PACKAGE = str(Path(lcsc_opt.__file__).parent)
STUDY = """
name: quick
objective: {file: function.py, settings: {callable: "distance:distance", steps: [1, 2, 3, 4, 5]}}
space: affine
optimizers: [CMA]
budget: {evaluations: 6}
"""


class Way:
    """The functions of the package that are entered, by the number of asks before."""

    def __init__(self) -> None:
        self.asks = 0
        self.entered: dict[int, set[tuple[str, str]]] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED and "<" not in code.co_name  # no class body, no lambda
        if event == "call" and is_function and code.co_filename.startswith(PACKAGE):
            function = (code.co_filename, f"{code.co_firstlineno} {code.co_name}")
            self.entered.setdefault(self.asks, set()).add(function)

    def counts(self, asks: int) -> tuple[int, int]:
        """Functions and files between two asks."""
        functions = self.entered[asks]
        return len(functions), len({file for file, _ in functions})


def test_the_way_of_a_function_from_the_command_to_a_trial(
    typed: Typed, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "distance.py").write_text("def distance(a):\n    return float(((a - 0.1) ** 2).sum())\n")
    (workplace / "quick.yaml").write_text(STUDY)
    way = Way()
    ask = runner.Search._ask

    def counted(search: runner.Search) -> Any:
        way.asks += 1
        return ask(search)

    monkeypatch.setattr(runner.Search, "_ask", counted)
    sys.setprofile(way)
    try:
        typed("run", "quick.yaml")
    finally:
        sys.setprofile(None)
    first, trial = way.counts(0), way.counts(3)
    counted_now = f"to the first ask {first[0]} functions in {first[1]} files; a trial {trial[0]} in {trial[1]}"
    assert first[0] <= 275, counted_now
    assert first[1] <= 50, counted_now
    assert trial[0] <= 75, counted_now
    assert trial[1] <= 25, counted_now
