"""Evaluation metrics at the final choice: measured with a baseline, stored, warned of, and shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import HELD_OUT, SEARCH, SELECTION, Candidate, Coefficients, Cost, Evaluation, Noise
from lcsc_opt.cli import run as lcsc
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.search.held_out import HeldOutPlan, score_held_out
from lcsc_opt.views.ranking import headline, ranking
from tests.model_studies import EMA_STUDY, OBJECTIVE, STUDY, write_model_study
from tests.study_examples import coefficients, write_study

STEPS = (100, 200, 300)
PLAN = HeldOutPlan(images=20, top=1)
EMA = default_origin(STEPS)
CROSS_CHECK = "fid@cross_check"


def follows(loss: float) -> dict[str, float]:
    return {CROSS_CHECK: 2 * loss}


def cheats(loss: float) -> dict[str, float]:
    return {CROSS_CHECK: 30 - loss}


def trades(loss: float) -> dict[str, float]:
    """Where the loss falls, ``near`` falls with it, and precision does not."""
    return {"precision": min(0.2 + loss / 10, 1.0), "near": loss}


class Measured(Objective):
    """A loss that is lowest at the best trial of the studies below, and metrics that follow it or do not."""

    steps = STEPS

    def __init__(self, metrics: Callable[[float], dict[str, float]] = follows) -> None:
        self.asked: list[tuple[tuple[float, ...], str, int]] = []
        self._metrics = metrics

    @property
    def cross_check_metric(self) -> str | None:
        return CROSS_CHECK if CROSS_CHECK in self._metrics(1.0) else None

    @property
    def evaluation_metrics(self) -> Mapping[str, int]:
        return {name: -1 if name == "precision" else 1 for name in self._metrics(1.0)}

    def real_halves(self) -> Mapping[str, float]:
        return {"precision": 0.9}

    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        noise = candidate.noise
        self.asked.append((tuple(candidate.coefficients), noise.group, noise.seed))
        loss = 0.5 + float(((candidate.coefficients - coefficients(1)) ** 2).sum()) + noise.seed / 100
        return Evaluation(loss, {"fid": loss, **self._metrics(loss)}, Cost())

    def describe(self) -> dict[str, Any]:
        return {}

    def measured(self, model: Coefficients) -> list[tuple[str, int]]:
        return [(group, seed) for known, group, seed in self.asked if known == tuple(model)]


@pytest.fixture
def study(url: str) -> StoredStudy:
    return write_study(open_storage(url, write=True), STUDY, [3.0, 1.0, 2.0])


def row(report: Mapping[str, Any], metric: str) -> dict[str, Any]:
    return next(row for row in report["rows"] if row["metric"] == metric)


def test_where_no_ema_is_known_the_one_that_searches_start_from_is_measured_once(study: StoredStudy) -> None:
    objective = Measured()
    report = score_held_out(study, objective, PLAN)
    assert objective.measured(EMA) == [("held-out", 0)]
    assert {(group, seed) for _, group, seed in objective.asked} == {
        (SELECTION.group, SELECTION.seed),
        (HELD_OUT.group, HELD_OUT.seed),
    }
    found, before = row(report, CROSS_CHECK), report["baselines"]["default EMA"]["metrics"][CROSS_CHECK]
    assert (found["value"], found["against"], found["cross_check"]) == (
        report["metrics"][CROSS_CHECK],
        "default EMA",
        True,
    )
    assert (found["baseline"], found["gain"]) == (before, pytest.approx(before - found["value"]))
    assert study.attributes["held_out"] == report
    study.set_attribute("held_out", None)  # as a higher budget does
    again = Measured()
    assert score_held_out(study, again, PLAN) == report
    assert again.asked == []
    score_held_out(study, again, HeldOutPlan(images=20, top=1, groups=2))
    assert again.measured(EMA) == [("held-out", 1)]
    other = Measured()
    score_held_out(study, other, HeldOutPlan(images=30, top=1))
    assert other.measured(EMA) == [("held-out", 0)], "other images are another measurement"


def test_ema_star_comes_before_it_and_costs_nothing_where_it_was_reported(study: StoredStudy) -> None:
    grid = write_study(study.storage, EMA_STUDY, [5.0, 4.0])
    measured = score_held_out(grid, Measured(), PLAN)
    assert "baselines" not in measured, "a grid has none but itself"
    assert row(measured, CROSS_CHECK)["against"] is None
    objective = Measured()
    report = score_held_out(study, objective, PLAN)
    assert {found["against"] for found in report["rows"]} == {"EMA*"}
    assert report["baselines"]["EMA*"]["loss"] == measured["loss"]
    assert {known for known, *_ in objective.asked} == {tuple(coefficients(1))}, "no model but the answer was sampled"


def test_what_was_measured_without_a_metric_is_measured_again(study: StoredStudy) -> None:
    before = score_held_out(study, Measured(lambda _: {}), PLAN)
    assert not {"baselines", "warning"} & set(before)
    assert [found["metric"] for found in before["rows"]] == ["loss"]
    objective = Measured()
    report = score_held_out(study, objective, PLAN)
    assert objective.measured(coefficients(1)) == [("held-out", 0)], "and not chosen again"
    kept = score_held_out(study, Measured(lambda _: {}), PLAN)
    assert kept["metrics"] == report["metrics"], "what cannot be measured now is not lost"


def test_only_trials_that_compare_are_chosen_from(url: str) -> None:
    study = StoredStudy.open_or_create(
        open_storage(url, write=True), STUDY, {"steps": STEPS, "fingerprint": {"objective": {}}}
    )
    asked = [(5.0, 10, SEARCH), (0.1, 10, Noise("search", 3)), (0.2, 2, SEARCH), (4.0, 10, SEARCH)]
    for number, (loss, images, noise) in enumerate(asked[1:2]):
        key = study.add_candidate(Candidate(coefficients(number), noise=noise))
        study.finish(key, Evaluation(loss, {}, Cost(images=images)), tell_index=number, compares=False)
    with pytest.raises(StudyStoreError, match="no complete trial on the search's noise"):
        score_held_out(study, Measured(), PLAN)
    for number, (loss, images, noise) in enumerate(asked, start=1):
        key = study.add_candidate(Candidate(coefficients(number), images=images, noise=noise))
        compares = images == 10 and noise == SEARCH
        study.finish(key, Evaluation(loss, {}, Cost(images=images)), tell_index=number, compares=compares)
    assert score_held_out(study, Measured(), HeldOutPlan(images=20, top=5))["chosen_from"] == [4, 1]


def test_a_loss_in_one_metric_is_a_row_and_a_warning(study: StoredStudy, capsys: pytest.CaptureFixture[str]) -> None:
    report = score_held_out(study, Measured(trades), PLAN)
    precision, near = row(report, "precision"), row(report, "near")
    assert (precision["against"], precision["lost"], precision["real_halves"]) == ("default EMA", True, 0.9)
    assert precision["gain"] == pytest.approx(precision["value"] - precision["baseline"])
    assert (near["lost"], near["real_halves"]) == (False, None)
    assert near["gain"] == pytest.approx(near["baseline"] - near["value"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "compare the images" in line]
    assert line == f"lcsc: {STUDY}: {report['warning']}"
    assert line.endswith("search with keep: precision")


def test_groups_of_noise_give_each_its_spread(study: StoredStudy) -> None:
    precision = row(score_held_out(study, Measured(trades), HeldOutPlan(images=20, top=1, groups=3)), "precision")
    assert precision["spread"] == precision["baseline_spread"] == pytest.approx(0.001)
    assert precision["gain_spread"] == pytest.approx(0, abs=1e-12), "both move alike"


def test_show_and_compare_say_it(study: StoredStudy, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = score_held_out(study, Measured(trades), PLAN)
    capsys.readouterr()
    assert lcsc(["show", STUDY, "--storage", url]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "metric better answer default EMA gain real images" in shown
    assert "(worse) 0.9" in shown
    assert not [name for name in ("held out report", "held out rows", "seed: 0") if name in shown], "a table has them"
    for command in (["show", STUDY], ["compare", "small"]):
        assert lcsc([*command, "--storage", url, "--format", "json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        printed = printed if isinstance(printed, dict) else printed[0]
        assert printed["held_out_rows"] == report["rows"]


def test_the_headline_tells_in_how_many_seeds_it_gained_nothing(url: str) -> None:
    storage = open_storage(url, write=True)
    for seed, metrics in enumerate((cheats, follows, cheats)):
        score_held_out(write_study(storage, f"{STUDY[:-1]}{seed}", [3.0, 1.0, 2.0]), Measured(metrics), PLAN)
    (found,) = ranking(HistoryReader(storage).read("small"))
    assert (found.doubtful, found.doubted, found.seeds) == (2, (CROSS_CHECK,), 3)
    assert list(found.metrics) == [CROSS_CHECK]
    assert "but fid@cross_check gained nothing in 2 of 3 seeds: compare the images" in headline([found], "FID")


PROPERTY = """
    @property
    def cross_check_metric(self):
        return "fid@cross_check"
