"""A study of combined LoRA products, from the command line: what runs, and what is noticed of damaged weights."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest
import torch
import yaml

from lcsc_opt.cli import run as lcsc
from lcsc_opt.trajectory import TrajectoryWriter

STORAGE = "sqlite:///studies.db"
STUDY = "lora/LCSC/0"

OBJECTIVE = '''
from lcsc_opt.objective.contract import Objective
from lcsc_opt.base.records import Cost, Evaluation
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.lora_products import LoraProducts


class Products(Objective):
    """The squared norm of the merged factors."""

    def __init__(self, path):
        self.trajectory = LoraProducts(Trajectory.open(path))

    @property
    def steps(self):
        return self.trajectory.steps

    def evaluate(self, candidate):
        merged = self.trajectory.merge(candidate.coefficients)
        return Evaluation(float(sum(w.double().square().sum() for w in merged.values())), {}, Cost(images=1))

    def describe(self):
        return {"trajectory": self.trajectory.sha256}


def build(settings):
    return Products(settings["path"])
'''


@pytest.fixture
def study_file(workplace: Path) -> Path:
    """A study over a trajectory of three LoRAs, in the current folder."""
    generator = torch.Generator().manual_seed(0)
    with TrajectoryWriter("run.trajectory") as writer:
        for step in (1, 2, 3):
            down, up = (torch.randn(shape, generator=generator) for shape in ((2, 5), (4, 2)))
            alpha = torch.tensor(4.0)
            writer.append(
                step,
                {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up, "lora_unet_x.alpha": alpha},
            )
    Path("products.py").write_text(OBJECTIVE)
    study = {
        "name": "lora",
        "objective": {"file": "products.py", "settings": {"path": str(Path("run.trajectory").absolute())}},
        "optimizers": ["LCSC"],
        "budget": {"evaluations": 8},
    }
    Path("lora.yaml").write_text(yaml.safe_dump(study))
    return Path("lora.yaml")


def test_a_study_of_lora_products_runs_to_its_end(study_file: Path) -> None:
    assert lcsc(["run", str(study_file), "--storage", STORAGE]) == 0
    values = [trial.value for trial in optuna.load_study(study_name=STUDY, storage=STORAGE).trials]
    assert len(values) == 8
    assert None not in values
    assert lcsc(["doctor", "--deep", "--storage", STORAGE]) == 0


def test_a_study_of_lora_products_notices_that_its_weights_were_changed(
    study_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path("run.trajectory/weights.bin")
    content = bytearray(weights.read_bytes())
    content[0] ^= 1
    weights.write_bytes(content)
    later = Path("run.trajectory/manifest.json").stat().st_mtime_ns + 10**9
    os.utime(weights, ns=(later, later))
    assert lcsc(["run", str(study_file), "--storage", STORAGE]) != 0
    assert "step 1" in capsys.readouterr().err
