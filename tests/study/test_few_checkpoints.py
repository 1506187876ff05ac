"""The longer step of ``LCSCGradient`` with few checkpoints: new studies store it, older ones continue without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lcsc_opt
from lcsc_opt.base.study_file import parse_study_file
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.experiment.running import searches_of
from lcsc_opt.study.planning import default_options
from lcsc_opt.views.study_status import overview

DEFAULTS = "optimizer_defaults"
TARGET = torch.tensor([[0.3, -0.2]])


@pytest.mark.parametrize(
    ("spec", "checkpoints", "has_rows", "defaults"),
    [
        ("LCSCGradient", 31, True, {"step_size": 0.2}),
        ("LCSCGradient", 32, True, {}),
        ("LCSCGradient", 31, False, {}),
        ({"LCSCGradient": {"step_size": 0.1}}, 31, True, {}),
        ({"LCSCGradient": {"images": 50}}, 31, True, {"step_size": 0.2}),
        ("CMA", 31, True, {}),
    ],
)
def test_what_a_new_study_adds(spec: object, checkpoints: int, has_rows: bool, defaults: dict[str, float]) -> None:
    content: dict[str, Any] = {"name": "few", "objective": {"file": "function.py"}, "budget": {"evaluations": 5}}
    content |= {"optimizers": [spec], "space": {"rows": "layers"} if has_rows else "affine"}
    [study] = searches_of([parse_study_file(content, source="here")])
    assert default_options(study.optimizer, study.space.rows, checkpoints) == defaults
    assert study.optimizer.with_defaults(defaults).options == {**defaults, **study.optimizer.options}


def searched(name: str, budget: int, **options: float) -> np.ndarray:
    """``[trials, S, K]``: what a search asks of three checkpoints of two layers, each with a row."""
    states = {step: {"a": torch.tensor([[1.0 / step, 0.1]]), "b": torch.tensor([[step * 1.0]])} for step in (1, 2, 3)}

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.zeros(1, 2))
            self.b = torch.nn.Parameter(torch.zeros(1, 1))

    def score(net: Net) -> torch.Tensor:
        return ((net.a - TARGET) ** 2).sum() + (net.b**2).sum()

    result = lcsc_opt.search(
        states,
        build=Net,
        score=score,
        name=name,
        rows="layers",
        budget=budget,
        optimizers=[{"LCSCGradient": options}],
        storage="sqlite:///few.db",
        resume=True,
    )
    return np.array([trial["coefficients"] for trial in result.studies[0].trials])


def test_a_study_has_the_step_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    new = searched("new", 3)
    assert (searched("long", 3, step_size=0.2) == new).all()

    study = StoredStudy.open(open_storage("sqlite:///few.db", write=True), "new/LCSCGradient/0")
    assert study.attributes[DEFAULTS] == {"step_size": 0.2}
    assert overview(study)["optimizer_options"] == {"step_size": 0.2}, "which the study file does not say"
    assert (searched("new", 5)[:3] == new).all()
