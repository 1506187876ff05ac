"""What a report warns of: costs of the answer against the best that the user had, and searches that overfitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial

from lcsc_opt.base.jackknife import GROUPS
from lcsc_opt.base.records import ReportedMetrics, Yardstick
from lcsc_opt.database.measurement import Measurement
from lcsc_opt.database.report import Part, Report
from lcsc_opt.experiment.answer import Gain
from lcsc_opt.experiment.choice import Choice
from lcsc_opt.experiment.finalists import Searched
from lcsc_opt.experiment.warnings import warnings_of
from tests.history_examples import measured, report_of

CLIP = "fid@clip"
METRICS = ReportedMetrics(signs={"fid": 1, "precision": -1, "near": 1, CLIP: 1, "fid_held_out": 1}, cross_check=CLIP)
SEARCH = "digits/LCSC/0"
Metrics = dict[str, Any]  # name → value


def report(found: Metrics, had: Metrics, *, others: Sequence[Metrics] = (), **more: Any) -> Report:
    """Of the answer and the last checkpoint, with their FID as loss; ``others`` is the same in another sampler."""
    in_parts = [_of(found, had), *(_of(*others) for _ in others[:1])]
    titles = ("DDIM, 3 model calls", "DDIM, 12 model calls")
    parts = [Part(title, one.models) for title, one in zip(titles, in_parts, strict=False)]
    found_it = in_parts[0].found[SEARCH]
    return report_of(
        {SEARCH: measured(found["fid"], **found)},
        measured(had["fid"], name="last checkpoint", **had),
        **{"parts": tuple(parts), "answer": found_it, "metrics": METRICS, **more},
    )


def _of(found: Metrics, had: Metrics) -> Report:
    last = measured(had["fid"], name="last checkpoint", **had)
    return report_of({SEARCH: measured(found["fid"], **found)}, last, metrics=METRICS)


def warned(
    made: Report,
    searches: Sequence[Searched] = (),
    yardstick: Yardstick | None = None,
    equals: Sequence[str] = (),
) -> str:
    return "\n".join(warnings_of("digits", made, choice_of(made, *equals), searches, yardstick))


def choice_of(made: Report, *equals: str, gain: float = 0.04) -> Choice:
    """The choice that chose the answer of a report, among models that cannot be told from it."""
    return Choice(made.of_answer.model, [], {}, {}, equals=equals, gain=Gain(gain, 0.03))


def test_an_improvement_in_everything_is_no_cost_and_models_that_cannot_be_told_from_it_are_named() -> None:
    better = report({"fid": 2.5, "precision": 0.7, CLIP: 4.0}, {"fid": 28.0, "precision": 0.6, CLIP: 5.0})
    assert warned(better) == ""
    equal = "cannot be told from LCSC, trial 9 and ½: they differ by less than twice their error"
    assert equal in warned(better, equals=("LCSC, trial 9", "½"))


@pytest.mark.parametrize(
    ("reported", "of_rival", "is_said"), [(0.408, 0.52, True), (0.408, 0.44, False), (0.6, 0.52, False)]
)
def test_why_a_model_that_is_ahead_in_the_report_is_not_the_answer_is_said(
    reported: float, of_rival: float, is_said: bool
) -> None:
    """The table had "lowest loss" beside another model than the answer, and no word about it."""
    answer = measured(0.479, fid=0.479, trial=9)
    rival = measured(reported, fid=reported, trial=107)
    last = measured(1.1, fid=1.1, name="last checkpoint")
    found = {SEARCH: answer, "digits/LCSCGradient/0": rival}
    made = report_of(found, last, metrics=METRICS, answer="LCSC, trial 9")
    on_its_noise = {
        "LCSC, trial 9": measured(0.452, fid=0.452, trial=9),
        "LCSCGradient, trial 107": measured(of_rival, fid=of_rival, trial=107),
    }
    choice = dataclasses.replace(choice_of(made), measured=on_its_noise)
    said = "\n".join(warnings_of("digits", made, choice, [], None))
    ahead = "has a better loss than the answer here (0.408, the answer 0.479), and had a worse one on the noise of the"
    assert (ahead in said) == is_said
    assert ("(0.52, the answer 0.452)" in said) == is_said


@pytest.mark.parametrize("is_on_path", [False, True])
@pytest.mark.parametrize("knows_errors", [False, True])
def test_what_is_said_of_equal_models_is_what_was_done(knows_errors: bool, is_on_path: bool) -> None:
    better = report({"fid": 2.5}, {"fid": 28.0})
    choice = dataclasses.replace(choice_of(better, "½"), knows_errors=knows_errors, is_on_path=is_on_path)
    [said] = warnings_of("digits", better, choice, [], None)
    assert ("twice their error" in said) == knows_errors
    assert ("their scatter between repetitions" in said) != knows_errors
    assert ("the latest model" in said) == is_on_path
    assert ("no more than one error behind" in said) == (is_on_path and knows_errors)
    assert ("no more than half of that scatter behind" in said) == (is_on_path and not knows_errors)


@pytest.mark.parametrize("held_out", [14, 50])
def test_too_few_held_out_real_images_are_said(held_out: int) -> None:
    few = dataclasses.replace(METRICS, real_count=held_out)
    better = {"fid": 2.5, "fid_held_out": 792.5}
    made = report(better, {"fid": 28.0, "fid_held_out": 752.5}, metrics=few)
    said = warned(made)
    assert ("14 real images are held out, which are too few to tell models apart by" in said) == (held_out == 14)
    assert ("fid_held_out 752.5 → 792.5" in said) == (held_out == 50)


def test_an_answer_that_is_worse_in_what_was_searched_is_a_warning() -> None:
    assert "is worse here than the last checkpoint: loss 28 → 30" in warned(report({"fid": 30.0}, {"fid": 28.0}))


def test_costs_are_named_with_both_values_and_what_to_do() -> None:
    costly = report({"fid": 2.5, "precision": 0.557, "near": 2.87}, {"fid": 28.0, "precision": 0.62, "near": 2.87})
    said = warned(costly)
    assert "precision 0.62 → 0.557" in said
    assert "search with keep: precision" in said
    signs = {"fid": 1, "recall": -1, "reward": -1}
    for terms in (("fid", "reward"), ()):
        metrics = ReportedMetrics(signs=signs, terms=terms)
        had = {"fid": 28.0, "recall": 0.42, "reward": 0.27}
        said = warned(report({"fid": 2.5, "recall": 0.02, "reward": 0.98}, had, metrics=metrics))
        assert "recall 0.42 → 0.02" in said
        assert ("search with keep: reward in place of the reward in the loss" in said) == bool(terms)
        said = warned(report({"fid": 2.5, "recall": 0.42, "reward": 0.2}, had, metrics=metrics))
        assert "reward 0.27 → 0.2. Compare images of both models before you use it, or search with keep: reward" in said
    assert "near" not in said
    kept = Yardstick({}, kept="near", bound=9.0)
    assert "search with keep" not in warned(costly, yardstick=kept)
    error = {"precision_stderr": 0.01}
    within_the_error = report({"fid": 2.5, "precision": 0.615, **error}, {"fid": 28.0, "precision": 0.62, **error})
    assert warned(within_the_error) == ""


@pytest.mark.parametrize("judge", [CLIP, "fid_held_out"])
@pytest.mark.parametrize(("value", "phrase"), [(3.9, ""), (4.0, "does not show in"), (5.0, "has a cost")])
def test_a_gain_has_to_show_in_what_no_search_saw(judge: str, value: float, phrase: str) -> None:
    said = warned(report({"fid": 2.5, judge: value}, {"fid": 28.0, judge: 4.0}))
    assert phrase in said
    assert bool(said) == bool(phrase)


def test_the_costs_are_against_the_best_that_was_there_in_the_metric_of_the_sentence() -> None:
    ema = measured(20.0, trial=1, fid=20.0, precision=0.5)
    last = measured(28.0, name="last checkpoint", fid=28.0, precision=0.9)
    found = measured(2.5, fid=2.5, precision=0.6)
    made = report_of({SEARCH: found, "digits/EMAGrid/0": ema}, last, metrics=METRICS)
    assert (made.answer, warned(made)) == ("LCSC, trial 0", "")


def test_a_gain_that_turns_in_another_sampler_is_a_warning() -> None:
    here = ({"fid": 2.5, CLIP: 84.0}, {"fid": 28.0, CLIP: 268.0})
    turned = report(*here, others=({"fid": 9.0, CLIP: 100.0}, {"fid": 10.0, CLIP: 69.0}))
    said = warned(turned)
    assert "fid@clip 69 → 100 with DDIM, 12 model calls" in said
    assert "fid@clip 268 → 84. Use it only with the sampler" in said
    error = {f"{CLIP}_stderr": 1.0}
    alike = report(*here, others=({"fid": 9.0, CLIP: 69.5, **error}, {"fid": 10.0, CLIP: 69.0, **error}))
    assert warned(alike) == ""


@pytest.mark.parametrize(("of_found", "loss", "is_said"), [(0.71, 1.25, True), (0.71, 1.9, False), (0.78, 1.25, False)])
def test_what_a_kept_metric_alone_refuses_is_said_with_both_losses_without_penalty(
    of_found: float, loss: float, is_said: bool
) -> None:
    """ "No search was better than EMA*" stood beside a model whose every distance had fallen to a third."""
    bounded = Yardstick({}, kept="reward", sign=-1, bound=0.772)
    last = measured(1.0, name="last checkpoint", fid=145.0, reward=0.771)
    found = {SEARCH: measured(loss, fid=49.0, reward=of_found)}
    made = report_of(found, last, answer="last checkpoint", metrics=ReportedMetrics(signs={"fid": 1, "reward": -1}))
    said = warned(made, [searched(0.98, optimizer="EMAGrid"), searched(1.13)], yardstick=bounded)
    assert ("is not the answer because of keep: reward is 0.71 there, beyond its bound (0.772)" in said) == is_said
    assert ("without it, the loss is 0.4469, the answer's 0.987." in said) == is_said
    assert ("no search was better than EMA*" in said) != is_said


@pytest.mark.parametrize(("bound", "is_beyond"), [(0.5, False), (0.61, True)])
def test_a_penalty_in_the_loss_of_what_the_user_had_is_said(bound: float, is_beyond: bool) -> None:
    """EMA* had a loss of 6.2, of which 5.2 were for a reward below its limit, and "98 % below EMA*" stood there."""
    made = report({"fid": 2.5, "precision": 0.65}, {"fid": 28.0, "precision": 0.60})
    said = warned(made, yardstick=Yardstick({}, kept="precision", sign=-1, bound=bound))
    penalty = (
        "keep: precision is beyond its bound (0.61) in the last checkpoint (precision 0.6), whose loss has a penalty"
    )
    assert (penalty in said) == is_beyond
    of_average = warned(made, yardstick=Yardstick({"precision": bound}, kept="precision", sign=-1, bound=bound))
    assert ("(0.61, which an average of the checkpoints has on this noise)" in of_average) == is_beyond
    error = {"precision_stderr": 0.02}
    uncertain = report({"fid": 2.5, "precision": 0.65, **error}, {"fid": 28.0, "precision": 0.60, **error})
    said = warned(uncertain, yardstick=Yardstick({}, kept="precision", sign=-1, bound=bound))
    assert ("in the last checkpoint (precision 0.6, perhaps by chance), whose" in said) == is_beyond
    last, same = (measured(28.0, name=name, fid=28.0, precision=0.6) for name in ("last checkpoint", "EMA*"))
    twice = report_of({SEARCH: measured(2.5, fid=2.5, precision=0.65)}, last, same, metrics=METRICS)
    said = warned(twice, yardstick=Yardstick({}, kept="precision", sign=-1, bound=bound))
    assert said.count("precision 0.6)") == is_beyond, "one model, whatever it is called"


@pytest.mark.parametrize(("images", "held"), [(5000, False), (500, True)])
def test_a_bound_that_was_to_be_kept_and_is_missed_beyond_its_error_is_told(images: int, held: bool) -> None:
    error = (0.6 * 0.4 / images) ** 0.5
    metrics = {"fid": 2.5, "precision": 0.60, "precision_stderr": error}
    made = report(metrics, {"fid": 28.0, "precision": 0.60})
    for bound, is_told in ((0.62, not held), (0.7, True), (0.605, False)):
        said = warned(made, yardstick=Yardstick({}, kept="precision", sign=-1, bound=bound))
        assert (
            f"keep: precision of the answer is 0.6, by more than the error beyond its bound ({bound})" in said
        ) == is_told


def searched(*losses: float, optimizer: str = "LCSC") -> Searched:
    trials = [create_trial(state=TrialState.COMPLETE, value=loss) for loss in losses]
    return Searched(f"digits/{optimizer}/0", trials)


@pytest.mark.parametrize(
    ("of_search", "advice"),
    [(3.0, "4 % better than the best you had, with an error of 3 %"), (5.0, "with more evaluations")],
)
def test_where_nothing_was_found_the_searches_were_too_short_or_overfitted(of_search: float, advice: str) -> None:
    nothing = report({"fid": 9.0}, {"fid": 8.0}, answer="last checkpoint")
    searches = [searched(4.0, optimizer="EMAGrid"), searched(of_search, 7.0)]
    assert advice in warned(nothing, searches)
    assert warned(report({"fid": 2.0}, {"fid": 8.0}), searches) == ""


def with_errors(measurement: Measurement) -> Measurement:
    """The same, with values that hardly vary between groups of images."""
    without = {
        metric: (tuple(value[0] + 0.001 * group for group in range(2 * GROUPS)),)
        for metric, value in measurement.values.items()
    }
    return dataclasses.replace(measurement, without_groups=without)


@pytest.mark.parametrize(
    ("cross_check", "judges", "is_refused"), [(9.0, (CLIP,), True), (4.0, (CLIP,), False), (9.0, (), False)]
)
def test_what_is_refused_is_said_also_where_another_model_that_was_found_is_the_answer(
    cross_check: float, judges: tuple[str, ...], is_refused: bool
) -> None:
    """One search had the answer, and another one a lower loss: people may want to look at both."""
    metrics: list[Metrics] = [{"fid": 2.0, CLIP: cross_check}, {"fid": 5.0, CLIP: 5.0}, {"fid": 8.0, CLIP: 6.0}]
    refused, chosen = (with_errors(measured(one["fid"], **one)) for one in metrics[:2])
    last = with_errors(measured(8.0, name="last checkpoint", **metrics[2]))
    text = dataclasses.replace(
        METRICS, cross_check_text="fid@clip: CLIP; what is certainly worse there is not the answer", judges=judges
    )
    made = report_of({SEARCH: refused, "digits/Grid/0": chosen}, last, metrics=text)
    made = dataclasses.replace(made, answer=made.found["digits/Grid/0"])
    said = warned(made, equals=["LCSC, trial 7"])
    assert ("has a lower loss on other noise, too, but was refused" in said) == is_refused
    assert "cannot be told from LCSC, trial 7" in said
    if is_refused:
        assert "fid@clip 5 → 9" in said
        assert "lcsc report digits shows them" in said
        assert "The cross-check is fid@clip: CLIP" in said


@pytest.mark.parametrize(
    ("found", "gain", "said"),
    [
        (9.0, -0.13, "13 % worse than the best you had, with an error of 3 %"),
        (2.0, 0.5, "but was refused: a metric that can refuse an answer is certainly worse. Compare images"),
    ],
)
def test_a_finalist_that_was_not_chosen_is_worse_on_other_noise_or_in_the_cross_check(
    found: float, gain: float, said: str
) -> None:
    nothing = report({"fid": found}, {"fid": 8.0}, answer="last checkpoint")
    searches = [searched(4.0, optimizer="EMAGrid"), searched(3.0)]
    warning = "\n".join(warnings_of("digits", nothing, choice_of(nothing, gain=gain), searches, None))
    assert said in warning
    assert ("nothing certainly better" in warning) == (gain < 0)
