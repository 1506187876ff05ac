"""A front: a study of FID alone becomes one search at each weight of near, beside the rates of EMA."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, study_names
from lcsc_opt.search.front import front_plans

OBJECTIVE = """
from pathlib import Path

import numpy as np

from lcsc_opt.base.records import Cost, Evaluation
from lcsc_opt.base.settings import FrozenModel, parse_settings
from lcsc_opt.objective.contract import Objective


class Settings(FrozenModel):
    loss: str | dict[str, float] = "fid"
    held_out_metrics: list[str] = ["precision", "recall"]
    metrics: list[str] = []
    keep: str | None = None
    other: int = 1


class Traded(Objective):
    steps = (100, 200, 300, 400, 500)

    def __init__(self, settings):
        self.settings = settings

    @property
    def images_per_evaluation(self):
        return 10

    def evaluate(self, candidate):
        if (left := Path("interrupt_after")).exists():
            if left.read_text() == "0":
                left.unlink()
                raise KeyboardInterrupt
            left.write_text(str(int(left.read_text()) - 1))
        off = {"search": 0.0, "selection": 0.01, "held-out": 0.02}[candidate.noise.group]
        fid = float(np.square(candidate.coefficients - np.linspace(-0.3, 0.7, 5)).sum()) + 1 + off
        near = float(np.square(candidate.coefficients - 0.2).sum()) + off
        values = {"fid": fid, "near": near}
        loss = self.settings.loss
        weights = {loss: 1.0} if isinstance(loss, str) else loss
        metrics = {name: values[name] for name in weights}
        if candidate.noise.group == "held-out" or "precision" in self.settings.metrics:
            metrics |= {"precision": 1 / (1 + near), "recall": 1 / (1 + fid), "fid": fid}
        cost = Cost(images=candidate.images or 10, seconds=0.1)
        return Evaluation(sum(weight * values[name] for name, weight in weights.items()), metrics, cost)

    def describe(self):
        return self.settings.model_dump()


def build(settings):
    checked = parse_settings(Settings, settings, source="objective.settings")
    with Path("built.txt").open("a") as file:
        file.write("built\\n")
    return Traded(checked)
