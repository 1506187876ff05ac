"""Judges beside the baseline: gains with the right sign, what counts as lost, and the one warning."""

from __future__ import annotations

import dataclasses
import json
import statistics
from typing import Any

import pytest

from lcsc_opt.database.history import HeldOut, StudyHistory
from lcsc_opt.database.judges import CrossCheck, Judge, cross_check_of, doubted, judges_of, warning_of
from lcsc_opt.views.ranking import comparison_table, judge_table
from tests.history_examples import history

SIGNS = {"precision": -1, "near": 1}


def part(losses: list[float], **metrics: list[float]) -> dict[str, Any]:
    """Means, and a group of noise for each number."""
    groups = [
        {"seed": seed, "loss": loss, "metrics": {name: values[seed] for name, values in metrics.items()}}
        for seed, loss in enumerate(losses)
    ]
    found: dict[str, Any] = {
        "loss": statistics.fmean(losses),
        "metrics": {name: statistics.fmean(values) for name, values in metrics.items()},
        "groups": groups,
    }
    if len(losses) > 1:
        found["metrics_std"] = {name: statistics.stdev(values) for name, values in metrics.items()}
    return found


EMA = part([28.0], precision=[0.62], near=[2.87])


def judged(report: dict[str, Any]) -> tuple[Judge, ...]:
    return judges_of(report, SIGNS, "EMA*", {"near": 2.2})


def test_gains_are_positive_where_the_answer_is_better() -> None:
    report = {**part([2.5], precision=[0.64], near=[3.05]), "baselines": {"EMA*": EMA}}
    precision, near = judged(report)
    assert (precision.gain, precision.lost, precision.floor) == (pytest.approx(0.02), False, None)
    assert (near.gain, near.lost, near.floor) == (pytest.approx(-0.18), True, 2.2)
    assert (near.value, near.baseline, near.against) == (3.05, 2.87, "EMA*")


@pytest.mark.parametrize(
    ("precision", "near", "lost"),
    [(0.557, 3.05, ["precision", "near"]), (0.61, 2.9, []), (0.70, 2.5, []), (0.60, 2.87, ["precision"])],
)
def test_without_a_spread_two_per_cent_are_noise(precision: float, near: float, lost: list[str]) -> None:
    report = {**part([2.5], precision=[precision], near=[near]), "baselines": {"EMA*": EMA}}
    assert [judge.metric for judge in judged(report) if judge.lost] == lost
    assert list(doubted(report, None, judged(report))) == lost
    assert (warning_of(report, None, judged(report)) is not None) is bool(lost)


def test_what_is_as_good_as_real_images_is_not_lost() -> None:
    report = {
        **part([2.5], precision=[0.3], near=[2.1]),
        "baselines": {"EMA*": part([28.0], precision=[0.6], near=[2])},
    }
    floors = {"precision": 0.4, "near": 2.2}
    assert [judge.lost for judge in judges_of(report, SIGNS, "EMA*", floors)] == [True, False]


def test_with_groups_of_noise_the_spread_of_differences_is_the_noise() -> None:
    ema = part([28.0, 29.0], precision=[0.62, 0.64], near=[2.87, 2.80])
    report = {**part([2.5, 2.6], precision=[0.61, 0.63], near=[2.97, 2.70]), "baselines": {"EMA*": ema}}
    precision, near = judged(report)
    assert precision.gain == pytest.approx(-0.01)
    assert precision.gain_spread == pytest.approx(0, abs=1e-12)
    assert precision.lost, "a small loss, but on the same noise a certain one"
    assert (near.gain, near.lost) == (pytest.approx(0), False)
    assert near.spread == pytest.approx(statistics.stdev([2.97, 2.70]))
    assert near.baseline_spread == pytest.approx(statistics.stdev([2.87, 2.80]))


def test_the_warning_says_what_moved_and_what_to_do() -> None:
    report = {**part([2.5], precision=[0.557], near=[2.87]), "baselines": {"EMA*": EMA}}
    assert warning_of(report, None, judged(report)) == (
        "the loss is 91.1 % below EMA*'s, but precision 0.62 → 0.557: what it gained there it lost here; compare the "
        "images of both before you use it, or search with keep: precision"
    )


