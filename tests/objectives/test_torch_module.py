from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcsc_opt.base.catalog import load_file
from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import SEARCH, Candidate
from tests.objectives.image_objectives import build, check, one_line

MODULE = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.classes = nn.Embedding(4, 1)
        self.layers = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, 1, 1))

    def forward(self, x, labels=None):
        shift = 0 if labels is None else self.classes(labels)[:, :, None, None]
        return self.layers(x) + shift


def build(width=4):
    return Model(width)


def no_model():
    return 3


def sample(model, noise, strength=1.0):
    return torch.tanh(strength * model(noise))


def sample_twice(model, noise, labels, draw):
    return torch.tanh(model(model(noise, labels) + draw(1), labels))
"""


@pytest.fixture
def study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "users_own_model.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    from users_own_model import build as make  # type: ignore[import-not-found]

    for step in (10, 20, 30):
        torch.manual_seed(step)
        torch.save({"model": make(6).state_dict()}, folder / f"model{step:06d}.pt")
    return folder


OWN = "users_own_model"
MIX = np.array([0.5, 0.2, 0.3])
COMMON: dict[str, Any] = {
    **{"checkpoints": "model*.pt", "model": f"{OWN}:build", "model_settings": {"width": 6}},
    **{"image_shape": [1, 8, 8], "sampler": f"{OWN}:sample"},
}


def test_any_network_and_any_sampler_are_searched(study: Path) -> None:
    objective = build("torch_module.py", study, **COMMON, sampler_settings={"strength": 0.5})
    assert objective.steps == (10, 20, 30)
    # reports and recipes have this text, and settings may be places and secrets
    assert objective.samples.samplers[0].text == f"{OWN}:build, {OWN}:sample, 1 model call an image"
    check(objective)


def test_labels_and_further_noise(study: Path) -> None:
    labelled = {**COMMON, "sampler": f"{OWN}:sample_twice", "nfe": 2, "classes": 4}
    objective = build("torch_module.py", study, **labelled, labels="balanced")
    assert objective.sampler.nfe == 2
    check(objective)
    of_one_class = build("torch_module.py", study, **labelled, labels=2)
    first, other = (made.images(MIX, SEARCH, 8) for made in (objective, of_one_class))
    is_of_it = objective.sampler.noise.classes(SEARCH, 0, 8) == 2
    assert is_of_it.sum() == 2
    assert torch.equal(first[is_of_it], other[is_of_it])
    assert not torch.equal(first[~is_of_it][0], other[~is_of_it][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": f"{OWN}:no_model", "model_settings": {}}, "returned a int; expected a torch.nn.Module"),
        ({"model_settings": {"widht": 3}}, f"model_settings: {OWN}:build .*widht"),
        ({"sampler": f"{OWN}:sample_twice"}, "two settings say what the parameter labels of .* gets: classes"),
        ({"labels": "balanced"}, "two settings say what the parameter labels of .* gets: classes"),
        ({"classes": 4}, "labels: the model has 4 classes"),
        ({"classes": 4, "labels": "balanced"}, f"sampler: {OWN}:sample has no parameter labels"),
    ],
)
def test_what_does_not_fit_is_one_line(study: Path, changes: dict[str, Any], message: str) -> None:
    one_line(ObjectiveError, message, lambda: build("torch_module.py", study, **{**COMMON, **changes}))


def test_an_automatic_batch_size_changes_rounding_only(study: Path) -> None:
    number, found = (build("torch_module.py", study, **COMMON, **how) for how in ({}, {"batch_size": "auto"}))
    assert found(MIX) == pytest.approx(number(MIX), rel=1e-6)
    assert found.describe() == number.describe()


def test_a_copy_of_the_template_searches_its_model(folder: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "objectives" / "template.py", folder / "my_model.py")
    network = load_file(folder / "my_model.py").network
    for step in (1000, 2000, 3000):
        torch.manual_seed(step)
        torch.save(network(5).state_dict(), folder / f"model{step:06d}.pt")
    objective = build("my_model.py", folder, checkpoints="model*.pt", width=5)
    assert objective.steps == (1000, 2000, 3000)
    check(objective)


def test_reports_also_call_the_function_with_other_settings(study: Path) -> None:
    also = {"sampler_settings": {"strength": 2.0}, "nfe": 2}
    objective = build("torch_module.py", study, **COMMON, sampler_settings={"strength": 0.5}, also=also)
    alone = build("torch_module.py", study, **COMMON, **also)
    elsewhere = objective.evaluate(Candidate(MIX, sampler=1))
    assert elsewhere.loss == alone(MIX) != objective(MIX)
    assert elsewhere.cost.model_calls == 48
