from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np
import pytest
import scipy.stats

from lcsc_opt.base.jackknife import GROUPS
from lcsc_opt.base.records import STANDARD_ERROR, TRAINER_EMA, ReportedMetrics, Yardstick
from lcsc_opt.database.names import EMA, LAST_CHECKPOINT
from lcsc_opt.views import number
from lcsc_opt.views.answer import answer_line, headline
from lcsc_opt.views.pictures import picture_line
from lcsc_opt.views.ranking import ANSWER, Difference, ranking
from lcsc_opt.views.tables import ranking_table, report_tables, studies_table, study_row
from tests.history_examples import history, in_one_report, measured, report_of, reported

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
    assert Difference.of({0: 3.5, 1: 3.5}, {0: 1.0, 1: 1.0}) == Difference(2.5, 2.5, 2.5, seeds=2)
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
        history([9.0, 8.0], optimizer="EMAGrid", held_out=10.0),  # needs no seeds to be told apart
        *(history([5.0, 2.0], optimizer="LCSC", seed=s, held_out=2.0 + 0.3 * s) for s in range(3)),
        *(history([5.0, 1.0], optimizer="CMA", seed=s, held_out=2.5 - 0.3 * s) for s in range(3)),
        history([5.0, 0.5], optimizer="PSO", held_out=3.0),
        history([5.0, 0.1], optimizer="DE"),
    ]
    answer, *rows = ranking(in_one_report(studies))
    assert (answer.label, answer.seeds, answer.held_out) == ("answer · CMA (seed 2), trial 0", 0, (1.9, None))
    assert (answer.searched, answer.below_ema) == (None, pytest.approx(1.9 / 10 - 1))
    verdicts = [
        ("CMA", "lowest loss"),
        ("LCSC", "not distinguishable"),
        ("PSO", "one seed: no interval"),
        ("EMA*", "worse"),
    ]
    assert [(row.label, row.verdict) for row in rows] == [*verdicts, ("DE", "no held-out value")]
    first = rows[0]
    assert first.difference is None
    assert first.held_out == (pytest.approx(2.2), pytest.approx(0.3))
    assert first.below_ema == pytest.approx(2.2 / 10 - 1)  # type: ignore[unreachable]
    assert (first.seeds, first.unfinished, first.searched) == (3, 0, (1.0, 0.0))
    rows = ranking([history([5.0, 2.0]), history([5.0, 1.0], optimizer="CMA")])
    assert [(row.label, row.verdict) for row in rows] == [("CMA", "no held-out value"), ("LCSC", "no held-out value")]
    assert [(row.held_out, row.below_ema) for row in rows] == [(None, None)] * 2


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("other", "verdict"),
    [(5.0, "worse, one seed"), (3.1, "not distinguishable, one seed"), (None, "one seed: no interval")],
)
def test_two_models_of_one_seed_each_are_compared_over_their_images(
    other: float | None, verdict: str, sign: int
) -> None:
    """No interval over seeds exists, but the report has one over images, which the same line has elsewhere."""
    error: dict[str, Any] = {} if other is None else {f"loss{STANDARD_ERROR}": 0.3}
    studies = [
        dataclasses.replace(history([loss], optimizer=name), report=report_of({study: measured(loss, **error)}))
        for name, loss in (("LCSC", 3.0), ("CMA", other or 5.0))
        for study in [f"digits/{name}/0"]
    ]
    studies = [dataclasses.replace(study, sign=sign) for study in in_one_report(studies, sign=sign)]
    _, row = ranking(studies)
    assert (row.label, row.verdict) == ("CMA", verdict)
    if other is not None:
        width = 1.96 * 0.3 * 2**0.5
        assert row.difference is not None
        ends = sorted(sign * (other - 3.0 + end) for end in (-width, width))
        assert [row.difference.low, row.difference.high] == pytest.approx(ends, rel=1e-3)


