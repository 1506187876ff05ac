from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lcsc_opt.database.comparing import relative
from lcsc_opt.database.history import HeldOut, StudyHistory
from lcsc_opt.views.ranking import (
    Difference,
    Reach,
    bootstrap_interval,
    cost_to_reach,
    difference,
    percentile_interval,
    ranking,
    widening,
)
from tests.history_examples import history

# bootstrap


@pytest.mark.parametrize("count", [4, 12, 40])
def test_the_percentile_interval_is_scipy_s(count: int) -> None:
    values = np.random.default_rng(count).gamma(2.0, size=count)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    width = expected.high - expected.low
    np.testing.assert_allclose(percentile_interval([values]), tuple(expected), rtol=0, atol=0.03 * width)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_interval_holds_the_true_mean_as_often_as_it_says(count: int) -> None:
    rng = np.random.default_rng(count)
    intervals = [bootstrap_interval([rng.normal(3.0, 2.0, count)]) for _ in range(400)]
    assert 0.92 <= np.mean([low <= 3.0 <= high for low, high in intervals]) <= 0.98


def test_the_plain_interval_would_hold_it_far_less_often() -> None:
    rng = np.random.default_rng(3)
    intervals = [percentile_interval([rng.normal(3.0, 2.0, 3)]) for _ in range(300)]
    assert np.mean([low <= 3.0 <= high for low, high in intervals]) < 0.85


def test_the_interval_of_two_samples_holds_the_true_difference() -> None:
    rng = np.random.default_rng(5)
    intervals = [bootstrap_interval([rng.normal(3, 1, 3), -rng.normal(2, 3, 6)]) for _ in range(400)]
    assert 0.92 <= np.mean([low <= 1.0 <= high for low, high in intervals]) <= 0.99


def test_the_interval_of_a_normal_sample_is_about_student_s() -> None:
    values = np.random.default_rng(1).normal(size=30)
    error = values.std(ddof=1) / math.sqrt(30)
    expected = values.mean() + error * scipy.stats.t.ppf([0.025, 0.975], 29)
    np.testing.assert_allclose(bootstrap_interval([values]), expected, atol=0.15 * error)


def test_intervals_are_the_same_every_time_and_wider_for_fewer_values() -> None:
    values = np.array([1.0, 2.0, 4.0])
    assert bootstrap_interval([values]) == bootstrap_interval([values])
    assert widening([values]) > widening([np.tile(values, 5)]) > 1
    assert bootstrap_interval([np.full(3, 2.5)]) == (2.5, 2.5)


# difference


def test_seeds_that_both_have_are_compared_with_each_other() -> None:
    best = {0: 1.0, 1: 5.0, 2: 9.0}
    losses = {2: 9.6, 1: 5.5, 0: 1.4}
    paired = difference(losses, best)
    assert (paired.paired, paired.mean) == (True, pytest.approx(0.5))
    assert paired.low is not None
    assert paired.low > 0, "what the seeds have in common cancels"
    apart = difference({seed + 7: loss for seed, loss in losses.items()}, best)
    assert (apart.paired, apart.mean) == (False, pytest.approx(0.5))
    assert apart.low is not None
    assert apart.low < 0


def test_one_seed_has_no_interval() -> None:
    assert difference({0: 3.0}, {0: 1.0}) == Difference(2.0, None, None, True)
    assert difference({0: 3.0, 1: 3.0}, {0: 1.0}) == Difference(2.0, None, None, False)


# ranking


def test_the_best_held_out_optimizer_is_first_and_others_are_judged_against_it() -> None:
    studies = [
        *(history([9.0, 8.0], optimizer="EMAGrid", seed=s, held_out=10.0) for s in range(3)),
        *(history([5.0, 2.0], optimizer="LCSC", seed=s, held_out=2.0 + 0.3 * s) for s in range(3)),
        *(history([5.0, 1.0], optimizer="CMA", seed=s, held_out=2.5 - 0.3 * s) for s in range(3)),
        history([5.0, 0.5], optimizer="PSO", held_out=3.0),
        history([5.0, 0.1], optimizer="DE"),
    ]
    rows = ranking(studies)
    assert [(row.label, row.verdict) for row in rows] == [
        ("CMA", "best"),
        ("LCSC", "not distinguishable"),
        ("PSO", "one seed: no interval"),
        ("EMA*", "worse"),
        ("DE", "no held-out value"),
    ]
    first = rows[0]
    assert first.difference is None
    assert first.held_out == (pytest.approx(2.2), pytest.approx(0.3))
    assert first.below_ema == pytest.approx(2.2 / 10 - 1)  # type: ignore[unreachable]
    assert (first.seeds, first.finished, first.searched) == (3, 3, (1.0, 0.0))


def test_without_held_out_losses_nothing_is_called_best() -> None:
    rows = ranking([history([5.0, 2.0]), history([5.0, 1.0], optimizer="CMA")])
    assert [(row.label, row.verdict) for row in rows] == [("CMA", "no held-out value"), ("LCSC", "no held-out value")]
    assert ranking([]) == []


