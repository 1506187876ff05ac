"""How a search ended: cut while it gained, or by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial

import lcsc_opt
from lcsc_opt.base.study_file import parse_study_file
from lcsc_opt.database.arrays import stored_array
from lcsc_opt.study.ending import how_it_ended
from tests.commands import Typed


def trials(losses: list[float], *, error: float | None = None) -> list[FrozenTrial]:
    found = []
    for number, loss in enumerate(losses):
        attributes: dict[str, Any] = {}
        if error is not None:
            attributes["gradient"] = stored_array(np.zeros(2))
            column = loss + error * np.random.default_rng(number).normal(size=20)
            attributes["without_groups"] = {"loss": stored_array(column)}
        one = create_trial(state=TrialState.COMPLETE, value=loss, user_attrs=attributes)
        one.number = number
        found.append(one)
    return found


def ended(losses: list[float], *, error: float | None = None) -> str:
    return how_it_ended(trials(losses, error=error), by_itself=False, patience=None)


def test_a_search_that_was_cut_while_it_gained_says_what_the_last_evaluations_have_brought() -> None:
    assert "still improving: 39 more evaluations have improved it by 10 %" in ended([*[1.0] * 20, *[0.9] * 20])
    assert "have brought nothing that is certain" in ended([*[1.0] * 20, *[1.1] * 20])
    assert "have brought nothing that is certain" in ended([*[1.0] * 20, *[0.9] * 20], error=1.0)
    assert "still improving: 20 more evaluations have improved it by 10 %" in ended(
        [*[1.0] * 20, *[0.9] * 20], error=1e-4
    )
    assert "have brought less than 1 % of the whole gain" in ended([9.0, *[1.0] * 20, *[0.95] * 20])
    assert ended([1.0, 0.5]) == "cut by its budget"


def test_the_last_check_counts_of_a_search_by_gradients_also_if_its_first_trial_failed() -> None:
    failed = create_trial(state=TrialState.FAIL)
    failed.number = 0
    checked = trials([*[1.0] * 22, 0.5, *[1.0] * 18], error=1e-4)
    for trial in checked:
        trial.number += 1
    said = how_it_ended([failed, *checked], by_itself=False, patience=None)
    assert "have brought nothing that is certain" in said


def test_a_search_that_was_cut_within_its_first_round_says_so() -> None:
    """Nobody knew whether 26 evaluations could suffice."""
    steps = trials([1.0, 0.5, 0.4], error=0.1)
    said = how_it_ended(steps, by_itself=False, patience=None, round_steps=60)
    assert said == "cut by its budget after 3 steps, where a first round has 60 if the budget allows so many"
    longer = trials([*[1.0] * 40, *[0.5] * 20], error=1e-4)
    assert "steps, where" not in how_it_ended(longer, by_itself=False, patience=None, round_steps=60)


def test_one_that_has_ended_says_so() -> None:
    by_error = how_it_ended(trials([0.9294, 0.8823], error=0.1), by_itself=True, patience=None)
    assert by_error.endswith("a round of shorter steps gained no more than its error, or 1 % of the whole gain")
    without = how_it_ended(trials([0.9294, 0.8823]), by_itself=True, patience=None)
    assert without == "ended by itself: a round of shorter steps gained less than 1 % of the whole gain"
    assert "7 evaluations in a row brought no lower loss" in how_it_ended(trials([1.0]), by_itself=False, patience=7)


DISTANCE = """
def distance(a):
    return round(float(((a - 0.1) ** 2).sum()), 1)  # a plateau is soon reached
"""
STUDY = """
name: quick
objective: {file: function.py, settings: {callable: "distance:distance", steps: [1, 2, 3, 4, 5]}}
space: affine
optimizers: [RandomSearch]
budget: {evaluations: 400, patience: 8}
"""


def test_patience_ends_a_search_which_continues_with_more(typed: Typed, workplace: Path) -> None:
    (workplace / "distance.py").write_text(DISTANCE)
    (workplace / "quick.yaml").write_text(STUDY)
    said = typed("run", "quick.yaml").err
    assert "8 evaluations in a row brought no lower loss" in said
    study = lcsc_opt.load_study("quick/RandomSearch/0")
    count = len(study.trials)
    assert count < 400
    best = min(range(count), key=lambda number: study.trials[number]["loss"])
    assert count == best + 9
    assert "finished already" in typed("run", "quick.yaml").err
    typed("run", "quick.yaml", "budget.patience=12")
    assert len(lcsc_opt.load_study("quick/RandomSearch/0").trials) > count


def test_a_budget_is_a_bound_of_one_unit_and_each_optimizer_has_its_own_by_default() -> None:
    content = {
        "name": "x",
        "objective": {"file": "function.py"},
        "optimizers": ["LCSCGradient", "CMA"],
        "space": {"rows": None},
    }
    specs = parse_study_file(content, source="x").studies()
    assert [spec.budget.evaluations for spec in specs] == [200, 100]
