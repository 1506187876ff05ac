"""A maximized score is shown as it is, whatever the database has."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import optuna
import pytest
import torch
import yaml

import lcsc_opt
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.landscape import landscape_figure
from tests.commands import Typed

MODULE = """
import torch
def build():
    return torch.nn.Linear(4, 1, bias=False)
def accuracy(net, draw):
    distance = ((net.weight.detach() - torch.linspace(-1, 1, 4)) ** 2).sum()
    return {"accuracy": float(1 / (1 + distance)) - 0.001 * (draw.group == "held-out")}
"""


@pytest.fixture(scope="module")
def searched_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished searches of a maximized score."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "own_accuracy.py").write_text(MODULE)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 7):
        weight = torch.linspace(-1, 1, 4) + torch.randn(4, generator=generator)
        torch.save({"weight": weight[None]}, folder / f"net-{step}.pt")
    settings = {
        "checkpoints": "net-*.pt",
        "model": "own_accuracy:build",
        "score": "own_accuracy:accuracy",
        "maximize": True,
    }
    study = {
        "name": "up",
        "objective": {"file": "score.py", "settings": settings},
        "optimizers": ["EMAGrid", "LCSC"],
        "budget": {"evaluations": 8},
        "held_out": {"top": 2},
    }
    (folder / "up.yaml").write_text(yaml.safe_dump(study))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert lcsc(["run", "up.yaml"]) == 0
    return folder


@pytest.fixture
def database(searched_once: Path, workplace: Path) -> HistoryReader:
    """That of a copy, which is the working directory."""
    shutil.copytree(searched_once, workplace, dirs_exist_ok=True)
    return HistoryReader(open_storage("sqlite:///studies.db", write=False))


COMMANDS = [
    ["run", "up.yaml"],
    ["list"],
    ["show", "up/LCSC/0"],
    ["compare", "up"],
    ["export", "up/LCSC/0", "-o", "answer.safetensors"],
]


def test_every_command_shows_the_score(database: HistoryReader, typed: Typed) -> None:
    progress = typed("run", "up.yaml", "--seed", "1", "--optimizer", "LCSC").err
    best = optuna.load_study(study_name="up/LCSC/1", storage="sqlite:///studies.db").best_value
    assert best > 0, "the database has the score, too"
    assert f"best {best:.4g}" in progress
    assert "-0." not in progress

    best = optuna.load_study(study_name="up/LCSC/0", storage="sqlite:///studies.db").best_value
    for command in COMMANDS:
        text = "".join(typed(*command))
        assert f"{best:.4g}" in text, command
        assert f"-{best:.4g}" not in text, command
    for command in (["evaluate", "up"], ["export", "up", "-o", "of_all.safetensors"]):
        assert not re.search(r"[^+]-0\.", "".join(typed(*command))), command


def test_programs_get_the_score_and_are_told_so(database: HistoryReader, typed: Typed) -> None:
    for row in [*typed.json("list"), *typed.json("compare", "up")]:
        assert row["maximized"] is True
        assert row["held_out"] > 0
        assert row["searched"] is None or row["searched"] > 0
        score, *others = row["held_out_rows"]
        assert (score["metric"], score["sign"], others) == ("accuracy", -1, [])
        assert score["value"] == pytest.approx(row["held_out"])
    assert typed.json("show", "up/LCSC/0")["held_out"] > 0
    assert min(typed.json("evaluate", "up")["selection"].values()) > 0


def test_python_and_callbacks_get_the_score_also_of_a_search_that_is_continued(database: HistoryReader) -> None:
    called: list[tuple[float, float]] = []

    def callback(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        called.append((study.best_value, trial.value or 0.0))

    lcsc_opt.run("up.yaml", optimizers=["CMA"], seeds=[2], budget=4)
    [study] = lcsc_opt.run("up.yaml", optimizers=["CMA"], seeds=[2], callbacks=[callback])
    scores = [row["loss"] for row in study.trials]
    assert len(scores) == 8
    assert [value for _, value in called] == scores[4:]
    assert called[-1][0] == study.searched == max(scores) > 0
    assert study.held_out is not None
    assert study.held_out > 0


def test_a_landscape_shows_the_score(database: HistoryReader) -> None:
    assert lcsc(["run", "up.yaml", "optimizers=[{Landscape: {size: 5, corners: [1, 3, 6]}}]"]) == 0
    plane = database.read_study("up/Landscape/0")
    texts = [text for row in landscape_figure(database, plane, []).data[0].text for text in row]
    assert max(texts) == f"{-(plane.summary.loss or 0.0):.4g}"
