"""How many functions of the library a reader meets between ``lcsc run`` and a trial; a few depend on earlier tests."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import lcsc_opt
from lcsc_opt.study import loop
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


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """Counts until the test ends."""
    counting = Way()
    ask = loop.Loop._ask

    def counted(search: loop.Loop) -> Any:
        counting.asks += 1
        return ask(search)

    monkeypatch.setattr(loop.Loop, "_ask", counted)
    for place in ("base.progress._LINE_SECONDS", "study.opening._NODES_SECONDS"):
        monkeypatch.setattr(f"lcsc_opt.{place}", math.inf)  # what is done now and then depends on the machine
    sys.settrace(counting)  # which is told of calls alone, as long as it returns nothing
    yield counting
    sys.settrace(None)


def test_the_way_of_a_function_from_the_command_to_a_trial(typed: Typed, workplace: Path, way: Way) -> None:
    (workplace / "distance.py").write_text("def distance(a):\n    return float(((a - 0.1) ** 2).sum())\n")
    (workplace / "quick.yaml").write_text(STUDY)
    typed("run", "quick.yaml")
    assert_at_most(way.counts(0), functions=270, files=46)
    assert_at_most(way.counts(3), functions=66, files=18)


@pytest.mark.slow
def test_the_way_of_the_demo_from_the_command_to_a_trial(typed: Typed, workplace: Path, way: Way) -> None:
    shorter = (
        "objective.settings.images=65",
        "budget.evaluations=3",
        "held_out.images=65",
        "held_out.top=1",
        "objective.settings.nfe=2",
    )
    typed("run", "demo", *shorter)
    assert_at_most(way.counts(0), functions=635, files=89)
    assert_at_most(way.counts(2), functions=219, files=47)  # of the grid
    assert_at_most(way.counts(max(way.entered) - 1), functions=265, files=51)  # with the gradient


def assert_at_most(counted: tuple[int, int], *, functions: int, files: int) -> None:
    assert counted[0] <= functions, counted
    assert counted[1] <= files, counted
