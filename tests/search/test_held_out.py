"""The final choice: on which noise, how often, beside which baselines, and what is not measured twice."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from pathlib import Path

import optuna
import pytest
import yaml

from lcsc_opt.base.errors import SearchFailedError, StudySpecError
from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.search.held_out import DEFAULT_IMAGES, HeldOutPlan, score_held_out
from tests.model_studies import EMA_STUDY, STUDY, write_model_study

STORAGE = "sqlite:///studies.db"


class Recording(Objective):
    """Remembers what it was asked for; its loss depends on the coefficients and the noise."""

    steps = (100, 200, 300)

    def __init__(self, *, broken: object = None) -> None:
        self.asked: list[tuple[float, str, int, int | None]] = []
        self._broken = broken

    def evaluate(self, candidate: Candidate) -> Evaluation:
        noise = candidate.noise
        self.asked.append((float(candidate.coefficients[0]), noise.group, noise.seed, candidate.images))
        if self._broken in (noise.seed, float(candidate.coefficients[0])):
            raise RuntimeError("out of memory")
        loss = float((candidate.coefficients**2).sum()) + noise.seed**2
        return Evaluation(loss, {"fid": loss, "kid": loss / 2}, Cost())

    def describe(self) -> dict[str, object]:
        return {"kind": "recording"}

    def groups(self) -> list[tuple[str, int]]:
        return [(group, seed) for _, group, seed, _ in self.asked]


@pytest.fixture
def study(url: str) -> StoredStudy:
    from tests.study_examples import write_study

    return write_study(open_storage(url, write=True), STUDY, [3.0, 1.0, 2.0, None, 1.5])


def grid(study: StoredStudy, **attributes: object) -> StoredStudy:
    from tests.study_examples import write_study

    return write_study(study.storage, EMA_STUDY, [5.0, 6.0, 4.0], **attributes)  # type: ignore[arg-type]


def test_several_groups_are_reported_with_their_spread(study: StoredStudy) -> None:
    objective = Recording()
    report = score_held_out(study, objective, HeldOutPlan(images=20, top=2, groups=3))
    assert objective.groups() == [("selection", 0)] * 2 + [("held-out", 0), ("held-out", 1), ("held-out", 2)]
    assert {images for *_, images in objective.asked} == {20}
    losses = [group["loss"] for group in report["groups"]]
    assert [group["seed"] for group in report["groups"]] == [0, 1, 2]
    assert report["loss"] == pytest.approx(statistics.fmean(losses))
    assert report["metrics"]["kid"] == pytest.approx(report["loss"] / 2)
    loss, kid = report["rows"]
    assert (loss["metric"], loss["spread"]) == ("loss", pytest.approx(statistics.stdev(losses)))
    assert (kid["metric"], kid["spread"]) == ("kid", pytest.approx(loss["spread"] / 2))
    assert study.attributes["held_out"] == report


def test_more_groups_do_not_measure_the_known_ones_again(study: StoredStudy) -> None:
    first = score_held_out(study, Recording(), HeldOutPlan(images=20, top=2))
    objective = Recording()
    report = score_held_out(study, objective, HeldOutPlan(images=20, top=2, groups=2))
    assert objective.groups() == [("held-out", 1)]
    assert report["groups"][0]["loss"] == first["loss"]
    objective = Recording()
    again = score_held_out(study, objective, HeldOutPlan(images=20, top=2, groups=1, first_group=1))
    assert objective.asked == []
    assert (again["groups"][0]["seed"], again["loss"]) == (1, report["groups"][1]["loss"])
    objective = Recording()
    score_held_out(study, objective, HeldOutPlan(images=30, top=2))
    assert objective.groups() == [("selection", 0)] * 2 + [("held-out", 0)]  # other images are another measurement


def test_an_interrupted_evaluation_goes_on_where_it_was(study: StoredStudy) -> None:
    with pytest.raises(SearchFailedError, match="held-out noise: RuntimeError: out of memory"):
        score_held_out(study, Recording(broken=2), HeldOutPlan(images=20, top=2, groups=3))
    objective = Recording()
    score_held_out(study, objective, HeldOutPlan(images=20, top=2, groups=3))
    assert objective.groups() == [("held-out", 2)]


def test_ema_star_is_measured_on_the_same_noise(study: StoredStudy) -> None:
    ema = grid(study)
    before = ema.attributes, [trial.user_attrs for trial in ema.trials()]
    objective = Recording()
    plan = HeldOutPlan(images=20, top=1, groups=2, baselines=True)
    report = score_held_out(study, objective, plan)
    assert objective.groups() == [("selection", 0), *([("held-out", 0), ("held-out", 1)] * 2)]
    beside = report["baselines"]["EMA*"]
    assert (beside["label"], beside["study"], beside["trial"]) == ("EMA*", EMA_STUDY, 2)
    assert objective.asked[-1][0] == -0.5  # the coefficients of its trial 2
    assert [group["seed"] for group in beside["groups"]] == [0, 1]
    assert study.attributes["held_out"] == report
    assert (ema.attributes, [trial.user_attrs for trial in ema.trials()]) == before  # another study's lease


def test_what_the_grid_has_measured_is_taken_from_there(study: StoredStudy) -> None:
    ema = grid(study)
    score_held_out(ema, Recording(), HeldOutPlan(images=20, top=3))
    objective = Recording()
    score_held_out(study, objective, HeldOutPlan(images=20, top=1, groups=2, baselines=True))
    assert objective.groups() == [("selection", 0), ("held-out", 0), ("held-out", 1), ("held-out", 1)]


def test_without_a_grid_the_last_checkpoint_and_one_ema_stand_in(
    study: StoredStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    report = score_held_out(study, Recording(), HeldOutPlan(images=20, top=1, baselines=True))
    assert list(report["baselines"]) == ["last checkpoint", "default EMA"]
    assert report["baselines"]["last checkpoint"]["loss"] == 1.0  # coefficients 0, 0, 1
    assert "--optimizer EMAGrid" in capsys.readouterr().err


def test_a_baseline_that_fails_does_not_lose_the_report(study: StoredStudy, capsys: pytest.CaptureFixture[str]) -> None:
    grid(study)
    report = score_held_out(study, Recording(broken=-0.5), HeldOutPlan(images=20, top=1, baselines=True))
    assert report["baselines"] == {}
    assert study.attributes["held_out"] == report
    assert "out of memory; it is left out" in capsys.readouterr().err


def test_options_come_before_the_study_file_and_that_before_the_defaults(study: StoredStudy) -> None:
    assert HeldOutPlan.of(study) == HeldOutPlan(DEFAULT_IMAGES, 5, baselines=True)
    assert DEFAULT_IMAGES == 50_000
    study.set_attribute("held_out_plan", {"images": 300, "top": 2})
    assert HeldOutPlan.of(study) == HeldOutPlan(300, 2, baselines=True)
    look = HeldOutPlan(10, 1, 3, 4, baselines=True, keep=False)
    assert HeldOutPlan.of(study, images=10, top=1, groups=3, first_group=4) == look


def test_only_the_first_report_and_what_is_asked_for_is_kept(study: StoredStudy) -> None:
    study.set_attribute("held_out_plan", {"images": 300, "top": 2})
    assert HeldOutPlan.of(study, images=400).keep
    study.set_attribute("held_out", {"loss": 1.0})
    assert not HeldOutPlan.of(study, images=400).keep
    assert HeldOutPlan.of(study, images=300, keep=True).keep
    with pytest.raises(StudySpecError, match="299 images are fewer than the 300 that the study file asks for"):
        HeldOutPlan.of(study, images=299, keep=True)
    study.set_attribute("held_out_plan", None)
    assert HeldOutPlan.of(study, images=20, keep=True).keep, "nobody planned more"


def test_a_look_changes_nothing_and_is_not_measured_twice(study: StoredStudy) -> None:
    kept = score_held_out(study, Recording(), HeldOutPlan(images=20, top=2))
    before, rows = study.attributes, [dict(trial.user_attrs) for trial in study.trials()]
    look = HeldOutPlan(images=30, top=4, groups=2, baselines=True, keep=False)
    report = score_held_out(study, Recording(), look)
    assert (report["images"], len(report["chosen_from"])) == (30, 4)
    assert study.attributes["held_out"] == kept
    del before["measured"]
    assert {name: study.attributes.get(name) for name in before} == before
    for trial, known in zip(study.trials(), rows, strict=True):
        assert {name: trial.user_attrs.get(name) for name in known} == known
    again = Recording()
    assert score_held_out(study, again, look) == report
    assert again.asked == []
    assert score_held_out(study, again, dataclasses.replace(look, keep=True)) == report == study.attributes["held_out"]
    assert again.asked == []


@pytest.fixture
def finished(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert lcsc(["run", str(write_model_study(workplace))]) == 0
    capsys.readouterr()
    return workplace


def test_evaluate_prints_every_metric_and_ema_star(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lcsc(["evaluate", STUDY, "--images", "30", "--groups", "3"]) == 0
    printed = capsys.readouterr().out
    assert "30 images, noise groups 0, 1, 2" in printed
    assert re.search(r"EMA\* \(.+\): small/EMAGrid/0", printed), "which average it is"
    assert all(text in printed for text in ("loss", "kid", "±"))

    assert "held_out" not in optuna.load_study(study_name=STUDY, storage=STORAGE).user_attrs, "it was a look"
    assert lcsc(["evaluate", STUDY, "--images", "30", "--groups", "3", "--keep", "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loss"] < report["baselines"]["EMA*"]["loss"]
    assert [row["against"] for row in report["rows"]] == ["EMA*", "EMA*"]
    assert optuna.load_study(study_name=STUDY, storage=STORAGE).user_attrs["held_out"] == report


def test_evaluate_refuses_an_objective_that_has_changed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.load_study(study_name=STUDY, storage=STORAGE)
    fingerprint = study.user_attrs["fingerprint"]
    study.set_user_attr("fingerprint", {**fingerprint, "objective": {**fingerprint["objective"], "kind": "FID"}})
    assert lcsc(["evaluate", STUDY]) == 2
    assert "changed since it began: objective.kind" in capsys.readouterr().err


FLAKY = """
from pathlib import Path

from lcsc_opt.objective import Evaluation, Objective


class Flaky(Objective):
    steps = (1, 2, 3)

    def evaluate(self, candidate):
        if candidate.noise.group != "search" and not Path("seen").exists():
            Path("seen").touch()
            raise OSError("a worker died")
        return Evaluation(float(candidate.coefficients @ candidate.coefficients))

    def describe(self):
        return {}


def build(settings):
    return Flaky()
"""


@pytest.mark.parametrize(("retries", "status"), [(0, 1), (1, 0)])
def test_the_studys_own_policy_says_how_often_it_is_tried_again(workplace: Path, retries: int, status: int) -> None:
    (workplace / "flaky.py").write_text(FLAKY)
    study = {
        "name": "e",
        "objective": {"file": "flaky.py"},
        "optimizers": ["CMA"],
        "budget": {"evaluations": 3},
        "failures": {"retries": retries},
        "held_out": {"images": 2, "top": 1},
    }
    (workplace / "e.yaml").write_text(yaml.safe_dump(study))
    assert lcsc(["run", "e.yaml"]) == status
