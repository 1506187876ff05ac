"""``lcsc init`` for each kind of checkpoints, then ``lcsc run`` on the file as it was written.

What ``init`` would ask for is given to it; budgets are shortened on the command line of ``run``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.cli import run as lcsc
from tests import tiny_pipelines
from tests.checkpoints.nvlabs_examples import write_snapshot
from tests.metrics.examples import pixels, write_folder
from tests.objective.test_starting import diffusers_run
from tests.objectives.edm_networks import tiny
from tests.objectives.image_objectives import PIXELS

OWN = "tests.objective.test_init_runs"


pytestmark = pytest.mark.usefixtures("workplace", "few_pairs", "few_of_average")


def init(*arguments: str) -> dict[str, Any]:
    """The study file that is written, in which nothing is to be filled in."""
    assert lcsc(["init", *arguments]) == 0
    text = Path("study.yaml").read_text(encoding="utf-8")
    assert "FILL IN" not in text, text
    return parse_yaml(text)


def runs(
    capsys: pytest.CaptureFixture[str],
    study: dict[str, Any],
    *overrides: str,
    search: str = "LCSCGradient",
    has_report: bool = True,
) -> None:
    """``lcsc run`` chooses its optimizers, finishes both searches, and reports."""
    capsys.readouterr()
    shorter = ["--budget", "6", "held_out.images=8", "held_out.top=1"]
    status = lcsc(["run", "study.yaml", *shorter, *overrides])
    said = capsys.readouterr().err
    assert status == 0, said
    for optimizer in ("EMAGrid", search):
        assert f"\n{study['name']}/{optimizer}/0: best " in said
    assert (f"\n{study['name']}: The answer is " in said) == has_report


def real_images(folder: str, count: int = 8, side: int = 8) -> None:
    write_folder(Path(folder), pixels(count, side, side)[..., 0])


SMALL = (f"loss={PIXELS}", "images=8", "device=cpu")  # Inception would be downloaded


def test_images(capsys: pytest.CaptureFixture[str]) -> None:
    diffusers_run()
    real_images("real")
    study = init("diffusers", "out", "reference=real", *SMALL)
    assert study["objective"]["settings"]["sampler"] == {"steps": 50}
    runs(capsys, study, "objective.settings.sampler={steps: 1, also: {steps: 2}}")


def test_a_snapshot_of_edm(capsys: pytest.CaptureFixture[str]) -> None:
    Path("edm").mkdir()
    for step in (100, 200, 300):
        write_snapshot(Path("edm") / f"network-snapshot-{step:06d}.pkl", tiny(step, label_dim=3))
    real_images("real")
    study = init("edm", "edm", "network=tests.objectives.edm_networks:TinyPrecond", "reference=real", *SMALL)
    runs(capsys, study, "objective.settings.sampler.steps=1")


@pytest.mark.slow
def test_a_lora(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipelines.stable_diffusion(Path("vocabulary")).save_pretrained("base")
    for step in (100, 200):
        network = tiny_pipelines.adapted_unet(step, ["to_q"])
        tiny_pipelines.save_lora(network, Path("loras") / f"checkpoint-{step}")
    Path("captions.txt").write_text("a dog\na cat\n")
    real_images("real", side=16)
    answers = ("pipeline=base", "prompts=captions.txt", "guidance_scale=1", "reference=real")
    study = init("lora", "loras", *answers, *SMALL, "sampler={steps: 1}", "batch_size=40")
    runs(capsys, study)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def accuracy(model: nn.Module) -> float:
    inputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    return float((model(inputs).argmax(1) == (inputs.sum(1) > 0)).float().mean())


def save_classifiers() -> None:
    for step in (1, 2, 3):
        network = classifier()
        tiny_pipelines.randomize(network, step)
        Path("out").mkdir(exist_ok=True)
        save_file(network.state_dict(), Path("out") / f"step{step}.safetensors")


def test_a_score_of_fixed_data_without_a_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    save_classifiers()
    answers = ("maximize=true", "size=null")
    study = init("score", "out", f"model={OWN}:classifier", f"score={OWN}:accuracy", *answers)
    runs(capsys, study, search="LCSCQuadratic", has_report=False)


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
    answers = (f"sampler={OWN}:sample", "image_shape=[1, 8, 8]", "reference=real")
    study = init("module", "run.trajectory", f"model={OWN}:generator", *answers, *SMALL)
    assert study["name"] == "run"
    runs(capsys, study)