def test_a_sum_from_which_a_reward_is_subtracted_has_no_shares() -> None:
    """At the yardstick it is nearly zero, so that −4,900 % would stand beside a gain."""
    studies = [
        history([9.0], optimizer="EMAGrid", held_out=-0.02),
        history([5.0], optimizer="LCSC", held_out=-1.1),
        history([5.0], optimizer="CMA", held_out=0.01),
    ]
    rows = ranking(in_one_report(studies))
    assert [row.below_ema for row in rows] == [None] * 3
    assert "against EMA*" not in ranking_table(rows).header, "a column without a number"
    below_zero = [history([9.0], optimizer="EMAGrid", held_out=-0.1), history([5.0], optimizer="LCSC", held_out=-3.2)]
    of_sum = ReportedMetrics(signs={"fid": 1, "reward": -1}, terms=("fid", "reward"))
    assert {row.below_ema for row in ranking(in_one_report(below_zero, metrics=of_sum))} == {None}, "−3,100 %"
    without_loss = [history([9.0], optimizer="EMAGrid", held_out=2.0), history([5.0], optimizer="LCSC", held_out=0.0)]
    rows = ranking(in_one_report(without_loss))
    assert {row.below_ema for row in rows} == {-1.0, 0.0}, "zero has a share"
    assert "against EMA*" in ranking_table(rows).header


@pytest.mark.parametrize(("of_means", "searched"), [([2.0, 4.0], (3.0, pytest.approx(2**0.5))), ([2.0, None], None)])
def test_a_row_has_the_searched_loss_of_the_models_that_were_held_out(
    of_means: list[float | None], searched: Any
) -> None:
    """A mean of iterates was not searched, and what the best trial had is another model's."""
    studies = [
        dataclasses.replace(history([1.0, 9.0], seed=seed), report=reported(5.0, study=study, searched=of_model))
        for seed, of_model in enumerate(of_means)
        for study in [f"digits/LCSC/{seed}"]
    ]
    joined = in_one_report(studies)
    _, row = ranking(joined)
    assert (row.searched, row.held_out) == (searched, (5.0, 0.0))
    assert [study_row(study)["searched"] for study in joined] == of_means
    assert [cells[4] for cells in studies_table(joined).rows] == [number(loss) for loss in of_means]


def test_over_seeds_are_means_and_sample_standard_deviations_of_what_is_known() -> None:
    known = [(1.0, 2.0, 3), (2.0, 4.0, 5), (6.0, 9.0, 4)]
    studies = [
        history([searched] + [7.0] * (evaluations - 1), seed=seed, held_out=held_out, seconds=0.5)
        for seed, (searched, held_out, evaluations) in enumerate(known)
    ]
    _, row = ranking(in_one_report(studies))
    spreads = [pytest.approx(statistics.stdev(values)) for values in ([1, 2, 6], [2, 4, 9])]
    assert (row.searched, row.held_out) == ((3.0, spreads[0]), (5.0, spreads[1]))
    assert (row.seeds, row.evaluations, row.images, row.seconds, row.below_ema) == (3, 4.0, 40.0, 2.0, None)
    _, two = ranking(in_one_report([history([2.0], held_out=3.0), history([None], seed=1)]))
    assert (two.seeds, two.searched, two.held_out) == (2, (2.0, None), (3.0, None))


@pytest.mark.parametrize(
    ("value", "reference", "share"), [(2.0, 8.0, -0.75), (-9.0, -8.0, -0.125), (-7.0, -8.0, 0.125), (-1.0, 1.0, None)]
)
def test_losses_below_zero_are_better_when_they_are_lower(value: float, reference: float, share: float | None) -> None:
    studies = in_one_report([history([value], held_out=value)], measured(reference, name=EMA))
    expected = None if share is None else pytest.approx(share)
    row = next(row for row in ranking(studies) if row.optimizer == "LCSC")
    assert row.below_ema == expected


@pytest.mark.parametrize(("reward", "share"), [(0.65, None), (0.9, -0.75)])
def test_a_penalty_of_ema_has_no_share(reward: float, share: float | None) -> None:
    """With a limit of 0.85, "−88 %" was mostly the penalty of an EMA* that has 0.65."""
    kept = Yardstick({}, kept="reward", sign=-1, bound=0.85)
    studies = [history([2.0], held_out=2.0, yardstick=kept)]
    rows = ranking(in_one_report(studies, measured(8.0, name=EMA, reward=reward)))
    assert rows[0].below_ema == share
    assert ("against EMA*" in ranking_table(rows).header) == (share is not None)