def test_a_search_that_kept_precision_is_not_told_to_keep_it() -> None:
    report = {**part([2.5], precision=[0.557], near=[2.87]), "baselines": {"EMA*": EMA}}
    assert (warning_of(report, None, judged(report), kept=True) or "").endswith("images of both before you use it")


def test_one_warning_tells_of_cross_check_and_judges() -> None:
    ema = part([28.0], precision=[0.62], near=[2.87], **{"fid@clip": [5.0]})
    report = {**part([2.5], precision=[0.5], near=[2.87], **{"fid@clip": [6.0]}), "baselines": {"EMA*": ema}}
    judges = judges_of(report, {**SIGNS, "fid@clip": 1}, "EMA*", {})
    cross_check = cross_check_of(report, "fid@clip", "EMA*")
    warning = warning_of(report, cross_check, judges) or ""
    assert "but fid@clip 20.0 % above and precision 0.62 → 0.5: this may please" in warning
    assert warning.count("fid@clip") == 1
    assert doubted(report, cross_check, judges) == ("fid@clip", "precision")


def test_nothing_is_doubted_where_the_loss_did_not_gain_or_nothing_is_beside_it() -> None:
    worse = part([29.0], precision=[0.1], near=[9.0])
    assert doubted({**worse, "baselines": {"EMA*": EMA}}, None, judged({**worse, "baselines": {"EMA*": EMA}})) == ()
    assert warning_of(worse, None, judged(worse)) is None
    assert judged(worse)[0] == Judge("precision", -1, 0.1)


def test_what_is_stored_is_read_again_and_shown() -> None:
    report = {**part([2.5], precision=[0.557], near=[3.05]), "baselines": {"EMA*": EMA}}
    judges = judged(report)
    stored = {**report, "judges": [dataclasses.asdict(judge) for judge in judges], "doubted": ["precision"]}
    found = HeldOut.parse(json.loads(json.dumps(stored)))
    assert found is not None
    assert (found.judges, found.doubted) == (judges, ("precision",))
    header, rows = judge_table(judges)
    assert header == ("judge", "better", "answer", "EMA*", "gain", "real images")
    assert rows == [
        ["precision", "higher", "0.557", "0.62", "-0.063 (worse)", "–"],
        ["near", "lower", "3.05", "2.87", "-0.18 (worse)", "2.2"],
    ]
    assert judge_table([Judge("near", 1, 3.0, 0.1)]) == (
        ("judge", "better", "answer"), [["near", "lower", "3 ± 0.1"]]
    )  # fmt: skip


def judged_history(optimizer: str, seed: int, **values: float) -> StudyHistory:
    judges = tuple(Judge(name, 1, value, floor=0.9 if name == "precision" else None) for name, value in values.items())
    found = HeldOut(1, 2.0 + seed, judges=judges, cross_check=CrossCheck("fid@clip", 4.0 + seed))
    return dataclasses.replace(history([3.0], optimizer=optimizer, seed=seed), held_out=found)


def test_all_optimizers_stand_in_one_table_precision_and_recall_first() -> None:
    studies = [
        judged_history("LCSC", 0, near=3.0, recall=0.8, precision=0.6),
        judged_history("LCSC", 1, near=3.2, recall=0.9, precision=0.5),
        history([9.0], optimizer="EMAGrid", held_out=8.0),
    ]
    assert comparison_table(studies) == (
        ("optimizer", "held-out FID", "precision", "recall", "near", "fid@clip"),
        [
            ["LCSC", "2.5 ± 0.71", "0.55 ± 0.071", "0.85 ± 0.071", "3.1 ± 0.14", "4.5 ± 0.71"],
            ["EMA*", "8", "–", "–", "–", "–"],
            ["real images", "–", "0.9", "–", "–", "–"],
        ],
    )
    assert comparison_table(studies[2:]) is None
