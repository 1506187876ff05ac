"""What of an experiment may change, from data alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lcsc_opt.base.errors import StudyStoreError
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


def test_other_data_are_refused_once_a_trial_has_a_loss_and_until_they_are_accepted() -> None:
    begun = problem()
    decides = {**begun.decides, "objective": {**begun.decides["objective"], "reference": "second"}}
    first = {**begun.decides, "objective": {**begun.decides["objective"], "reference": "first"}}
    changes = dataclasses.replace(begun, decides=first).changes(dataclasses.replace(begun, decides=decides))
    assert changes.decides == 'objective.reference was "first", is now "second"'
    changes.check("e", succeeded=False, accept=False)
    changes.check("e", succeeded=True, accept=True)
    with pytest.raises(StudyStoreError, match=r"e: changed since it began: objective\.reference was"):
        changes.check("e", succeeded=True, accept=False)