@pytest.mark.parametrize(("last", "place", "share"), [(5.0, 1, -0.5), (1.0, 0, -0.9), (30.0, 2, 2.0)])
def test_the_last_checkpoint_has_its_place_among_the_optimizers(last: float, place: int, share: float) -> None:
    studies = [history([10.0], optimizer="EMAGrid", held_out=10.0), history([2.0], held_out=2.0)]
    had = [measured(last, name=LAST_CHECKPOINT)]
    answer, *rows = ranking(in_one_report(studies, *had))
    everything = [answer, *rows]
    row = everything.pop(place)
    assert [other.optimizer for other in everything] == ["LCSC", "EMAGrid"]
    assert (row.held_out, row.searched, row.below_ema) == ((last, None), None, pytest.approx(share))
    if place == 0:
        assert (row.label, row.verdict) == (f"answer · {LAST_CHECKPOINT}", ANSWER)
    else:
        assert (row.label, row.verdict) == (LAST_CHECKPOINT, "not searched")
        assert (answer.label, answer.verdict) == ("answer · LCSC, trial 0", ANSWER)
    rows = ranking(in_one_report(studies, *had, measured(1.5, name=TRAINER_EMA)))
    names = [row.optimizer for row in rows if row.optimizer != LAST_CHECKPOINT]
    assert names == [TRAINER_EMA, "LCSC", "EMAGrid"]
    [of_search] = [row for row in rows if row.optimizer == "LCSC"]
    assert of_search.verdict == "best search", "not the lowest loss: the trainer's average has that"


def test_a_model_stands_once_with_all_that_it_is() -> None:
    """EMA* is the last checkpoint, and the answer the only model of its search: none of them has a second row."""
    studies = [history([10.0], optimizer="EMAGrid", held_out=10.0), history([2.0], held_out=2.0)]
    rows = ranking(in_one_report(studies, measured(10.0, name=LAST_CHECKPOINT)))
    assert [row.label for row in rows] == ["answer · LCSC, trial 0", "last checkpoint = EMA*"]
    assert [row.verdict for row in rows] == [ANSWER, "one seed: no interval"], "the best stands at the answer alone"
    assert rows[0].evaluations == 1, "with what its search cost"
    report = in_one_report(studies, measured(10.0, name=LAST_CHECKPOINT, kid=0.1))[0].report
    assert report is not None
    [table] = report_tables(report, report.answer)
    assert tuple(table.header) == ("metric", "answer · LCSC, trial 0", "last checkpoint = EMA*", "gain")


def test_two_grids_with_the_same_best_model_have_one_row_and_two_searches_have_two() -> None:
    found = {"digits/LCSC/0": measured(2.0)}
    for optimizer, loss in (("EMAGrid", 10.0), ("Grid", 10.0), ("CMA", 10.0)):
        found[f"digits/{optimizer}/0"] = measured(loss)
    report = report_of(found)
    studies = [
        dataclasses.replace(history([1.0], optimizer=name), report=report)
        for name in ("LCSC", "EMAGrid", "Grid", "CMA")
    ]
    labels = [row.label for row in ranking(studies)]
    same = "EMA* = Grid, trial 0 = CMA, trial 0"
    assert labels == ["answer · LCSC, trial 0", same, same]
    assert [row.optimizer for row in ranking(studies)] == ["LCSC", "EMAGrid", "CMA"]


