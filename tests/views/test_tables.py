"""Tables of reports, as text."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.jackknife import GROUPS, half_width, standard_error
from lcsc_opt.base.records import STANDARD_ERROR, ReportedMetrics, Yardstick
from lcsc_opt.database.arrays import stored_array
from lcsc_opt.database.names import EMA, LAST_CHECKPOINT, split_name
from lcsc_opt.database.report import Part, Report
from lcsc_opt.views import unbroken
from lcsc_opt.views.ranking import Row, ranking
from lcsc_opt.views.tables import (
    BEYOND,
    WITHOUT_PENALTY,
    answers_table,
    comparison_rows,
    comparison_tables,
    grid_table,
    report_tables,
    tables_of_study,
)
from tests.history_examples import history, in_one_report, measured, report_of, trials_of

ANSWER = "LCSC, trial 0"
SIGNS = {"precision": -1, "near": 1}


def rows_of(report: Report) -> list[Row]:
    """The ranking of the searches of a report."""
    optimizers = [split_name(study)[1:] for study in report.found]
    return ranking([history([9.0], optimizer=optimizer, seed=seed, report=report) for optimizer, seed in optimizers])


def table_of(report: Report, name: str) -> tuple[tuple[str, ...], list[list[object]]]:
    """The header and the rows of the table of a model."""
    [table] = report_tables(report, name)
    return tuple(table.header), list(map(list, table.rows))


def test_a_model_is_compared_with_the_best_that_the_user_had_and_the_others_are_beside_it() -> None:
    last = measured(2.0, name=LAST_CHECKPOINT, precision=0.7)
    ema = measured(1.9, name=EMA, precision=0.62, near=2.87)
    found = {"digits/LCSC/0": measured(1.5, precision=0.557, near=3.05), "digits/CMA/0": measured(1.7, precision=0.6)}
    report = report_of(
        found, last, ema, metrics=ReportedMetrics(signs=SIGNS, real_halves={"near": 2.2}, real_count=1234)
    )
    header, texts = table_of(report, ANSWER)
    assert header == ("metric", f"answer · {ANSWER}", LAST_CHECKPOINT, "gain", EMA, "real images (1,234)")
    assert texts == [
        ["loss ↓", "1.5", "2", "+0.5", "1.9", "–"],
        ["precision ↑", "0.557", "0.7", "-0.143 (worse)", "0.62", "–"],
        ["near ↓", "3.05", "–", "–", "2.87", "2.2"],
    ]
    header, texts = table_of(report, "CMA, trial 0")
    assert header == ("metric", "CMA, trial 0", LAST_CHECKPOINT, "gain", EMA, f"answer · {ANSWER}")
    assert texts[0] == ["loss ↓", "1.7", "2", "+0.3", "1.9", "1.5"]
    alone = report_of({"digits/LCSC/0": measured(2.5, near=3.0)})
    assert table_of(alone, ANSWER) == (
        ("metric", f"answer · {ANSWER}"),
        [["loss ↓", "2.5"], ["near", "3"]],
    )


def test_intervals_are_shown_where_they_are_known() -> None:
    errors: dict[str, Any] = {f"near{STANDARD_ERROR}": 0.5}
    found = {"digits/LCSC/0": measured(2.0, near=3.0, **errors)}
    report = report_of(found, measured(5.0, name=EMA, near=6.0, **errors), metrics=ReportedMetrics(signs=SIGNS))
    header, texts = table_of(report, ANSWER)
    assert header == ("metric", f"answer · {ANSWER} [95 %]", "EMA* [95 %]", "gain [95 %]")
    assert texts == [
        ["loss ↓", "2", "5", "+3"],
        ["near ↓", "3 [2.02, 3.98]", "6 [5.02, 6.98]", "+3 [+1.61, +4.39]"],
    ]
    assert unbroken("near ↓") == "near\u00a0↓"
    assert unbroken("3 [2.02, 3.98]") == "3 [2.02,\u00a03.98]"


def test_every_term_of_a_mixed_loss_and_every_reward_has_a_column() -> None:
    values: dict[str, Any] = {"fid": 3.0, "kid": 0.2, "reward": 0.1, "near": 2.0}
    signs = {"fid": 1, "kid": 1, "reward": -1, "near": 1}
    reported = ReportedMetrics(signs=signs, terms=("fid", "kid"))
    report = report_of({"digits/LCSC/0": measured(1.5, **values)}, measured(2.0, name=EMA, **values), metrics=reported)
    [table] = comparison_tables(rows_of(report))
    assert table.header == ("model", "held-out FID", "fid ↓", "kid ↓", "reward ↑")


def test_a_comparison_begins_with_the_answer_and_has_what_judges_it_precision_and_recall() -> None:
    metrics: dict[str, Any] = {"kid": 0.1, "recall": 0.5, "fid@clip": 4.0, "fid_held_out": 3.0}
    signs = dict.fromkeys(metrics, 1) | {"recall": -1}
    real = {"fid_held_out": 1.0, "recall": 0.9}
    reported = ReportedMetrics(signs=signs, cross_check="fid@clip", real_halves=real, real_count=400)
    found = {
        "digits/EMAGrid/0": measured(8.0, **metrics),
        "digits/LCSC/0": measured(2.0, **metrics),
        "digits/LCSC/1": measured(4.0, **metrics),
    }
    report = report_of(found, measured(9.5, name=LAST_CHECKPOINT, **metrics), metrics=reported)
    [table] = comparison_tables(rows_of(report))
    assert (table.title, table.header) == (
        "Evaluation metrics, held out",
        ("model", "held-out FID", "recall ↑", "fid@clip ↓", "fid_held_out ↓"),
    )
    assert table.rows == [
        ["answer · LCSC, trial 0", "2", "0.5", "4", "3"],
        ["LCSC", "3 ± 1.4", "0.5 ± 0", "4 ± 0", "3 ± 0"],
        ["EMA*", "8", "0.5", "4", "3"],
        ["last checkpoint", "9.5", "0.5", "4", "3"],
        ["real images (400)", "–", "0.9", "–", "1"],
    ]
    of_more = dataclasses.replace(report.parts[0].models[0], images=2000)
    [table] = comparison_tables(
        rows_of(dataclasses.replace(report, parts=(Part(None, (of_more, *report.parts[0].models[1:])),)))
    )
    assert table.rows[-1][0] == "real images (only 400)", "whose distance is larger than that of more would be"
    [everything] = comparison_tables(rows_of(report), all_metrics=True)
    assert {*everything.header} - {*table.header} == {"kid ↓"}
    assert comparison_tables(rows_of(report_of({"digits/LCSC/0": measured(2.0)}))) == []
    assert comparison_tables(ranking([history([2.0])])) == tables_of_study(history([2.0])) == []


def test_a_comparison_has_the_metric_that_the_sentence_names_and_a_reward_that_no_search_uses() -> None:
    report = report_of({"digits/LCSC/0": measured(0.2, fid=4.0, kid=0.1, precision=0.5, held_out_reward=3.0)})
    [table] = comparison_tables(rows_of(report))
    assert table.header == ("model", "held-out FID", "fid", "precision", "held_out_reward")


def test_a_comparison_marks_what_a_search_lost_against_the_best_that_the_user_had() -> None:
    had: dict[str, Any] = {"fid": 3.0, "reward": 0.2, "precision": 0.7}
    signs = {"fid": 1, "reward": -1, "precision": -1}
    found = {
        "digits/LCSC/0": measured(1.0, fid=2.0, reward=0.1, precision=0.8),
        "digits/CMA/0": measured(1.5, fid=2.5, reward=0.1, precision=0.6),
        "digits/CMA/1": measured(1.7, fid=2.6, reward=0.3, precision=0.5),
    }
    worse_last = measured(9.0, name=LAST_CHECKPOINT, fid=9.0, reward=0.1, precision=0.1)
    reported = ReportedMetrics(signs=signs, terms=("fid", "reward"))
    report = report_of(found, measured(2.0, name=EMA, **had), worse_last, metrics=reported)
    [table] = comparison_tables(rows_of(report))
    assert table.title == "Evaluation metrics, held out; (worse): than EMA*, by more than the error"
    assert table.header == ("model", "held-out FID", "fid ↓", "reward ↑", "precision ↑")
    assert table.rows == [
        ["answer · LCSC, trial 0", "1", "2", "0.1 (worse)", "0.8"],
        ["CMA", "1.6 ± 0.14", "2.55 ± 0.071", "0.2 ± 0.14", "0.55 ± 0.071 (worse)"],
        ["EMA*", "2", "3", "0.2", "0.7"],
        ["last checkpoint", "9", "9", "0.1", "0.1"],
    ]


def test_rows_for_programs_end_with_the_answer_and_the_warnings() -> None:
    (study,) = in_one_report([history([3.0], held_out=2.0)], measured(5.0, name=LAST_CHECKPOINT), warnings=("it lost",))
    of_study, answer = comparison_rows([study])
    assert answer.keys() > of_study.keys()
    assert (answer["study"], answer["optimizer"], answer["model"]) == ("digits", "answer", "LCSC, trial 0")
    assert (answer["held_out"], answer["warnings"]) == (2.0, ["it lost"])
    assert [row["gain"] for row in answer["held_out_rows"]] == [3.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_grid_lists_all_that_it_tried_the_best_first_by_the_names_of_their_files(sign: int) -> None:
    """Which epoch is the second best, by how much, and whether that is certain, stood nowhere."""
    trials = trials_of([5.0, 3.0, None, 4.0, 4.0])
    alike = np.linspace(-1.0, 1.0, 20)  # what the same noise gives to all models
    apart = np.tile([0.05, -0.05], 10)  # by which one differs from the best
    columns = [None, 3.0 + alike, None, 4.0 + alike + apart, 4.0 + alike + apart]
    for trial, reward, column in zip(trials, (0.5, 0.55, None, 0.9, 0.9), columns, strict=True):
        one_hot = np.eye(4)[min(trial.number, 3)]  # two of an EMAGrid's rules may give the last checkpoint
        metrics = {"fid": 10.0 * trial.number, "reward": reward}
        trial.set_user_attr("coefficients", stored_array(one_hot))
        trial.set_user_attr("violation", None if reward is None else (0.6 - reward) / 0.04)
        trial.set_user_attr("metrics", metrics)
        if column is not None:
            trial.set_user_attr("without_groups", {"loss": stored_array(column)})
    names = ["step 10", "step 20, hat-000002", "step 30", "step 40"]
    kept = Yardstick({}, kept="reward", sign=-1, bound=0.6, loss=0.3)
    study = history([5.0], optimizer="Grid")
    study = dataclasses.replace(study, steps=(10, 20, 30, 40), checkpoint_names=names, yardstick=kept, sign=sign)
    reader: Any = SimpleNamespace(trials=lambda _study: trials)
    table = grid_table(reader, study)
    assert table is not None
    assert tuple(table.header) == ("model", "loss", "behind the best [95 %]", WITHOUT_PENALTY, "fid", "reward")
    width = half_width(standard_error(apart.tolist()), GROUPS - 1)
    assert [list(row) for row in table.rows] == [
        ["step 20, hat-000002", f"{3 * sign}", "–", f"{2.75 * sign}", "10", f"0.55 ({BEYOND}, perhaps by chance)"],
        ["last checkpoint", f"{4 * sign}", f"+1 [{1 - width:+.3g}, {1 + width:+.3g}]", f"{4 * sign}", "30", "0.9"],
        ["step 10", f"{5 * sign}", "+2", f"{4.5 * sign}", "0", f"0.5 ({BEYOND})"],
    ]
    assert "a kept metric adds a penalty to the loss" in table.title
    assert grid_table(reader, dataclasses.replace(study, optimizer="LCSC")) is None
    assert grid_table(SimpleNamespace(trials=lambda _study: []), study) is None  # type: ignore[arg-type]


def test_scores_of_different_names_stand_in_no_table() -> None:
    one = report_of({"one/LCSC/0": measured(2.0, accuracy=2.0)})
    other = report_of({"other/LCSC/0": measured(2.0, percent=2.0)})
    assert answers_table({"one": one, "again": one}) is not None
    assert answers_table({"one": one, "other": other}) is None