"""
MEASURED = OBJECTIVE.replace('metrics["kid"] = loss / 7', 'metrics["fid@cross_check"] = 9 - loss')
CHECKED_OBJECTIVE = MEASURED.replace("\n    def describe(self):", f"{PROPERTY}\n    def describe(self):")


def test_run_compare_and_evaluate_say_it(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model_study(workplace, held_out={"images": 20, "top": 1}, budget={"evaluations": 40})
    (workplace / "small_model.py").write_text(CHECKED_OBJECTIVE)
    assert lcsc(["run", str(path)]) == 0
    ran = capsys.readouterr().err
    assert lcsc(["compare", "small"]) == 0
    compared = capsys.readouterr()
    assert CROSS_CHECK in compared.out
    for text in (ran, compared.err):
        (line,) = [line for line in text.splitlines() if "compare the images" in line]
        assert f"{STUDY}: the loss is" in line
        assert "below EMA*'s, but fid@cross_check" in line
    assert lcsc(["compare", "small", "--format", "json"]) == 0
    rows = {row["study"]: row for row in json.loads(capsys.readouterr().out)}
    loss, found = rows[STUDY]["held_out_rows"][:2]
    assert (loss["value"], found["metric"], found["against"]) == (rows[STUDY]["held_out"], CROSS_CHECK, "EMA*")
    assert found["value"] == pytest.approx(9 - rows[STUDY]["held_out"])
    assert lcsc(["evaluate", STUDY]) == 0
    assert CROSS_CHECK in capsys.readouterr().out
