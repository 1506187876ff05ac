"""The rows of a held-out report: gains with the right sign, what counts as lost, and the one warning."""

from __future__ import annotations

import dataclasses
import json
import statistics
from typing import Any

import pytest

from lcsc_opt.database.history import kept_metric
from lcsc_opt.database.report import HeldOut, MetricRow, report_rows, warning_of
from lcsc_opt.views.ranking import report_table

SIGNS = {"precision": -1, "near": 1}
CLIP = "fid@clip"


def part(losses: list[float], **metrics: list[float]) -> dict[str, Any]:
    """A group of noise for each number."""
    return {
        "groups": [
            {"seed": seed, "loss": loss, "metrics": {name: values[seed] for name, values in metrics.items()}}
            for seed, loss in enumerate(losses)
        ]
    }


EMA = part([28.0], precision=[0.62], near=[2.87])


def rows(answer: dict[str, Any], ema: dict[str, Any] = EMA, real: dict[str, float] | None = None) -> list[MetricRow]:
    measured = answer["groups"][0]["metrics"]
    signs = {name: sign for name, sign in {**SIGNS, CLIP: 1}.items() if name in measured}
    return [*report_rows({**answer, "baselines": {"EMA*": ema}}, signs, "EMA*", real, CLIP)]


def lost(found: list[MetricRow]) -> list[str]:
    return [row.metric for row in found if row.lost]


def test_gains_are_positive_where_the_answer_is_better() -> None:
    loss, precision, near = rows(part([2.5], precision=[0.64], near=[3.05]), real={"near": 2.2})
    assert (loss.metric, loss.value, loss.baseline, loss.gain) == ("loss", 2.5, 28.0, 25.5)
    assert (precision.gain, precision.lost, precision.real_halves) == (pytest.approx(0.02), False, None)
    assert (near.gain, near.lost, near.real_halves) == (pytest.approx(-0.18), True, 2.2)
    assert (near.value, near.baseline, near.against) == (3.05, 2.87, "EMA*")


@pytest.mark.parametrize(
    ("precision", "near", "expected"),
    [(0.557, 3.05, ["precision", "near"]), (0.61, 2.9, []), (0.70, 2.5, []), (0.60, 2.87, ["precision"])],
)
def test_without_a_spread_two_per_cent_are_noise(precision: float, near: float, expected: list[str]) -> None:
    found = rows(part([2.5], precision=[precision], near=[near]))
    assert lost(found) == [*HeldOut(1, 2.5, rows=tuple(found)).doubted] == expected
    assert (warning_of(found) is not None) is bool(expected)


def test_what_is_as_good_as_real_images_is_not_lost() -> None:
    ema = part([28.0], precision=[0.6], near=[2.0])
    assert lost(rows(part([2.5], precision=[0.3], near=[2.1]), ema, {"precision": 0.4, "near": 2.2})) == ["precision"]


def test_with_groups_of_noise_the_spread_of_differences_is_the_noise() -> None:
    ema = part([28.0, 29.0], precision=[0.62, 0.64], near=[2.87, 2.80])
    _, precision, near = rows(part([2.5, 2.6], precision=[0.61, 0.63], near=[2.97, 2.70]), ema)
    assert (precision.gain, precision.gain_spread) == (pytest.approx(-0.01), pytest.approx(0, abs=1e-12))
    assert precision.lost, "a small loss, but on the same noise a certain one"
    assert (near.gain, near.lost) == (pytest.approx(0), False)
    assert near.spread == pytest.approx(statistics.stdev([2.97, 2.70]))
    assert near.baseline_spread == pytest.approx(statistics.stdev([2.87, 2.80]))


def test_a_metric_of_unknown_direction_has_no_gain_and_the_loss_under_its_name_no_row() -> None:
    measured = {**part([2.5], fid=[2.5], kid=[0.1]), "baselines": {"EMA*": part([28.0], kid=[0.2])}}
    found = [(row.metric, row.sign, row.baseline, row.gain) for row in report_rows(measured, {}, "EMA*")]
    assert found == [("loss", 1, 28.0, 25.5), ("kid", None, 0.2, None)]


def test_the_warning_says_what_moved_and_what_to_do() -> None:
    found = rows(part([2.5], precision=[0.557], near=[2.87]))
    assert warning_of(found) == (
        "against EMA* the loss 28 → 2.5, but precision 0.62 → 0.557: what it gained there it lost here; compare the "
        "images of both before you use it, or search with keep: precision"
    )
    assert (warning_of(found, kept={"near": None}) or "").endswith("images of both before you use it")
    both = rows(part([2.5], precision=[0.5], **{CLIP: [6.0]}), part([28.0], precision=[0.62], **{CLIP: [5.0]}))
    assert "but fid@clip 5 → 6 and precision 0.62 → 0.5: this may please" in (warning_of(both) or "")
    assert HeldOut(1, 2.5, rows=tuple(both)).doubted == (CLIP, "precision")


