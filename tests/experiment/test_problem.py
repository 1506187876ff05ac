"""What of an experiment may change, from data alone."""

from __future__ import annotations

from typing import Any

from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.experiment.problem import Problem
from lcsc_opt.objective.contract import CoefficientFunction

OBJECTIVE = CoefficientFunction(lambda c: float((c**2).sum()), (1, 2, 3), name="f")


def problem(**settings: Any) -> Problem:
    shared: dict[str, Any] = {"callable": "m:f", "steps": [1, 2, 3]}
    return Problem.of(ObjectiveSpec(file="function.py", settings={**shared, **settings}), OBJECTIVE, None)


def test_what_is_only_reported_and_the_machine_may_change() -> None:
    begun = problem(metrics=["fid"], batch_size=8, loss={"fid": 1, "also": "x"})
    changes = begun.changes(problem(metrics=["kid"], device="cpu", held_out="m:g", loss={"fid": 1, "also": "y"}))
    assert not changes.decides
    names = [line.split(" was ")[0] for line in changes.reported]
    assert names == ["settings.held_out", "settings.loss.also", "settings.metrics"]
    assert not changes.measures_otherwise
