"""Judges at the final choice: measured beside a baseline, stored, warned of, and shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.search.held_out import HeldOutPlan, score_held_out
from lcsc_opt.views.ranking import headline, ranking
from tests.model_studies import STUDY
from tests.study_examples import coefficients, write_study

PLAN = HeldOutPlan(images=20, top=1)


class Traded(Objective):
    """Where the loss falls, ``near`` falls with it, and precision does not."""

    steps = (100, 200, 300)

    def __init__(self, *, judged: bool = True) -> None:
        self.evaluations, self._judged = 0, judged

    @property
    def evaluation_metrics(self) -> Mapping[str, int]:
        return {"precision": -1, "near": 1} if self._judged else {}

    def real_halves(self) -> Mapping[str, float]:
        return {"precision": 0.9}

    def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Evaluation:
        self.evaluations += 1
        loss = 0.5 + float(((candidate.coefficients - coefficients(1)) ** 2).sum()) + candidate.noise.seed / 100
        metrics = {"precision": min(0.2 + loss / 10, 1.0), "near": loss} if self._judged else {}
        return Evaluation(loss, metrics, Cost())

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def study(url: str) -> StoredStudy:
    return write_study(open_storage(url, write=True), STUDY, [3.0, 1.0, 2.0])


def test_they_stand_beside_the_baseline_and_one_warning_names_the_lost_one(
    study: StoredStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    report = score_held_out(study, Traded(), PLAN)
    precision, near = report["judges"]
    assert (precision["metric"], precision["against"], precision["lost"]) == ("precision", "default EMA", True)
    assert precision["gain"] == pytest.approx(precision["value"] - precision["baseline"])
    assert precision["floor"] == 0.9
    assert (near["lost"], near["floor"]) == (False, None)
    assert near["gain"] == pytest.approx(near["baseline"] - near["value"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "compare the images" in line]
    assert line == f"lcsc: {STUDY}: {report['warning']}"
    assert line.endswith("search with keep: precision")
    assert report["doubted"] == ["precision"]
    assert "cross_check" not in report


def test_groups_of_noise_give_each_its_spread(study: StoredStudy) -> None:
    precision, _ = score_held_out(study, Traded(), HeldOutPlan(images=20, top=1, groups=3))["judges"]
    assert precision["spread"] == pytest.approx(0.001)
    assert precision["baseline_spread"] == pytest.approx(0.001)
    assert precision["gain_spread"] == pytest.approx(0, abs=1e-12), "both move alike"


def test_what_was_measured_without_them_is_measured_again(study: StoredStudy) -> None:
    assert "judges" not in score_held_out(study, Traded(judged=False), PLAN)
    objective = Traded()
    assert "judges" in score_held_out(study, objective, PLAN)
    assert objective.evaluations == 2, "the answer and the baseline; the choice was made"


def test_show_and_compare_say_it(study: StoredStudy, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = score_held_out(study, Traded(), PLAN)
    capsys.readouterr()
    assert lcsc(["show", STUDY, "--storage", url]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "judge better answer default EMA gain real images" in shown
    assert "(worse) 0.9" in shown
    assert not [name for name in ("held out report", "cross check", "seed: 0") if name in shown], "a table has them"
    for command in (["show", STUDY], ["compare", "small"]):
        assert lcsc([*command, "--storage", url, "--format", "json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        row = printed if isinstance(printed, dict) else printed[0]
        assert row["judges"] == report["judges"]
    (ranked,) = ranking(HistoryReader(study.storage).read("small"))
    assert (ranked.doubtful, ranked.doubted) == (1, ("precision",))
    assert "(but precision gained nothing: compare the images)" in headline([ranked], "FID")