def test_before_a_report_the_line_says_who_is_ahead() -> None:
    ahead = history([5.0, 2.0], optimizer="LCSC")
    other = history([5.0, 3.0], optimizer="CMA")
    deleted = "the Optuna study digits, which had its report, was deleted: run the same command again"
    assert headline([other, ahead]) == f"Best searched FID: LCSC with 2; {deleted}", (
        "what the experiment stored is gone"
    )
    stored = {"objective": {"file": "function.py"}}
    ahead = dataclasses.replace(ahead, settings=stored)
    text = headline([other, ahead])
    assert text.startswith("Best searched FID: LCSC with 2; nothing was held out: add held_out to the study file")
    ahead = dataclasses.replace(ahead, settings={**stored, "held_out": {"top": 3}})
    nothing_held_out = "this objective holds nothing out, so it may look better than it is"
    for changes, so_far, reason in (
        ({}, "", "its report is not made yet: run the same command again"),
        ({"holds_out": False}, "", nothing_held_out),
        ({"holds_out": False, "ended": False}, " so far", nothing_held_out),
        (
            {"ended": False},
            " so far",
            "held-out values come when all searches have ended, or with lcsc evaluate digits",
        ),
    ):
        text = headline([other, dataclasses.replace(ahead, **changes)])  # type: ignore[arg-type]
        assert text == f"Best searched FID{so_far}: LCSC with 2; {reason}"
    assert [headline([history(losses)]) for losses in ([], [None])] == ["No result yet."] * 2


# the answer


def model(loss: float, fid: float, judge: float, **more: Any) -> Any:
    return measured(loss, fid=fid, fid_held_out=judge, **more)


def test_the_answer_is_compared_with_the_best_that_the_user_had_in_the_metric_that_is_named() -> None:
    last = model(0.3, 20.0, 25.0, name=LAST_CHECKPOINT)
    found = {"digits/LCSC/1": model(0.1, 10.0, 18.0, trial=38)}
    line = answer_line(report_of(found, last))
    beginning = "The answer is LCSC (seed 1), trial 38, with fid 10: 50 % below the best model you had, "
    unseen = " Against real images that no search saw, it is 28 % below that model (25 → 18)."
    assert line == f"{beginning}the last checkpoint, with 20.{unseen}"
    average = measured(0.2, name=EMA, fid=30.0, fid_held_out=19.0)
    average = dataclasses.replace(average, model=dataclasses.replace(average.model, label="average of the last 10"))
    line = answer_line(report_of(found, last, average))
    other = (
        "Of what you had, EMA* (average of the last 10) was better than the last checkpoint by loss (0.2, against 0.3; "
        "the answer has 0.1) and fid_held_out (19, against 25; the answer has 18)."
    )
    by_it = beginning.replace("you had,", "you had by this number,")
    assert line == f"{by_it}the last checkpoint, with 20.{unseen} {other}"
    uncertain: dict[str, Any] = {f"{name}{STANDARD_ERROR}": 9.0 for name in ("loss", "fid_held_out")}
    alike = measured(0.2, name=EMA, fid=30.0, fid_held_out=19.0, **uncertain)
    signs = ReportedMetrics(signs={"fid_held_out": 1})
    line = answer_line(
        report_of(found, model(0.3, 20.0, 25.0, name=LAST_CHECKPOINT, **uncertain), alike, metrics=signs)
    )
    assert line == f"{beginning}the last checkpoint, with 20.{unseen}", "better by chance is not said"
    chosen = "it was chosen because its loss was certainly better on the noise of the choice"
    line = answer_line(report_of(found, model(0.2, 8.0, 25.0, name=LAST_CHECKPOINT)))
    assert line == f"{beginning.replace('50 % below', '25 % worse than')}the last checkpoint, with 8; {chosen}.{unseen}"
    line = answer_line(report_of(found, model(0.2, 10.03, 25.0, name=LAST_CHECKPOINT)))
    assert line == f"{beginning.replace('50 %', '0.3 %')}the last checkpoint, with 10.03.{unseen}"
    assert answer_line(report_of(found)) == "The answer is LCSC (seed 1), trial 38, with fid 10."


