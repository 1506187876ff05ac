"""One experiment has one answer: whatever was added when, the model that is exported is the same to the digit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lcsc_opt
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.names import EMA
from lcsc_opt.database.report import Report
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.views.answer import answer_line
from tests.commands import Typed

PARTS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

def sample(network, noise):
    return torch.tanh(network.linear(noise.flatten(1))).reshape(noise.shape)

class Means:
    name = "means"
    dimension = 8

    def __call__(self, images):
        return images[:, 0].reshape(len(images), 8, 2).sum(dim=2)
"""
MEANS = "four_ways_parts:Means"
ALL = ("EMAGrid", "LCSC", "CMA")
Run = Callable[..., Report]


@pytest.fixture
def run(workplace: Path) -> Run:
    """Runs searches of an image experiment whose checkpoints lie around a good network; its report."""
    (workplace / "four_ways_parts.py").write_text(PARTS)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(16, 16, generator=generator) / 4
    for step in range(1, 5):
        weight = base + 0.1 * torch.randn(16, 16, generator=generator) * (1 + 1 / step)
        state = {"linear.weight": weight, "linear.bias": 0.1 * torch.randn(16, generator=generator) / step}
        torch.save(state, workplace / f"ckpt-{step:03d}.pt")
    real = torch.tanh(torch.randn(400, 16, generator=generator) @ base.T).reshape(400, 4, 4, 1)
    np.savez(workplace / "real.npz", ((real + 1) * 127.5).round().to(torch.uint8).numpy())

    def run(
        *optimizers: str, held_out: dict[str, int] | None = None, seeds: tuple[int, ...] = (0,), **more: Any
    ) -> Report:
        settings = {
            "checkpoints": "ckpt-*.pt",
            "model": "four_ways_parts:Net",
            "sampler": "four_ways_parts:sample",
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
            "seeds": list(seeds),
            "budget": {"evaluations": 5},
            "held_out": held_out or {"images": 120, "top": 4},
        }
        lcsc_opt.run(content, storage="sqlite:///studies.db")
        return report()

    return run


def report() -> Report:
    found = StoredExperiment.open(open_storage("sqlite:///studies.db", write=False), "one").report
    assert found is not None
    return found


def exported() -> dict[str, torch.Tensor]:
    assert lcsc(["export", "one", "-o", "model.safetensors"]) == 0
    return load_file("model.safetensors")


_at_once: list[tuple[Report, dict[str, torch.Tensor]]] = []


@pytest.fixture
def at_once(run: Run, workplace: Path) -> tuple[Report, dict[str, torch.Tensor]]:
    """The report of everything at once, and the model that is exported; made once for all tests."""
    if not _at_once:
        _at_once.append((run(metrics=[f"recall@{MEANS}"]), exported()))
        for file in ("studies.db", "model.safetensors"):
            (workplace / file).unlink()
    return _at_once[0]


def more_images_by_evaluate(run: Run) -> Report:
    run(metrics=[f"recall@{MEANS}"], held_out={"images": 70, "top": 4})
    assert lcsc(["evaluate", "one", "--images", "120", "--keep"]) == 0
    return report()


def everything_one_after_the_other(run: Run) -> Report:
    for optimizer in ALL:
        run(optimizer, held_out={"images": 70, "top": 1})
    run("EMAGrid", metrics=[f"recall@{MEANS}"])  # of a search that is finished
    return report()


@pytest.mark.parametrize("way", [more_images_by_evaluate, everything_one_after_the_other])
def test_the_same_experiment_exports_one_model_whatever_was_added_when(
    at_once: tuple[Report, dict[str, torch.Tensor]], run: Run, way: Callable[[Run], Report]
) -> None:
    expected, model = at_once
    found = way(run)
    assert found.to_json() == expected.to_json()
    assert answer_line(found) == answer_line(expected)
    again = exported()
    assert again.keys() == model.keys()
    assert all(torch.equal(again[name], model[name]) for name in model)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"held_out_metrics": [f"recall@{MEANS}"]}),
        ({"metrics": [f"recall@{MEANS}"]}, {"metrics": [f"precision@{MEANS}"]}),
    ],
)
def test_another_metric_is_measured_for_all_models_and_loses_none(
    run: Run, before: dict[str, Any], after: dict[str, Any]
) -> None:
    run("EMAGrid", **before)
    found = run("LCSC", "EMAGrid", **after)
    assert EMA in found.had
    [[metric]] = after.values()
    assert all(metric in measured.metrics for measured in found.models)
    assert found.found.keys() == {"one/EMAGrid/0", "one/LCSC/0"}


def by_the_study_file(run: Run, typed: Typed) -> None:
    run("LCSC", held_out={"images": 200, "top": 4})


def by_groups(run: Run, typed: Typed) -> None:
    typed("evaluate", "one", "--groups", "2", "--keep")


@pytest.mark.parametrize("more", [by_the_study_file, by_groups])
def test_no_model_wins_by_a_larger_sample(run: Run, typed: Typed, more: Callable[[Run, Typed], None]) -> None:
    run("EMAGrid", "LCSC")
    more(run, typed)
    found = run("CMA")
    assert len({(measured.images, measured.seeds) for measured in found.models}) == 1
    assert {measured.model.name for measured in found.models} == {*found.had, *found.found.values(), found.answer}
    assert found.of_answer.images * len(found.of_answer.seeds) > 120


def test_two_seeds_of_a_search_are_two_searches_of_one_report(run: Run) -> None:
    found = run("EMAGrid", "LCSC", seeds=(0, 1))
    names = {study: name.partition(", ")[0] for study, name in found.found.items() if "LCSC" in study}
    assert names == {"one/LCSC/0": "LCSC", "one/LCSC/1": "LCSC (seed 1)"}
    assert found.had.count(EMA) == 1
    assert len({measured.model.name for measured in found.models}) == len(found.models)


@pytest.mark.usefixtures("impatient")
def test_a_search_that_somebody_runs_is_in_the_report_once_it_has_ended(run: Run) -> None:
    run("EMAGrid", "LCSC")
    study = StoredStudy.open(open_storage("sqlite:///studies.db", write=True), "one/LCSC/0")
    with study.hold():
        assert run("CMA").found.keys() == {"one/EMAGrid/0", "one/CMA/0"}
    assert run("CMA").found.keys() == {"one/EMAGrid/0", "one/LCSC/0", "one/CMA/0"}
