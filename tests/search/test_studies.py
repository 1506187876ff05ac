"""Several studies of one file, and budgets that were raised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy

MODULE = """
import os

def loss(coefficients):
    if "BROKEN" in os.environ and abs(coefficients[0]) > 1e-9:
        raise ValueError("no image")
    return float((coefficients ** 2).sum())
"""
STORAGE = "sqlite:///studies.db"


@pytest.fixture
def study_file(workplace: Path) -> str:
    (workplace / "losses_of_several.py").write_text(MODULE)
    study: dict[str, Any] = {
        "name": "several",
        "objective": {"file": "function.py", "settings": {"callable": "losses_of_several:loss", "steps": [10, 20, 30]}},
        "optimizers": ["LCSC", "CMA", "DE"],
        "budget": {"evaluations": 12},
        "failures": {"retries": 0},
    }
    (workplace / "several.yaml").write_text(yaml.safe_dump(study))
    return "several.yaml"


def states(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, int]]:
    capsys.readouterr()
    assert lcsc(["list", "--format", "json"]) == 0
    return {row["optimizer"]: (row["state"], row["evaluations"]) for row in json.loads(capsys.readouterr().out)}


def test_a_study_that_another_process_runs_does_not_stop_the_others(
    study_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lcsc(["run", study_file, "--optimizer", "CMA", "--budget", "4"]) == 0
    held = StoredStudy.open(open_storage(STORAGE, write=True), "several/CMA/0")
    capsys.readouterr()
    with held.hold():
        assert lcsc(["run", study_file]) == 1
    said = capsys.readouterr().err
    assert "several/CMA/0: is being run" in said
    assert "lcsc: 1 of 3 studies did not end: several/CMA/0" in said
    assert states(capsys) == {"LCSC": ("finished", 12), "CMA": ("finished", 4), "DE": ("finished", 12)}
    assert lcsc(["run", study_file]) == 0
    assert states(capsys)["CMA"] == ("finished", 12)


def test_a_study_that_fails_does_not_stop_the_others(
    study_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN", "1")
    assert lcsc(["run", study_file, "--budget", "3"]) == 1
    said = capsys.readouterr().err
    assert "lcsc: 3 of 3 studies did not end: several/LCSC/0, several/CMA/0, several/DE/0" in said
    assert said.count("no image") >= 3
    assert lcsc(["run", study_file, "--optimizer", "LCSC", "--seed", "1", "--budget", "3"]) == 1  # alone: its own error
    assert "studies did not end" not in capsys.readouterr().err


def test_a_study_that_has_more_than_its_file_asks_for_is_finished(
    study_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["run", study_file, "--optimizer", "LCSC"]
    assert lcsc(only) == 0
    assert lcsc(["resume", "several/LCSC/0", "--budget", "30"]) == 0
    capsys.readouterr()
    for lower in ([], ["--budget", "25"]):
        assert lcsc([*only, *lower]) == 0
        assert "finished already" in capsys.readouterr().err
    assert states(capsys)["LCSC"] == ("finished", 30)


def test_a_held_out_plan_that_is_edited_counts_from_then_on(study_file: str) -> None:
    content = yaml.safe_load(Path(study_file).read_text())
    content["objective"]["settings"]["held_out"] = content["objective"]["settings"]["callable"]
    for top, budget in ((2, 8), (4, 10)):
        edited = {**content, "optimizers": ["LCSC"], "held_out": {"top": top}, "budget": {"evaluations": budget}}
        Path(study_file).write_text(yaml.safe_dump(edited))
        assert lcsc(["run", study_file]) == 0
    assert lcsc(["resume", "several/LCSC/0", "--budget", "12"]) == 0
    report = StoredStudy.open(open_storage(STORAGE, write=False), "several/LCSC/0").attributes["held_out"]
    assert len(report["chosen_from"]) == 4
