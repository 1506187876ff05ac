from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcsc_opt.base.records import HELD_OUT, SEARCH, SELECTION, Cost, Evaluation, Noise

costs = st.builds(
    Cost,
    images=st.integers(0, 10**9),
    model_calls=st.integers(0, 10**9),
    **{f"{part}seconds": st.floats(0, 1e9) for part in ("", "merge_", "sample_", "features_", "metric_")},
)


@given(costs)
def test_a_cost_comes_back_from_the_database_as_it_was(cost: Cost) -> None:
    assert Cost.from_dict(json.loads(json.dumps(cost.as_dict()))) == cost


def test_names_that_this_version_does_not_know_are_left_out() -> None:
    assert Cost.from_dict({"seconds": 2.0, "joules": 5.0}) == Cost(seconds=2.0)


def test_search_selection_and_held_out_are_different_noise() -> None:
    assert len({SEARCH, SELECTION, HELD_OUT}) == 3
    assert len({noise.group for noise in (SEARCH, SELECTION, HELD_OUT)}) == 3
    assert Noise() == SEARCH


def test_records_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Evaluation(1.0).loss = 0.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        SEARCH.seed = 1  # type: ignore[misc]


def test_evaluations_share_no_metrics() -> None:
    assert Evaluation(1.0).metrics is not Evaluation(1.0).metrics
