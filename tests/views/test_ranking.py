from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np
import pytest
import scipy.stats

from lcsc_opt.database.history import Standing
from lcsc_opt.database.names import LAST_CHECKPOINT, TRAINER_EMA
from lcsc_opt.database.report import HeldOutReport, MetricRow
from lcsc_opt.views.ranking import Difference, Reach, different_samples, headline, ranking
from tests.history_examples import history, measured

# difference


@pytest.mark.parametrize(("one", "two"), [(3, 3), (3, 6), (30, 2)])
def test_intervals_are_students_and_welchs(one: int, two: int) -> None:
    rng = np.random.default_rng(one)
    first, second = rng.normal(3, 1, one), rng.normal(2, 3, two)
    found = Difference.of(dict(enumerate(first)), {-seed: loss for seed, loss in enumerate(second, start=1)})
    expected = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)
    found = Difference.of(dict(enumerate(first)), dict.fromkeys(range(one), 1.5))
    expected = scipy.stats.ttest_1samp(first - 1.5, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)
    assert Difference.of({0: 3.5, 1: 3.5}, {0: 1.0, 1: 1.0}) == Difference(2.5, 2.5, 2.5)
    for losses in ({0: 3.0}, {0: 3.0, 1: 3.0}):  # of one seed there is no interval
        assert Difference.of(losses, {0: 1.0}) == Difference(2.0)


def test_seeds_that_both_have_are_compared_with_each_other() -> None:
    best = {0: 1.0, 1: 5.0, 2: 9.0}
    losses = {2: 9.6, 1: 5.5, 0: 1.4}
    paired, apart = (Difference.of({seed + far: loss for seed, loss in losses.items()}, best) for far in (0, 7))
    assert (paired.mean, apart.mean) == (pytest.approx(0.5), pytest.approx(0.5))
    assert (paired.low or 0) > 0 > (apart.low or 0), "what the seeds have in common cancels"


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
    verdicts = [("CMA", "best"), ("LCSC", "not distinguishable"), ("PSO", "one seed: no interval"), ("EMA*", "worse")]
    assert [(row.label, row.verdict) for row in rows] == [*verdicts, ("DE", "no held-out value")]
    first = rows[0]
    assert first.difference is None
    assert first.held_out == (pytest.approx(2.2), pytest.approx(0.3))
    assert first.below_ema == pytest.approx(2.2 / 10 - 1)  # type: ignore[unreachable]
    assert (first.seeds, first.finished, first.searched) == (3, 3, (1.0, 0.0))
    rows = ranking([history([5.0, 2.0]), history([5.0, 1.0], optimizer="CMA")])
    assert [(row.label, row.verdict) for row in rows] == [("CMA", "no held-out value"), ("LCSC", "no held-out value")]
    assert [(row.held_out, row.below_ema) for row in rows] == [(None, None)] * 2
    assert ranking([]) == []


def test_over_seeds_are_means_and_sample_standard_deviations_of_what_is_known() -> None:
    known = [(1.0, 2.0, 3), (2.0, 4.0, 5), (6.0, 9.0, 4)]
    (row,) = ranking(
        [
            history([searched] + [7.0] * (evaluations - 1), seed=seed, held_out=held_out, seconds=0.5)
            for seed, (searched, held_out, evaluations) in enumerate(known)
        ]
    )
    spreads = [pytest.approx(statistics.stdev(values)) for values in ([1, 2, 6], [2, 4, 9])]
    assert (row.searched, row.held_out) == ((3.0, spreads[0]), (5.0, spreads[1]))
    assert (row.seeds, row.evaluations, row.images, row.seconds, row.below_ema) == (3, 4.0, 40.0, 2.0, None)
    (two,) = ranking([history([2.0], held_out=3.0), history([None], seed=1)])
    assert (two.seeds, two.searched, two.held_out) == (2, (2.0, None), (3.0, None))


