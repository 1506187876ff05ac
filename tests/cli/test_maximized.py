"""A maximized score is shown as it is, whatever the database has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import optuna
import pytest
import torch
import yaml

import lcsc_opt
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import as_known, sign_of
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.landscape import landscape_figure

MODULE = """
import torch
def build():
    return torch.nn.Linear(4, 1, bias=False)
def accuracy(net, draw):
    distance = ((net.weight.detach() - torch.linspace(-1, 1, 4)) ** 2).sum()
    return {"accuracy": float(1 / (1 + distance)) - 0.001 * (draw.group == "held-out")}
"""


@pytest.fixture
def database(workplace: Path) -> HistoryReader:
    """Of two finished searches with a maximized score."""
    (workplace / "own_accuracy.py").write_text(MODULE)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 7):
        weight = torch.linspace(-1, 1, 4) + torch.randn(4, generator=generator)
        torch.save({"weight": weight[None]}, workplace / f"net-{step}.pt")
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
    (workplace / "up.yaml").write_text(yaml.safe_dump(study))
    assert lcsc(["run", "up.yaml"]) == 0
    return HistoryReader(open_storage("sqlite:///studies.db", write=False))


COMMANDS = [
    ["run", "up.yaml"],
    ["list"],
    ["show", "up/LCSC/0"],
    ["export", "up/LCSC/0", "-o", "answer.safetensors"],
]


def test_every_command_shows_the_score(database: HistoryReader, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert lcsc(["run", "up.yaml", "--seed", "1", "--optimizer", "LCSC"]) == 0
    best = optuna.load_study(study_name="up/LCSC/1", storage="sqlite:///studies.db").best_value
    assert best > 0, "the database has the score, too"
    progress = capfd.readouterr().err
    assert f"best {best:.4g}" in progress
    assert "-0." not in progress

    best = optuna.load_study(study_name="up/LCSC/0", storage="sqlite:///studies.db").best_value
    for command in COMMANDS:
        assert lcsc(command) == 0
        printed = capfd.readouterr()
        text = printed.out + printed.err
        assert f"{best:.4g}" in text, command
        assert f"-{best:.4g}" not in text, command
    for command in (["evaluate", "up"], ["export", "up", "-o", "of_all.safetensors"]):
        assert lcsc(command) == 0
        printed = capfd.readouterr()
        assert not re.search(r"[^+]-0\.", printed.out + printed.err), command


def test_a_comparison_shows_the_score(database: HistoryReader, capfd: pytest.CaptureFixture[str]) -> None:
    [study] = [study for study in database.read("up") if study.optimizer == "LCSC"]
    assert study.lowest_loss is not None
    capfd.readouterr()
    assert lcsc(["compare", "up"]) == 0
    table = capfd.readouterr().out
    assert f"{-study.lowest_loss:.4g}" in table
    assert f"{study.lowest_loss:.4g}" not in table


def test_programs_get_the_score_and_are_told_so(database: HistoryReader, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["list"], ["compare", "up"]):
        capfd.readouterr()
        assert lcsc([*command, "--format", "json"]) == 0
        for row in json.loads(capfd.readouterr().out):
            assert row["maximized"] is True
            assert row["held_out"] > 0
            assert row["searched"] is None or row["searched"] > 0
            score, *others = row["held_out_rows"]
            assert (score["metric"], score["sign"], others) == ("accuracy", -1, [])
            assert score["value"] == pytest.approx(row["held_out"])
    capfd.readouterr()
    assert lcsc(["show", "up/LCSC/0", "--format", "json"]) == 0
    assert json.loads(capfd.readouterr().out)["held_out"] > 0
    assert lcsc(["evaluate", "up", "--format", "json"]) == 0
    assert min(json.loads(capfd.readouterr().out)["selection"].values()) > 0


def test_python_and_callbacks_get_the_score(database: HistoryReader) -> None:
    called: list[tuple[float, float]] = []

    def callback(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        called.append((study.best_value, trial.value or 0.0))

    [study] = lcsc_opt.run("up.yaml", optimizers=["LCSC"], seeds=[2], callbacks=[callback])
    scores = [row["loss"] for row in study.trials]
    assert [value for _, value in called] == scores
    assert called[-1][0] == study.searched == max(scores) > 0
    assert study.held_out is not None
    assert study.held_out > 0


def test_a_search_of_a_score_continues_as_if_nothing_had_happened(database: HistoryReader) -> None:
    [part] = lcsc_opt.run("up.yaml", optimizers=["CMA"], seeds=[3], budget=4)
    best = part.searched
    [more] = lcsc_opt.run("up.yaml", optimizers=["CMA"], seeds=[3], budget=9)
    assert more.searched is not None
    assert best is not None
    assert more.searched >= best
    assert len(more.trials) == 9


def test_a_landscape_shows_the_score(database: HistoryReader) -> None:
    assert lcsc(["run", "up.yaml", "optimizers=[{Landscape: {size: 5, corners: [1, 3, 6]}}]"]) == 0
    plane = database.read_study("up/Landscape/0")
    texts = [text for row in landscape_figure(database, plane, []).data[0].text for text in row]
    assert max(texts) == f"{-(plane.lowest_loss or 0.0):.4g}"


def test_a_loss_keeps_its_sign() -> None:
    for attributes in ({}, {"maximize": False}):
        assert as_known(-0.5, sign_of(attributes)) == -0.5
    assert as_known(-0.5, sign_of({"maximize": True})) == 0.5
    assert as_known(None, -1) is None