@pytest.mark.parametrize(("images", "held"), [(5000, False), (500, True)])
def test_precision_that_was_to_be_kept_and_is_lost_beyond_its_error_is_told(images: int, held: bool) -> None:
    found = rows({**part([29.0], precision=[0.60], near=[2.8]), "images": images})
    line = "keep: precision did not hold: precision 0.6, {}, beyond its error; search on"
    expected = ("none" if held else line.format("against 0.62"), line.format("the bound is 0.7"), "none")
    for keep, told in zip(("precision@inception", {"precision": 0.7}, {"precision": 0.605}), expected, strict=True):
        kept = kept_metric({"objective": {"settings": {"keep": keep, "loss": {"reward": -1, "fid": 1}}}})
        assert (warning_of(found, kept=kept) or "none").startswith(told)


def test_nothing_is_doubted_if_the_loss_did_not_gain_or_nothing_compares() -> None:
    worse = part([29.0], precision=[0.1], near=[9.0])
    alone = report_rows(worse, SIGNS)
    assert warning_of(rows(worse)) is warning_of(alone) is None
    assert alone[1] == MetricRow("precision", -1, 0.1)


@pytest.mark.parametrize(
    ("losses", "others", "phrase"),
    [
        ([1.0], [3.0], None),
        ([1.0], [4.0], "fid@clip 4 → 4: this may please"),
        ([1.0], [5.0], "fid@clip 4 → 5: this"),
        ([2.0], [9.0], None),
        ([3.0], [9.0], None),
        # the noise of a group moves the answer and its baseline alike, so that differences are all but exact
        ([1.0, 1.3], [3.9, 5.9], None),
        ([1.0, 1.3], [4.1, 6.1], "fid@clip 5 → 5.1: this may please"),
        ([1.0, 1.3], [3.7, 6.2], "fid@clip 5 → 4.95: this may please"),
        ([1.9, 2.35], [4.1, 6.1], "neither is a certain gain"),
        ([1.9, 2.35], [3.9, 5.9], None),
    ],
)
def test_a_cross_check_must_gain_for_certain(losses: list[float], others: list[float], phrase: str | None) -> None:
    ema = part([2.0, 2.3], **{CLIP: [4.0, 6.0]}) if len(losses) > 1 else part([2.0], **{CLIP: [4.0]})
    found = warning_of(rows(part(losses, **{CLIP: others}), ema))
    assert found is None if phrase is None else phrase in (found or "")


def test_what_is_stored_is_read_again_and_shown() -> None:
    found = rows(part([2.5], precision=[0.557], near=[3.05]), real={"near": 2.2})
    stored = {"trial": 1, "loss": 2.5, "rows": [dataclasses.asdict(row) for row in found], "warning": "it lost"}
    report = HeldOut.parse(json.loads(json.dumps(stored)))
    assert report == HeldOut(1, 2.5, rows=tuple(found), warning="it lost")
    assert HeldOut.parse({"loss": 1.0}) == HeldOut(None, 1.0)
    header, texts = report_table(found)
    assert header == ("metric", "better", "answer", "EMA*", "gain", "real images")
    assert texts == [
        ["loss", "lower", "2.5", "28", "+25.5", "–"],
        ["precision", "higher", "0.557", "0.62", "-0.063 (worse)", "–"],
        ["near", "lower", "3.05", "2.87", "-0.18 (worse)", "2.2"],
    ]
    alone = report_table([MetricRow("near", None, 3.0, 0.1)])
    assert alone == (("metric", "better", "answer"), [["near", "–", "3 ± 0.1"]])


def test_standard_errors_are_the_spread_of_one_group_and_have_no_rows() -> None:
    answer, ema = (part([-hits], hits=[hits], hits_stderr=[error]) for hits, error in ((0.9, 0.03), (0.8, 0.04)))
    loss, hits = rows(answer, ema)
    assert (loss.metric, loss.spread, loss.baseline_spread) == ("loss", 0.03, 0.04)
    assert (hits.metric, hits.sign) == ("hits", -1), "it is the loss times -1"
    for row in (loss, hits):
        assert (row.gain, row.gain_spread) == (pytest.approx(0.1), pytest.approx(0.05))
        assert row.is_certain
    assert [row.lost for row in rows(ema, answer)] == [True, True]


def test_groups_of_noise_that_are_all_alike_are_one() -> None:
    answer = part([0.9, 0.9], error=[0.9, 0.9], error_stderr=[0.03, 0.03])
    [loss] = rows(answer, part([1.0, 1.0], error=[1.0, 1.0], error_stderr=[0.04, 0.04]))
    assert (loss.spread, loss.gain_spread) == (pytest.approx(0.03), pytest.approx(0.05))
    answer["groups"][1]["loss"] = 0.8
    [loss, _] = rows(answer, part([1.0, 0.9], error=[1.0, 0.9], error_stderr=[0.04, 0.04]))
    assert (loss.spread, loss.gain_spread) == (pytest.approx(statistics.stdev([0.9, 0.8])), pytest.approx(0, abs=1e-12))