def test_the_cost_of_reaching_a_value_is_the_median_over_seeds() -> None:
    studies = [history([9.0, 5.0, 3.0], seed=0), history([4.0, 6.0], seed=1), history([9.0, 9.0, 9.0, 4.5], seed=2)]
    found = ranking(studies, value=5.0)[0].to_value
    costs = {"evaluations": 2, "images": 20, "model_calls": 40, "seconds": 2.5, "evaluation_seconds": 2}
    assert found == {axis: Reach(cost, 3, 3) for axis, cost in costs.items()}


@pytest.mark.parametrize(
    ("value", "reach", "text"),
    [(5.0, Reach(2, 2, 3), "2 (not reached 1 of 3)"), (4.0, Reach(None, 1, 3), "not reached 2 of 3")],
)
def test_seeds_that_did_not_reach_it_are_counted(value: float, reach: Reach, text: str) -> None:
    studies = [history([9.0, 5.0], seed=0), history([4.0], seed=1), history([9.0], seed=2)]
    found = ranking(studies, value=value)[0].to_value["evaluations"]
    assert (found, found.text) == (reach, text)
    assert ranking([history([])], value=value)[0].to_value["images"] == Reach(None, 0, 1)


def reported(
    optimizer: str, loss: float, images: int, *, seeds: tuple[int, ...] = (0,), ema: float | None = None
) -> Standing:
    """A study whose answer was measured with so many images on these groups of noise, with EMA* beside it or not."""
    row = MetricRow("loss", 1, loss, against=None if ema is None else "EMA*", baseline=ema)
    baselines = () if ema is None else (measured(ema, name="EMA*", images=images, seeds=seeds),)
    held_out = HeldOutReport(measured(loss, images=images, seeds=seeds), baselines, rows=(row,))
    return dataclasses.replace(history([loss], optimizer=optimizer), held_out=held_out)


def test_losses_of_other_noise_are_not_compared() -> None:
    """FID falls with the number of images, so 50,000 against 10,000 would flatter."""
    ema = reported("EMAGrid", 10.0, 10_000)
    found = reported("LCSC", 2.0, 50_000)
    other = reported("CMA", 3.0, 10_000)
    rows = {row.optimizer: row for row in ranking([ema, found, other])}
    assert rows["LCSC"].below_ema is None
    assert rows["CMA"].below_ema == pytest.approx(-0.7)
    assert (rows["CMA"].difference, rows["CMA"].verdict) == (None, "held out on other noise")
    groups = reported("CMA", 3.0, 50_000, seeds=(0, 1))
    assert ranking([found, groups])[1].verdict == "held out on other noise"
    (row,) = ranking([reported("LCSC", 2.0, 50_000, ema=8.0)])
    assert row.below_ema == pytest.approx(-0.75), "EMA* was measured on the answer's noise"
    assert "lcsc evaluate" in (different_samples([ema, found]) or "")
    assert different_samples([ema, other]) is None


@pytest.mark.parametrize(
    ("value", "reference", "share"), [(2.0, 8.0, -0.75), (-9.0, -8.0, -0.125), (-7.0, -8.0, 0.125), (-1.0, 1.0, None)]
)
def test_losses_below_zero_are_better_when_they_are_lower(value: float, reference: float, share: float | None) -> None:
    (row,) = ranking([reported("LCSC", value, 10, ema=reference)])
    assert row.below_ema == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(("last", "place", "share"), [(5.0, 1, -0.5), (1.0, 0, -0.9), (30.0, 2, 2.0)])