def test_the_cost_of_reaching_a_value_is_the_median_over_seeds() -> None:
    studies = [history([9.0, 5.0, 3.0], seed=0), history([4.0, 6.0], seed=1), history([9.0, 9.0, 9.0, 4.5], seed=2)]
    found = cost_to_reach(studies, 5.0)
    assert found["evaluations"] == Reach(2, 3, 3)
    assert found["images"] == Reach(20, 3, 3)
    assert found["model_calls"] == Reach(40, 3, 3)
    assert found["seconds"] == Reach(2.5, 3, 3)
    assert found["evaluation_seconds"] == Reach(2, 3, 3)


def test_seeds_that_did_not_reach_it_are_counted() -> None:
    studies = [history([9.0, 5.0], seed=0), history([4.0], seed=1), history([9.0], seed=2)]
    assert cost_to_reach(studies, 5.0)["evaluations"] == Reach(2, 2, 3)
    assert cost_to_reach(studies, 5.0)["evaluations"].text == "2 (not reached 1 of 3)"
    assert cost_to_reach(studies, 4.0)["evaluations"] == Reach(None, 1, 3)
    assert cost_to_reach(studies, 4.0)["evaluations"].text == "not reached 2 of 3"
    assert cost_to_reach([history([])], 4.0)["images"] == Reach(None, 0, 1)


def test_rows_are_for_tables_and_csv() -> None:
    studies = [history([9.0, 8.0], optimizer="EMAGrid", held_out=10.0), history([9.0, 7.0, 2.0], held_out=3.0)]
    lcsc, ema = (row.as_row("evaluations") for row in ranking(studies, value=2.5))
    assert json.loads(json.dumps(lcsc)) == lcsc
    assert (lcsc["optimizer"], lcsc["below_ema_percent"]) == ("LCSC", pytest.approx(-70))
    assert (lcsc["to_ema"], lcsc["to_value"], lcsc["to_value_text"]) == (2, 3, "3")
    assert (ema["optimizer"], ema["to_ema"], ema["to_value"], ema["to_value_text"]) == (
        "EMA*",
        2,
        None,
        "not reached 1 of 1",
    )
    assert (ema["difference"], ema["difference_low"], ema["verdict"]) == (7.0, None, "one seed: no interval")


@given(st.permutations(range(4)))
def test_the_order_of_studies_does_not_change_the_ranking(order: list[int]) -> None:
    studies = [
        history([3.0 - i, 2.0 - i / 7], optimizer="LCSC" if i % 2 else "CMA", seed=i // 2, held_out=2 + i / 3)
        for i in range(4)
    ]
    assert ranking([studies[i] for i in order]) == ranking(studies)


def measured(
    optimizer: str, loss: float, images: int, *, seeds: tuple[int, ...] = (0,), ema: float | None = None
) -> StudyHistory:
    """A study whose answer was measured with so many images on these groups of noise, with EMA* beside it or not."""
    baselines = {} if ema is None else {"EMA*": ema}
    held_out = HeldOut(0, loss, images, (loss,) * len(seeds), baselines, seeds)
    return dataclasses.replace(history([loss], optimizer=optimizer), held_out=held_out)


def test_losses_of_other_noise_are_not_compared() -> None:
    """FID falls with the number of images, so 50,000 against 10,000 would flatter."""
    ema = measured("EMAGrid", 10.0, 10_000)
    found = measured("LCSC", 2.0, 50_000)
    other = measured("CMA", 3.0, 10_000)
    rows = {row.optimizer: row for row in ranking([ema, found, other])}
    assert rows["LCSC"].below_ema is None
    assert rows["CMA"].below_ema == pytest.approx(-0.7)
    assert rows["CMA"].difference is None
    assert rows["CMA"].verdict == "held out on other noise"
    groups = measured("CMA", 3.0, 50_000, seeds=(0, 1))
    assert ranking([found, groups])[1].verdict == "held out on other noise"


def test_ema_is_taken_from_beside_the_answer_where_it_was_measured_there() -> None:
    ema = measured("EMAGrid", 10.0, 10_000)
    found = measured("LCSC", 2.0, 50_000, ema=8.0)
    assert {row.optimizer: row.below_ema for row in ranking([ema, found])} == {
        "LCSC": pytest.approx(-0.75),
        "EMAGrid": 0,
    }


@pytest.mark.parametrize(
    ("value", "reference", "share"), [(2.0, 8.0, -0.75), (-9.0, -8.0, -0.125), (-7.0, -8.0, 0.125), (-1.0, 1.0, None)]
)
def test_losses_below_zero_are_better_when_they_are_lower(value: float, reference: float, share: float | None) -> None:
    assert relative(value, reference) == (None if share is None else pytest.approx(share))
