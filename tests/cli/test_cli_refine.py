"""``lcsc refine`` as a user types it: from a study file, from what a study found, and a search on what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lcsc_opt.cli import run as lcsc
from lcsc_opt.search.api import load_study
from lcsc_opt.trajectory import Trajectory
from tests.commands import Typed
from tests.objectives.image_objectives import settings

MODULE = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1))


def sample(model, noise):
    return torch.tanh(model(noise))
"""

SHORT = ["--images", "80", "images_per_step=20", "rate=0.01", "-o", "r.trajectory"]
STUDY = {"name": "tiny", "budget": {"evaluations": 9}, "held_out": {"images": 40, "top": 2}}


@pytest.fixture
def study(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (workplace / "model_to_refine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(workplace)
    from model_to_refine import build as make  # type: ignore[import-not-found]

    for step in (10, 20, 30):
        torch.manual_seed(step)
        torch.save(make().state_dict(), workplace / f"model{step:06d}.pt")
    given = settings(
        workplace,
        checkpoints="model*.pt",
        model="model_to_refine:build",
        sampler="model_to_refine:sample",
        image_shape=[1, 8, 8],
    )
    made = {**STUDY, "objective": {"file": "torch_module.py", "settings": given}, "optimizers": ["EMAGrid"]}
    Path("tiny.yaml").write_text(yaml.safe_dump(made))
    return made


def first(out: str) -> dict[str, torch.Tensor]:
    return Trajectory.open(out).checkpoint(0)


def test_a_study_file_is_refined_and_its_checkpoints_are_searched(study: dict[str, Any], typed: Typed) -> None:
    printed = typed("refine", "tiny.yaml", *SHORT, "--format", "json")
    found = json.loads(printed.out)
    assert found["refined"]["loss"] < found["start"]["loss"]
    assert found["refined"]["images"] == 40
    assert "r.safetensors: the average; r.trajectory: its checkpoints" in printed.err
    assert Trajectory.open("r.trajectory").steps == (0, 1, 2, 3, 4)
    study["objective"]["settings"]["checkpoints"] = "r.trajectory"
    Path("again.yaml").write_text(yaml.safe_dump({**study, "name": "again"}))
    assert lcsc(["run", "again.yaml"]) == 0
    assert load_study("again/EMAGrid/0").steps == (0, 1, 2, 3, 4)
    assert "exists already; give another name" in typed("refine", "tiny.yaml", *SHORT, status=2).err


@pytest.mark.usefixtures("study")
def test_it_begins_with_what_a_study_found(typed: Typed) -> None:
    command = ["refine", "tiny.yaml", *SHORT, "--from", "best"]
    assert "--from best: a study file has no best coefficients yet" in typed(*command, status=2).err
    assert lcsc(["run", "tiny.yaml"]) == 0
    assert lcsc(["run", "tiny.yaml", "--optimizer", "CMA", "--budget", "15"]) == 0
    best, ema = load_study("tiny/CMA/0"), load_study("tiny/EMAGrid/0")
    assert not np.array_equal(best.coefficients, ema.coefficients)
    for begin, expected in [("best", best), ("ema", ema)]:
        command = ["refine", "tiny/CMA/0", *SHORT[:-1], f"{begin}.trajectory", "--from", begin, "held_out=30"]
        shown = typed(*command).out
        assert all(torch.equal(first(f"{begin}.trajectory")[name], part) for name, part in expected.merge().items())
        assert "30 images of held-out noise" in shown
        assert len(shown.splitlines()) == 5  # title, header, the loss, the metrics


@pytest.mark.usefixtures("study")
def test_without_a_finished_grid_the_best_average_on_the_searchs_noise_is_taken() -> None:
    assert lcsc(["refine", "tiny.yaml", *SHORT]) == 0
    assert lcsc(["run", "tiny.yaml"]) == 0
    grid = load_study("tiny/EMAGrid/0")
    searched = min(grid.trials, key=lambda trial: trial["loss"])
    expected = grid.merge(searched["coefficients"])
    assert all(torch.equal(first("r.trajectory")[name], part) for name, part in expected.items())
    assert set(load_file("r.safetensors")) == set(expected)