"""
STUDY = """
name: traded
objective: {file: traded_objective.py, settings: {keep: precision, other: 2}}
optimizers: [EMAGrid, {CMA: {step_size: 0.1}}]
seeds: [3]
budget: {evaluations: 60}
held_out: {images: 30, top: 2}
"""
SOURCE = "traded/CMA/3"
WEIGHTS = ("0", "1", "9")
POINTS = [f"traded,near={weight}/CMA/3" for weight in WEIGHTS]
RATES = "traded,near=0/EMAGrid/0"
FRONT = ["front", SOURCE, "--weights", "0,1,9"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study that fronts are of."""
    folder = tmp_path_factory.mktemp("front")
    (folder / "traded_objective.py").write_text(OBJECTIVE)
    (folder / "traded.yaml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert lcsc(["run", "traded.yaml", "--optimizer", "CMA", "--storage", "sqlite:///studies.db"]) == 0
    return folder


@pytest.fixture(scope="module")
def made(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that study and its front, as a new one is printed."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(searched, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, (folder / "printed.json").open("w") as out:
        patch.chdir(folder)
        with contextlib.redirect_stdout(out):
            assert lcsc([*FRONT, "--format", "json", "--storage", "sqlite:///studies.db"]) == 0
    return folder


@pytest.fixture(autouse=True)
def place(workplace: Path, searched: Path) -> Path:
    """A copy of the study."""
    shutil.copytree(searched, workplace, dirs_exist_ok=True)
    return workplace


@pytest.fixture
def front(place: Path, made: Path) -> list[dict[str, Any]]:
    """A copy of the study and its front; the rows that were printed."""
    shutil.copytree(made, place, dirs_exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(Path("printed.json").read_text())
    return rows


def stored(name: str) -> StoredStudy:
    return StoredStudy.open(open_storage("sqlite:///studies.db", write=False), name)


def studies() -> list[str]:
    return sorted(study_names(open_storage("sqlite:///studies.db", write=False)))


def printed(capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert lcsc([*FRONT, "--format", "json", *more]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_a_front_is_one_search_for_each_weight_and_the_rates_of_ema(front: list[dict[str, Any]]) -> None:
    assert studies() == sorted([SOURCE, RATES, *POINTS])
    searched, rates = front[:3], front[3:]
    assert [row["study"] for row in searched] == POINTS
    assert [row["shown"] for row in searched] == ["near=0", "near=1", "near=9"]
    assert {(row["images"], row["noise"]) for row in searched} == {(30, "held-out")}
    assert {(row["study"], row["images"], row["noise"]) for row in rates} == {(RATES, 30, "selection")}
    fids, precisions = ([row[name] for row in searched] for name in ("fid", "precision"))
    assert fids == sorted(fids), "a larger weight costs FID"
    assert precisions == sorted(precisions), "and buys precision"
    assert fids[0] < fids[2]
    assert precisions[0] < precisions[2]


def test_the_numbers_are_those_of_the_models_that_export_would_write(front: list[dict[str, Any]]) -> None:
    for row in front[:3]:
        report = stored(row["study"]).attributes["held_out"]
        assert row["trial"] == report["trial"]
        assert (row["fid"], row["recall"]) == (report["metrics"]["fid"], report["metrics"]["recall"])
    grid = stored(RATES)
    by_number = {trial.number: trial.user_attrs for trial in grid.trials()}
    assert len(front[3:]) == len(by_number) == 10
    for row in front[3:]:
        assert row["precision"] == by_number[row["trial"]]["selection"]["metrics"]["precision"]
        assert by_number[row["trial"]]["coefficients"][-1] == pytest.approx(1 - row["place"] ** 100)


def test_settings_but_the_loss_are_the_studys(front: list[dict[str, Any]]) -> None:
    settings = [stored(name).attributes["specification"]["objective"]["settings"] for name in POINTS]
    assert [known["loss"] for known in settings] == [{"fid": 1.0}, {"fid": 1.0, "near": 1.0}, {"fid": 1.0, "near": 9.0}]
    assert all(known["other"] == 2 and "keep" not in known for known in settings)
    assert {len(stored(name).trials()) for name in POINTS} == {60}


def test_run_again_it_continues_and_evaluates_nothing_twice(
    front: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    built = Path("built.txt").read_text()
    before = stored(POINTS[1]).trials()
    assert printed(capsys) == front
    assert Path("built.txt").read_text() == built, "what is finished loads no objective"
    assert lcsc([*FRONT[:-1], "0,1,3", "--budget", "70"]) == 0
    names = [*POINTS, POINTS[0].replace("near=0", "near=3")]
    assert [len(stored(name).trials()) for name in names] == [70, 70, 60, 70]
    assert [trial.value for trial in stored(POINTS[1]).trials()[:60]] == [trial.value for trial in before]


def test_after_ctrl_c_the_same_command_gives_the_same_front(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for finished in ("5", "40", "70"):
        Path("interrupt_after").write_text(finished)
        assert lcsc(FRONT) == 130
    assert printed(capsys) == json.loads((made / "printed.json").read_text())
    assert [len(stored(name).trials()) for name in POINTS] == [60, 60, 60]


def test_a_point_of_a_front_gives_the_same_front(front: list[dict[str, Any]]) -> None:
    weights = [float(weight) for weight in WEIGHTS]
    plans = [front_plans(stored(name), weights) for name in (SOURCE, POINTS[2])]
    assert [plan.specification() for plan in plans[0]] == [plan.specification() for plan in plans[1]]
    assert [plan.name for plan in plans[0]] == [plan.name for plan in plans[1]] == [RATES, *POINTS]


def test_a_dry_run_shows_what_would_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert lcsc([*FRONT, "--dry-run", "--budget", "20"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [RATES, *POINTS]
    assert studies() == [SOURCE]


def test_the_table_names_the_studies_and_says_what_is_reached_at_the_precision_of_ema(
    front: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert lcsc(FRONT) == 0
    shown = capsys.readouterr()
    assert "front of traded" in shown.out
    assert all(name in shown.out for name in (RATES, *POINTS))
    assert shown.out.count("(EMA*)") == 1
    assert "EMA*'s precision" in shown.err


def test_it_is_drawn_with_the_study_of_each_mark(front: list[dict[str, Any]]) -> None:
    assert lcsc([*FRONT, "--plot", "front.json"]) == 0
    traces = json.loads(Path("front.json").read_text())["data"]
    assert [(trace["name"], trace["xaxis"], trace["yaxis"]) for trace in traces] == [
        (name, f"x{axis}", f"y{axis}") for name in ("CMA, near", "plain averages") for axis in ("", "2")
    ]
    assert traces[0]["text"] == list(WEIGHTS)
    for name, (hover,) in zip(POINTS, traces[0]["customdata"], strict=True):
        assert hover.startswith(f"<b>{name}</b>, trial {stored(name).attributes['held_out']['trial']}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "0,three"], "--weights: expected numbers with commas between, got '0,three'"),
        (["--weights", "0,-1"], "--weights: expected different numbers from 0, as 0,3,6,12, got 0,-1"),
        (["--weights", "3,3.0"], "got 3,3"),
        (["--weights", "nan"], "got nan"),
        (["--term", "far"], "--term: expected near or hinge, got 'far'"),
        (["--plot", "front.gif"], "front.gif: expected a file that ends in .png, .svg, .pdf, .html or .json"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_run(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert lcsc(["front", SOURCE, *arguments]) == 2
    assert said in capsys.readouterr().err
    assert studies() == [SOURCE]


def test_a_baseline_and_a_loss_without_anything_to_trade_have_no_front() -> None:
    assert lcsc(["run", "traded.yaml", "--optimizer", "EMAGrid"]) == 0
    with pytest.raises(StudySpecError, match="traded/EMAGrid/3: is a baseline"):
        front_plans(stored("traded/EMAGrid/3"))
    alone = ["name=alone", "objective.settings.loss=near", "--optimizer", "CMA", "--budget", "4"]
    assert lcsc(["run", "traded.yaml", *alone]) == 0
    with pytest.raises(StudySpecError, match="has no front"):
        front_plans(stored("alone/CMA/3"))


def test_an_objective_without_the_setting_is_refused_before_anything_is_run(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = OBJECTIVE.replace('    loss: str | dict[str, float] = "fid"\n', "").replace("self.settings.loss", '"fid"')
    (workplace / "plain_objective.py").write_text(text)
    plain = ["name=plain", "objective.file=plain_objective.py", "--optimizer", "CMA", "--budget", "4"]
    assert lcsc(["run", "traded.yaml", *plain]) == 0
    capsys.readouterr()
    assert lcsc(["front", "plain/CMA/3"]) == 2
    assert "objective.settings: loss: unknown key" in capsys.readouterr().err
    assert "plain,near=0/CMA/3" not in studies()