def test_the_last_checkpoint_has_its_place_among_the_optimizers(last: float, place: int, share: float) -> None:
    studies = [reported("EMAGrid", 10.0, 100), reported("LCSC", 2.0, 100, ema=10.0)]
    for study in studies:
        assert study.held_out is not None
        last_checkpoint = measured(last, name=LAST_CHECKPOINT, images=100)
        report = dataclasses.replace(study.held_out, baselines=(*study.held_out.baselines, last_checkpoint))
        object.__setattr__(study, "held_out", report)
    rows = ranking(studies)
    row = rows.pop(place)
    assert [other.optimizer for other in rows] == ["LCSC", "EMAGrid"]
    assert (row.label, row.held_out, row.searched, row.verdict) == (LAST_CHECKPOINT, (last, None), None, "not searched")
    assert row.below_ema == pytest.approx(share)
    ahead = LAST_CHECKPOINT if place == 0 else "LCSC"
    assert headline(ranking(studies), "FID").startswith(f"Best held-out FID: {ahead} with")
    trainer_ema = measured(1.5, name=TRAINER_EMA, images=100)
    with_ema = dataclasses.replace(report, baselines=(*report.baselines, trainer_ema))
    object.__setattr__(studies[-1], "held_out", with_ema)
    names = [row.optimizer for row in ranking(studies) if row.optimizer != LAST_CHECKPOINT]
    assert names == [TRAINER_EMA, "LCSC", "EMAGrid"]
    if place == 1:  # of the last checkpoint, behind LCSC
        assert ", 60 % below the last checkpoint" in headline([*rows[:1], row, *rows[1:]], "FID")


# the headline


def line(*studies: Any) -> str:
    return headline(ranking(list(studies)), "FID")


def seeds(optimizer: str, losses: list[float]) -> list[Any]:
    return [history([9.0, 5.0], optimizer=optimizer, seed=i, held_out=loss) for i, loss in enumerate(losses)]


EMA, CLOSE = ("EMAGrid", [10.0, 10.0, 10.0]), ("CMA", [1.9, 2.0, 2.1])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            [EMA, CLOSE, ("LCSC", [2.2, 2.0, 1.95])],
            "± 0.1, 80 % below EMA*; LCSC cannot be distinguished from it with 3 seeds",
        ),
        (
            [EMA, CLOSE, ("LCSC", [2.2, 2.0, 1.95]), ("DE", [2.3, 1.9, 2.2])],
            "± 0.1, 80 % below EMA*; LCSC and DE cannot be distinguished from it with 3 seeds",
        ),
        ([CLOSE, ("LCSC", [4.0, 4.1, 4.2])], "± 0.1"),
        ([("CMA", [2.0]), ("LCSC", [4.0])], "; one seed per search"),
        ([("CMA", [2.0])], ""),
    ],
)
def test_it_names_the_winner_how_far_ahead_it_is_and_who_may_be_as_good(found: Any, expected: str) -> None:
    ahead = "Best held-out FID: CMA with 2"
    assert line(*(study for one in found for study in seeds(*one))) == f"{ahead} {expected}".replace(" ;", ";").rstrip()


def test_it_names_the_average_that_is_ema() -> None:
    found = [history([9.0, 5.0], optimizer="EMAGrid", held_out=4.0, average="average of the last 10")]
    assert "50 % below EMA* (average of the last 10)" in line(*seeds("CMA", [2.0]), *found)
    found.append(history([9.0, 5.0], optimizer="EMAGrid", seed=1, held_out=4.0, average="last checkpoint"))
    assert "50 % below EMA*;" in line(*seeds("CMA", [2.0]), *found), "the seeds do not agree"


def test_it_says_when_ema_is_ahead_and_when_values_are_searched_ones() -> None:
    assert line(*seeds("EMAGrid", [2.0]), *seeds("LCSC", [4.0])).startswith("Best held-out FID: EMA* with 2; one seed")
    ended = history([5.0, 2.0], optimizer="LCSC")
    text = line(history([5.0, 3.0], optimizer="CMA"), ended)
    assert text == (
        "Best searched FID: LCSC with 2; nothing was held out: add held_out to the study file for a report, or use "
        "lcsc evaluate STUDY"
    )
    text = line(history([5.0, 3.0], optimizer="CMA", ended=False), ended)
    assert text.startswith("Best searched FID so far: LCSC with 2; held-out values come at the end")
    assert [line(), line(history([])), line(history([None]))] == ["No result yet."] * 3
