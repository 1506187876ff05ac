"""One experiment has one answer: whatever was added when, the model that is exported is the same to the digit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lcsc_opt
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.report import Report
from tests.experiment.stored_parts import Network, sample
from tests.study_examples import stored_report

HERE = "tests.experiment.stored_parts"
MEANS = f"{HERE}:Means"
ALL = ("EMAGrid", "CMA")
Run = Callable[..., Report]


@pytest.fixture
def run(workplace: Path) -> Run:
    """Runs searches of an image experiment whose checkpoints lie around a good network; its report."""
    generator = torch.Generator().manual_seed(0)
    network = Network()
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.3, generator=generator)
    for step in range(1, 5):
        state = {
            name: weights + 0.1 * torch.randn(weights.shape, generator=generator) * (1 + 1 / step)
            for name, weights in network.state_dict().items()
        }
        torch.save(state, workplace / f"ckpt-{step:03d}.pt")
    real = sample(network, torch.randn(400, 1, 4, 4, generator=generator)).detach().reshape(400, 4, 4, 1)
    np.savez(workplace / "real.npz", ((real + 1) * 127.5).round().to(torch.uint8).numpy())

    def run(*optimizers: str, held_out: dict[str, int] | None = None, **more: Any) -> Report:
        settings = {
            "checkpoints": "ckpt-*.pt",
            "model": f"{HERE}:Network",
            "sampler": f"{HERE}:sample",
            "image_shape": [1, 4, 4],
            "nfe": 1,
            "reference": "real.npz",
            "images": 60,
            "loss": f"fid@{MEANS}",
            "held_out_metrics": [],
            **more,
        }
        content = {
            "name": "one",
            "objective": {"file": "torch_module.py", "settings": settings},
            "optimizers": list(optimizers or ALL),
            "budget": {"evaluations": 3},
            "held_out": held_out or {"images": 120, "top": 4},
        }
        lcsc_opt.run(content, storage="sqlite:///studies.db")
        return stored_report("one")

    return run


def exported() -> dict[str, torch.Tensor]:
    assert lcsc(["export", "one", "-o", "model.safetensors"]) == 0
    return load_file("model.safetensors")


def more_images_by_evaluate(run: Run) -> Report:
    run(metrics=[f"recall@{MEANS}"], held_out={"images": 70, "top": 4})
    assert lcsc(["evaluate", "one", "--images", "120", "--keep"]) == 0
    return stored_report("one")


def everything_one_after_the_other(run: Run) -> Report:
    for optimizer in ALL:
        run(optimizer, held_out={"images": 70, "top": 1})
    run("EMAGrid")  # of a search that is finished
    run("EMAGrid", metrics=[f"recall@{MEANS}"])
    return stored_report("one")


def rounded(value: Any) -> Any:
    """JSON whose numbers have nine digits: targets that are shrunk towards samples differ in the last ones."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def test_the_same_experiment_exports_one_model_whatever_was_added_when(run: Run) -> None:
    expected = run(metrics=[f"recall@{MEANS}"])
    model = exported()
    for way in (more_images_by_evaluate, everything_one_after_the_other):
        for file in ("studies.db", "model.safetensors"):
            Path(file).unlink()
        assert rounded(way(run).to_json()) == rounded(expected.to_json()), way
        again = exported()
        assert again.keys() == model.keys()
        assert all(torch.equal(again[name], model[name]) for name in model), way


def test_a_database_that_was_moved_alone_gets_its_pictures_again(
    run: Run, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where the checkpoints are gone, too, the answer stays what it was."""
    expected = run("CMA")
    folder = workplace / "studies.db.artifacts"
    pictures = sorted(path.name for path in folder.iterdir())
    shutil.rmtree(folder)
    (workplace / "real.npz").rename(workplace / "elsewhere.npz")
    assert run("CMA") == expected
    assert "they cannot be made: " in capsys.readouterr().err
    (workplace / "elsewhere.npz").rename(workplace / "real.npz")
    assert run("CMA") == expected
    assert sorted(path.name for path in folder.iterdir()) == pictures
    assert "are made again" in capsys.readouterr().err
    run("CMA")
    assert "are made again" not in capsys.readouterr().err
