"""A study whose objective really merges weights, without images: quick, and everything can be exported from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from lcsc_opt.trajectory import pack

STEPS = (10, 20, 30, 40, 50)
STUDY = "small/LCSC/0"
EMA_STUDY = "small/EMAGrid/0"

Weights = Callable[[int], dict[str, Tensor]]

OBJECTIVE = '''
import time

import torch

from lcsc_opt.objective.contract import Objective, Samples
from lcsc_opt.base.records import Cost, Evaluation
from lcsc_opt.trajectory import Trajectory


class Model(Objective):
    """The distance of the merged weights to a target that depends on the noise."""

    samples = Samples(per_evaluation=10)

    def __init__(self, path, delay, network):
        self.trajectory, self.delay = Trajectory.open(path), delay
        if network is not None:
            self.sampler = type("Sampler", (), {"network": network})()

    @property
    def steps(self):
        return self.trajectory.steps

    def evaluate(self, candidate):
        time.sleep(self.delay)
        merged = self.trajectory.merge(candidate.coefficients)
        shift = {"search": 0.0, "selection": 0.01, "held-out": 0.02}[candidate.noise.group] + candidate.noise.seed / 50
        loss = float(sum((w.double() - 0.3 - shift).square().sum() for w in merged.values() if w.is_floating_point()))
        metrics = {"fid": loss}
        if candidate.noise.group != "search":
            metrics["kid"] = loss / 7
        return Evaluation(loss, metrics, Cost(images=candidate.images or 10))

    def describe(self):
        return {"trajectory": self.trajectory.sha256, "kind": "distance"}


def build(settings):
    return Model(settings["path"], settings.get("delay", 0.0), None)
'''


def state_dict(step: int) -> dict[str, Tensor]:
    """Weights, a constant, a counter."""
    generator = torch.Generator().manual_seed(step)
    return {
        "conv.weight": torch.randn(6, 5, generator=generator) * 0.3 + step / 50,
        "norm.weight": torch.randn(7, generator=generator).to(torch.bfloat16),
        "constant": torch.tensor([0.1, -0.0]),
        "steps": torch.tensor(step),
    }


def like(template: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Random weights with the names and shapes of another model."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in template.items()}


def write_checkpoints(folder: Path, weights: Weights = state_dict) -> list[Path]:
    """One safetensors file for each of :data:`STEPS`."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"model{step:06d}.safetensors" for step in STEPS]
    for step, path in zip(STEPS, paths, strict=True):
        save_file(weights(step), path)
    return paths


def write_model_study(folder: Path, *, weights: Weights = state_dict, delay: float = 0.0, **changes: object) -> Path:
    """Checkpoints in ``checkpoints/``, packed as ``run.trajectory``, the objective and the study file."""
    pack(write_checkpoints(folder / "checkpoints", weights), folder / "run.trajectory")
    (folder / "small_model.py").write_text(OBJECTIVE)
    study = {
        "name": "small",
        "objective": {
            "file": "small_model.py",
            "settings": {"path": str(folder / "run.trajectory"), "delay": delay},
        },
        "optimizers": ["EMAGrid", {"LCSC": {"mutation": 0.1}}],
        "budget": {"evaluations": 30},
        "storage": "sqlite:///studies.db",
        **changes,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(study))
    return path
