"""What ``benchmarks/large_search.py`` compares after a kill, and what ``expected.py`` predicts of a trial."""

from __future__ import annotations

import copy
import datetime
import sys
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import expected
import large_search

NOON = datetime.datetime(2026, 11, 24, 12)
KEY = ("LCSC", 0)


def trial(number: int, state: TrialState) -> FrozenTrial:
    ended = NOON if state.is_finished() else None
    attributes = {"coefficients": "AAAA", "gradient": "BBBB", "cost": {"seconds": 2.0}}
    return FrozenTrial(
        number=number,
        state=state,
        value=1.0 if state == TrialState.COMPLETE else None,
        datetime_start=NOON,
        datetime_complete=ended,
        params={},
        distributions={},
        user_attrs=attributes,
        system_attrs={},
        intermediate_values={},
        trial_id=number,
    )


@pytest.fixture
def before() -> large_search.Trials:
    return {KEY: trial(0, TrialState.PRUNED), ("LCSC", 1): trial(1, TrialState.RUNNING)}


def test_a_trial_that_was_running_may_get_its_result(before: large_search.Trials) -> None:
    after = {**before, ("LCSC", 1): trial(1, TrialState.COMPLETE)}
    assert large_search.differences(before, after) == []


def test_a_lost_trial_is_noticed(before: large_search.Trials) -> None:
    after = {("LCSC", 1): before["LCSC", 1]}
    assert large_search.differences(before, after) == [f"{KEY}: lost"]


@pytest.mark.parametrize(("name", "message"), [("coefficients", "other coefficients"), ("gradient", "another result")])
def test_a_changed_array_is_noticed(before: large_search.Trials, name: str, message: str) -> None:
    after = copy.deepcopy(before)
    after[KEY].user_attrs[name] = "CCCC"
    assert large_search.differences(before, after) == [f"{KEY}: {message}"]


def test_a_second_evaluation_is_noticed(before: large_search.Trials) -> None:
    after = copy.deepcopy(before)
    after[KEY].datetime_complete = NOON + datetime.timedelta(seconds=1)
    assert large_search.differences(before, after) == [f"{KEY}: another result"]


def test_a_kill_between_two_trials_does_not_count(before: large_search.Trials) -> None:
    only_done = {KEY: before[KEY]}
    assert large_search.differences(only_done, only_done) == ["the kill was in no trial"]


def test_a_gradient_costs_the_calls_that_the_search_counts() -> None:
    """24 images in batches of 8, 5 calls: 120 + 80 forward, 96 again in backward, 240 for backward itself."""
    work = expected.Work(3, 1000, 1e9, 5, 24, 8, 100)
    rates = {"fp32": 1e-3, "fp64": 1.0, "bandwidth": 1.0}
    assert expected.parts(work, rates)["sample"] == pytest.approx(120)
    assert expected.parts(work, rates, gradient=True)["sample"] == pytest.approx(120 + 80 + 96 + 240)


def test_both_predictions_of_a_gradient_count_the_same_passes() -> None:
    """The features of all images are computed without a graph, then with one, and backward costs one more."""
    rows = {name: seconds for name, (seconds, _) in expected.expected(20, 1000, quick=True).items()}
    sample = rows["sample, `bf16`"]
    features = rows["features by InceptionV3"]
    weights, flops = expected.counted(quick=True)
    work = expected.Work(20, weights, flops, 1, 1000, 1, 1000)
    rates = {"fp32": 1.0, "fp64": 1.0, "bandwidth": 1.0}
    plain = expected.parts(work, rates)
    gradient = expected.parts(work, rates, gradient=True)
    passes = {part: gradient[part] / plain[part] for part in ("sample", "features")}
    assert rows["trial with its gradient"] == pytest.approx(
        passes["sample"] * sample + passes["features"] * features, rel=1e-3
    )