def test_an_answer_that_is_worse_in_a_number_says_so_and_why_it_was_chosen_in_one_sentence() -> None:
    signs = ReportedMetrics(signs={"fid": 1, "fid_held_out": 1, "precision": -1})
    last = model(0.3, 20.0, 25.0, name=LAST_CHECKPOINT, precision=0.6)
    better = model(0.1, 10.0, 18.0, trial=38, precision=0.7)
    assert "worse" not in answer_line(report_of({"digits/LCSC/0": better}, last, metrics=signs))
    worse = model(0.1, 10.0, 26.0, trial=38, precision=0.5)
    sentence, *_ = answer_line(report_of({"digits/LCSC/0": worse}, last, metrics=signs)).split(". ")
    assert "and worse in fid_held_out 25 → 26 and precision 0.6 → 0.5; it was chosen because its loss was " in sentence
    # by this judge, another model was the best that the user had
    average = model(0.2, 30.0, 17.0, name=TRAINER_EMA, precision=0.4)
    report = report_of({"digits/LCSC/0": better}, last, average, metrics=signs)
    sentence, *_ = answer_line(report).split(". ")
    assert "and worse in fid_held_out 17 → 18 (against the trainer's EMA); it was chosen because" in sentence


def test_an_average_is_called_one_and_the_best_file_has_its_number_too() -> None:
    """Nobody had EMA* as a file, and its number alone does not say what the epochs were worth."""
    found = {"digits/LCSC/0": measured(0.1, fid=10.0, trial=3)}
    average = measured(0.2, fid=20.0, name="EMA*")
    files = [measured(0.4, fid=40.0, name=LAST_CHECKPOINT), measured(0.3, fid=30.0, name=TRAINER_EMA)]
    line = answer_line(report_of(found, *files, average))
    assert (
        "50 % below the best average of your checkpoints, EMA*, with 20 (then comes the trainer's EMA, with 30)" in line
    )
    assert "the best average of your checkpoints, EMA*, with 20." in answer_line(report_of(found, average))


@pytest.mark.parametrize("maximized", [False, True])
def test_a_score_that_is_worse_in_the_report_says_why_it_was_chosen(maximized: bool) -> None:
    sign = -1 if maximized else 1
    found = {"digits/LCSC/0": measured(sign * 0.5, score=0.5)}
    had = measured(sign * (0.6 if maximized else 0.4), name=LAST_CHECKPOINT, score=0.6 if maximized else 0.4)
    line = answer_line(report_of(found, had, answer="LCSC, trial 0", sign=sign))
    assert f"its {'score' if maximized else 'loss'} was certainly better on the noise of the choice." in line


@pytest.mark.parametrize(("spread", "said"), [(0.01, "(25 → 18)."), (2.0, "(25 → 18, perhaps by chance).")])
def test_a_gain_against_unseen_real_images_may_be_chance(spread: float, said: str) -> None:
    groups = np.linspace(-spread, spread, GROUPS)

    def spread_out(measured: Any, sign: int) -> Any:
        without = {"fid_held_out": (tuple((measured.value("fid_held_out") + sign * groups).tolist()),)}
        return dataclasses.replace(measured, without_groups=without)

    found = {"digits/LCSC/1": spread_out(model(0.1, 10.0, 18.0), 1)}
    had = spread_out(model(0.3, 20.0, 25.0, name=LAST_CHECKPOINT), -1)
    signs = ReportedMetrics(signs={"fid": 1, "fid_held_out": 1})
    assert answer_line(report_of(found, had, metrics=signs)).endswith(said)


def test_where_nothing_better_was_found_the_line_says_so() -> None:
    found = {"digits/LCSC/0": model(0.1, 10.0, 18.0)}
    had = [model(0.3, 20.0, 25.0, name=LAST_CHECKPOINT), model(0.2, 30.0, 19.0, name=TRAINER_EMA)]
    nothing = "nothing certainly better was found"
    assert answer_line(report_of(found, had[0], answer=LAST_CHECKPOINT)).endswith(
        f"checkpoint, with fid 20: {nothing}."
    )
    reason = "perhaps by chance; the answer had the better loss on the noise of the choice."
    line = answer_line(report_of(found, *had, answer=LAST_CHECKPOINT))
    assert line.endswith(f"with fid 20: {nothing}, though the trainer's EMA has a better loss (0.2), {reason}")
    signs = ReportedMetrics(signs={"fid": 1})
    line = answer_line(report_of(found, *had, answer=TRAINER_EMA, metrics=signs))
    assert line.endswith(f"with fid 30: {nothing}, though the last checkpoint has a better fid (20), {reason}")
    close = [model(0.3, 20.0, 25.0, name=LAST_CHECKPOINT), model(0.299, 20.0, 25.0, name=TRAINER_EMA)]
    line = answer_line(report_of(found, *close, answer=LAST_CHECKPOINT))
    assert line.endswith(f"though the trainer's EMA has a better loss (0.299), {reason}")


