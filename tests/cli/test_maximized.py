"""A maximized score is shown as it is, whatever the database has."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
import torch
import yaml

from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import as_known, sign_of
from lcsc_opt.database.names import LAST_CHECKPOINT
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.curves import comparison_figure
from lcsc_opt.views.ranking import headline, ranking

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
        "budget": {"evaluations": 20},
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
    ["evaluate", "up/LCSC/0"],
]


def test_every_command_shows_the_score(database: HistoryReader, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert lcsc(["run", "up.yaml", "--seed", "1", "--optimizer", "LCSC"]) == 0
    best = optuna.load_study(study_name="up/LCSC/1", storage="sqlite:///studies.db").best_value
    assert best < 0, "the database has the loss"
    progress = capfd.readouterr().err
    assert f"best {-best:.4g} in trial" in progress
    assert "-0." not in progress

    best = optuna.load_study(study_name="up/LCSC/0", storage="sqlite:///studies.db").best_value
    for command in COMMANDS:
        assert lcsc(command) == 0
        printed = capfd.readouterr()
        text = printed.out + printed.err
        assert f"{-best:.4g}" in text, command
        assert f"-{-best:.4g}" not in text, command


def test_a_comparison_shows_the_score(database: HistoryReader, capfd: pytest.CaptureFixture[str]) -> None:
    [study] = [study for study in database.read_summaries("up") if study.optimizer == "LCSC"]
    assert study.searched is not None
    capfd.readouterr()
    assert lcsc(["compare", "up"]) == 0
    table = capfd.readouterr().out
    assert f"{-study.searched:.4g}" in table
    assert f"{study.searched:.4g}" not in table


def test_programs_get_the_loss_and_are_told_so(database: HistoryReader, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert lcsc(["list", "--format", "json"]) == 0
    for row in json.loads(capfd.readouterr().out):
        assert row["maximized"] is True
        assert row["searched"] < 0


def test_rankings_and_figures_are_of_the_score(database: HistoryReader) -> None:
    studies = database.read_summaries("up")
    rows = ranking(studies)
    assert rows == sorted(rows, key=lambda row: -row.held_out.mean if row.held_out else 0.0), "the highest is first"
    assert LAST_CHECKPOINT in [row.optimizer for row in rows]
    rows = [row for row in rows if row.optimizer != LAST_CHECKPOINT]
    for row in rows:
        assert row.searched is not None
        assert row.searched.mean > 0
    study = next(study for study in studies if study.optimizer == rows[0].optimizer)
    assert study.held_out_loss is not None
    assert f"held-out score {-study.held_out_loss:.4g}" in headline(rows, study.metric)
    for trace in comparison_figure(studies).data:
        assert min(trace.y) > 0


def test_a_loss_keeps_its_sign() -> None:
    for attributes in ({}, {"fingerprint": {}}, {"fingerprint": {"objective": {"maximize": False}}}):
        assert as_known(-0.5, sign_of(attributes)) == -0.5
    assert as_known(-0.5, sign_of({"fingerprint": {"objective": {"maximize": True}}})) == 0.5
    assert as_known(None, -1) is None
