"""``lcsc init`` for each kind of checkpoints, then ``lcsc run`` on the file as it was written.

Settings that no file can tell are given to ``init``; budgets are shortened on the command line of ``run``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.cli import run as lcsc
from tests import tiny_pipelines
from tests.objectives.image_objectives import PIXELS
from tests.unet_examples import unet

OWN = "tests.objective.test_init_runs"
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.\n"


@pytest.fixture(autouse=True)
def place(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcsc_opt.exports.images.PAIRS", 40)


def init(*arguments: str) -> dict[str, Any]:
    """The study file that is written without a question, or a thing to fill in."""
    assert lcsc(["init", *arguments]) == 0
    text = Path("study.yaml").read_text(encoding="utf-8")
    assert "FILL IN" not in text, text
    return parse_yaml(text)


def runs(capsys: pytest.CaptureFixture[str], study: dict[str, Any], *, evaluations: int = 13) -> None:
    """``lcsc run`` finishes both of its searches, and reports where the file says so."""
    capsys.readouterr()
    shorter = ["--budget", str(evaluations)]
    if "held_out" in study:
        shorter += ["held_out.images=40", "held_out.top=1"]
    status = lcsc(["run", "study.yaml", *shorter])
    said = capsys.readouterr().err
    assert status == 0, said
    for optimizer in study["optimizers"]:
        (ending,) = [line for line in said.splitlines() if line.startswith(f"{study['name']}/{optimizer}/0: best")]
        assert ("held-out" in ending) == ("held_out" in study)


def real_images(folder: str, count: int = 12, side: int = 8) -> None:
    Path(folder).mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(Path(folder) / f"{index}.png")


SMALL = (f"loss={PIXELS}", "images=40", "device=cpu")  # Inception would be downloaded


def test_images(capsys: pytest.CaptureFixture[str]) -> None:
    for step in (100, 200, 300):
        unet(step).save_pretrained(Path("out") / f"checkpoint-{step}" / "unet")
    real_images("real")
    study = init("out", *SMALL, "sampler={name: dpm-solver++, steps: 2}")
    assert study["objective"]["settings"]["reference"] == "real"
    assert study["optimizers"] == ["EMAGrid", "LCSCGradient"]
    runs(capsys, study)


@pytest.mark.slow
def test_a_lora(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipelines.stable_diffusion(Path("vocabulary")).save_pretrained("base")
    for step in (100, 200):
        network = tiny_pipelines.adapted_unet(step, ["to_q"])
        tiny_pipelines.save_lora(network, Path("loras") / f"checkpoint-{step}")
    Path("captions.txt").write_text("a dog\na cat\n")
    real_images("real", side=16)
    study = init("loras", *SMALL, "sampler={steps: 1}", "batch_size=40")
    settings = study["objective"]["settings"]
    assert settings["pipeline"] == "base"
    assert settings["prompts"] == "captions.txt"
    assert settings["component"] == "lora"
    runs(capsys, study)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def losses(model: nn.Module, draw: Any) -> Tensor:
    inputs = torch.randn(draw.size, 3, generator=torch.Generator().manual_seed(draw.seed))
    return F.cross_entropy(model(inputs), (inputs.sum(1) > 0).long(), reduction="none")


def accuracy(model: nn.Module) -> float:
    inputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    return float((model(inputs).argmax(1) == (inputs.sum(1) > 0)).float().mean())


def save_classifiers() -> None:
    for step in (1, 2, 3):
        network = classifier()
        tiny_pipelines.randomize(network, step)
        Path("out").mkdir(exist_ok=True)
        save_file(network.state_dict(), Path("out") / f"step{step}.safetensors")


def test_a_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    """What makes its network, and its score, are not in the files: they are named once."""
    save_classifiers()
    study = init("out", f"model={OWN}:classifier", f"score={OWN}:losses")
    assert study["objective"]["settings"]["size"] == 500
    assert study["optimizers"] == ["EMAGrid", "LCSCGradient"]
    runs(capsys, study)


def test_a_score_of_fixed_data_without_a_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    save_classifiers()
    study = init("out", f"model={OWN}:classifier", f"score={OWN}:accuracy", "maximize=true")
    assert "held_out" not in study
    assert "size" not in study["objective"]["settings"]
    assert study["optimizers"] == ["EMAGrid", "LCSCQuadratic"]
    assert "without a graph" in Path("study.yaml").read_text()
    runs(capsys, study)


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    return torch.tanh(model(noise))


def generator() -> nn.Module:
    return nn.Conv2d(1, 1, 3, padding=1)


def test_a_bare_trajectory(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    for step in (1, 2, 3):
        network = generator()
        tiny_pipelines.randomize(network, step)
        save_file(network.state_dict(), Path("out") / f"step{step}.safetensors")
    assert lcsc(["trajectory", "pack", "out", "-o", "run.trajectory"]) == 0
    real_images("real")
    study = init("run.trajectory", f"model={OWN}:generator", f"sampler={OWN}:sample", *SMALL)
    assert study["objective"]["settings"]["image_shape"] == [1, 8, 8]
    runs(capsys, study)


def test_what_is_wrong_with_a_given_setting_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    save_classifiers()
    assert lcsc(["init", "out", f"model={OWN}:classifier", f"score={OWN}:nothing"]) == 0
    said = capsys.readouterr().err
    assert f"to be corrected: objective.settings.score: '{OWN}:nothing' cannot be imported" in said