def test_of_a_score_higher_is_better_and_negative_values_have_no_share() -> None:
    found = {"digits/LCSC/0": measured(-0.9, score=0.9)}
    line = answer_line(report_of(found, measured(-0.6, name=LAST_CHECKPOINT, score=0.6), sign=-1))
    assert line.endswith("with score 0.9: 50 % above the best model you had, the last checkpoint, with 0.6.")
    line = answer_line(report_of({"digits/LCSC/0": measured(-1.0)}, measured(2.0, name=LAST_CHECKPOINT)))
    assert line.endswith("with loss -1: against the best model you had, the last checkpoint, with 2.")


def test_that_few_real_images_were_searched_is_said_where_none_are_held_out() -> None:
    few = ReportedMetrics(few_real_images=300)
    found = {"digits/LCSC/1": measured(0.1, fid=10.0, trial=38)}
    last = measured(0.3, fid=20.0, name=LAST_CHECKPOINT)
    assert "fid 10 (against 300 real images, which the search saw, too): " in answer_line(
        report_of(found, last, metrics=few)
    )
    held_out = {"digits/LCSC/1": model(0.1, 10.0, 18.0, trial=38)}
    assert "saw, too" not in answer_line(report_of(held_out, model(0.3, 20.0, 25.0, name=LAST_CHECKPOINT), metrics=few))


def test_the_distance_to_unseen_images_stands_beside_that_of_other_real_images() -> None:
    """The best that anybody can have says how much of the way was gone."""
    floor = ReportedMetrics(signs={"fid_held_out": 1}, real_halves={"fid_held_out": 12.0}, real_count=61)
    report = report_of(
        {"digits/LCSC/1": model(0.1, 10.0, 18.0)}, model(0.3, 20.0, 25.0, name=LAST_CHECKPOINT), metrics=floor
    )
    assert answer_line(report).endswith("28 % below that model (25 → 18; 61 other real images have 12).")


def test_a_reward_that_changed_by_chance_is_said_to_have_done_so() -> None:
    error: dict[str, Any] = {f"reward{STANDARD_ERROR}": 0.1}
    had = measured(8.0, name=LAST_CHECKPOINT, fid=8.0, reward=0.7, **error)
    signs = ReportedMetrics(signs={"fid": 1, "reward": -1})
    report = report_of({"digits/LCSC/0": measured(2.0, fid=2.0, reward=0.69, **error)}, had, metrics=signs)
    assert answer_line(report).endswith("From that model to the answer: reward 0.7 → 0.69 (no certain change).")


@pytest.mark.parametrize("reward", [0.8, 0.6])
def test_the_sentence_has_the_rewards_of_both_models_once(reward: float) -> None:
    """Whoever gave a reward looks for it first; one that got worse is named as the cost already."""
    had = measured(8.0, name=LAST_CHECKPOINT, fid=8.0, reward=0.7)
    reported_metrics = ReportedMetrics(signs={"fid": 1, "reward": -1}, terms=("fid", "reward"))
    report = report_of({"digits/LCSC/0": measured(2.0, fid=2.0, reward=reward)}, had, metrics=reported_metrics)
    line = answer_line(report)
    if reward > 0.7:
        assert line.endswith("with 8. From that model to the answer: reward 0.7 → 0.8.")
    else:
        assert "and worse in reward 0.7 → 0.6; it was chosen because" in line
    assert line.count("reward") == 1
    assert picture_line(report, "answer", report.of_answer) == f"held-out fid 2, reward {reward}"
