"""What a rehearsal finds before the first trial, and what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from optuna.trial import TrialState

from lcsc_opt import load_study
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.exports.grid import COLUMNS
from lcsc_opt.objective.merge_sample_score import REHEARSED, MergeSampleScore
from tests.commands import Typed
from tests.objectives.image_objectives import PIXELS

PARTS = """
import importlib
from pathlib import Path
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))

def score(model, draw):
    return float(Path(f"{draw.group}.txt").read_text())

def score_while_another_begins(model, draw):
    from lcsc_opt.database.connection import open_storage
    from lcsc_opt.database.store import StoredStudy
    StoredStudy.open_or_create(open_storage("sqlite:///studies.db", write=True), "scored/LCSC/0", {"specification": {}})
    return 0.5

def broken(model, draw):
    raise KeyError("los")
"""


@pytest.fixture(autouse=True)
def any_duration_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcsc_opt.experiment.rehearsal.NOTICED_SECONDS", 0.0)


@pytest.fixture
def scored(workplace: Path) -> Path:
    (workplace / "scored_parts.py").write_text(PARTS)
    for step in (10, 20, 30):
        torch.save({"weight": torch.full((4,), float(step))}, workplace / f"model{step}.pt")
    for group in ("search", "held-out"):
        (workplace / f"{group}.txt").write_text("0.5")
    settings = {
        "checkpoints": "model*.pt",
        "model": "scored_parts:Net",
        "score": "scored_parts:score",
    }
    study = {
        "name": "scored",
        "objective": {"file": "score.py", "settings": settings},
        "optimizers": ["LCSC"],
        "budget": {"evaluations": 3},
        "failures": {"retries": 0},
        "held_out": {"images": 2},
    }
    (workplace / "scored.yaml").write_text(yaml.safe_dump(study))
    return workplace


def test_data_that_only_the_report_needs_are_asked_for_before_the_search(scored: Path, typed: Typed) -> None:
    run = ("run", "scored.yaml")
    dry = (*run, "--dry-run")
    for command in (dry, run):
        said = typed(*command, status=2).err
        assert "scored: the first evaluation failed (selection noise): " in said
        assert "selection.txt" in said
    (scored / "selection.txt").write_text("0.5")
    assert "scored: a trial takes about" in typed(*dry).err
    assert not (scored / "studies.db").exists()
    assert "with score 0.5" in typed(*run).err


def test_a_study_that_another_process_makes_during_the_rehearsal_is_not_run(scored: Path, typed: Typed) -> None:
    late = "objective.settings.score=scored_parts:score_while_another_begins"
    assert "another process has just changed it" in typed("run", "scored.yaml", "~held_out", late, status=2).err


def test_what_is_broken_is_refused_before_anything_is_stored(scored: Path, typed: Typed) -> None:
    run = ("run", "scored.yaml", "~held_out")
    two = "optimizers=[LCSC, CMA]"
    said = typed(*run, "objective.settings.score=scored_parts:broken", two, status=2).err
    assert "database: " not in said, "there is none"
    assert said.count("scored: the first evaluation failed (search noise): KeyError: 'los'") == 1
    assert "in broken" in said
    assert not (scored / "studies.db").exists()
    assert "after 3 evaluations" in typed(*run).err


GRADIENTS = """
import torch

def net():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))

@torch.no_grad()
def without_graph(model, noise):
    return model(noise).tanh()

def of_other_channels(model, noise):
    return model(noise)[:, :2]

class Broken(torch.autograd.Function):
    @staticmethod
    def forward(context, images):
        return images.clone()

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("no way back")

def without_backward(model, noise):
    return Broken.apply(model(noise).tanh())

def not_finite(model, noise):
    return model(noise) * float("nan")

def sample(model, noise):
    with open("sampled.txt", "a") as file:
        file.write(f"{len(noise)}\\n")
    return model(noise).tanh()
"""


@pytest.fixture
def sampled(workplace: Path) -> Path:
    """A study of EMAGrid, then LCSCGradient, of images."""
    (workplace / "sampled_parts.py").write_text(GRADIENTS)
    images = torch.randint(0, 256, (40, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.savez(workplace / "real.npz", arr_0=images.numpy())
    for step in (10, 20, 30):
        torch.manual_seed(step)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))
        torch.save(network.state_dict(), workplace / f"model{step}.pt")
    settings = {
        "checkpoints": "model*.pt",
        "model": "sampled_parts:net",
        "sampler": "sampled_parts:sample",
        "image_shape": [3, 8, 8],
        "nfe": 1,
        "reference": "real.npz",
        "loss": PIXELS,
        "images": 40,
        "held_out_metrics": [],
    }
    study = {
        "name": "sampled",
        "objective": {"file": "torch_module.py", "settings": settings},
        "optimizers": ["EMAGrid", "LCSCGradient"],
        "budget": {"evaluations": 2},
        "held_out": {"images": 40, "top": 1},
    }
    (workplace / "sampled.yaml").write_text(yaml.safe_dump(study))
    return workplace


@pytest.mark.parametrize(
    ("change", "reason", "options"),
    [
        ("sampler=sampled_parts:without_graph", "have no autograd graph", []),
        ("sampler=sampled_parts:without_backward", "the first evaluation failed (search noise, with the gradient)", []),
        ("sampler=sampled_parts:of_other_channels", "search noise", ["objective.settings.loss=fid@pixels"]),
        ("reference=nowhere.npz", "nowhere.npz", ["--dry-run"]),
    ],
)
def test_what_would_stop_a_later_search_stops_the_run_before_its_first_trial(
    sampled: Path, typed: Typed, change: str, reason: str, options: list[str]
) -> None:
    assert reason in typed("run", "sampled.yaml", f"objective.settings.{change}", *options, status=2).err
    assert not (sampled / "studies.db").exists()


def test_a_start_that_has_no_score_stops_no_search(sampled: Path, typed: Typed) -> None:
    changes = ("objective.settings.sampler=sampled_parts:not_finite", "optimizers=[LCSC]")
    said = typed("run", "sampled.yaml", *changes, status=1).err
    assert "all 2 trials failed; the last failed with: MetricError" in said


def test_a_search_that_cannot_run_does_not_stop_one_that_continues(sampled: Path, typed: Typed) -> None:
    begin = ("run", "sampled.yaml", "objective.settings.sampler=sampled_parts:without_graph", "~held_out")
    typed(*begin, "--optimizer", "EMAGrid", "budget.evaluations=2")
    said = typed(*begin, "budget.evaluations=4", status=1).err
    assert "after 4 evaluations" in said
    assert "1 of 2 studies did not succeed: sampled/LCSCGradient/0: " in said
    assert "have no autograd graph" in said


def test_a_dry_run_says_how_long_a_trial_takes_and_a_second_run_does_not_rehearse(sampled: Path, typed: Typed) -> None:
    said = typed("run", "sampled.yaml", "--dry-run")
    assert "images with their gradient take about" in said.err
    [estimate] = re.findall(r"sampled: the whole run takes up to (.*)", said.err)
    total, *parts = (float(number) for number in re.findall(r"about ([0-9.]+) s", estimate))
    assert len(parts) == 3
    assert total == pytest.approx(sum(parts), rel=0.1)
    assert "sampled/LCSCGradient/0" in said.out
    assert not (sampled / "studies.db").exists()
    run = ("run", "sampled.yaml", "--optimizer", "LCSCGradient", "~held_out")
    assert "take about" in typed(*run).err
    again = typed(*run, "--budget", "4").err
    assert not re.search("takes? about", again)
    assert "after 4 evaluations" in again


def test_a_rehearsal_samples_few_images_and_measures_no_units_of_the_loss(sampled: Path, typed: Typed) -> None:
    changes = ["objective.settings.loss={fdr: [pixels]}", "objective.settings.batch_size=8", "~held_out"]
    typed("run", "sampled.yaml", "--optimizer", "EMAGrid", "--dry-run", "objective.settings.images=40", *changes)
    batches = [int(line) for line in (sampled / "sampled.txt").read_text().split()]
    few = 1 + 3 * REHEARSED  # for the layout; one model twice, and another
    to_look_at = 3 * COLUMNS  # of the first, the middle and the last checkpoint
    assert sum(batches) == few + to_look_at + 40, "all images, once"
    assert max(batches) == 8


def test_a_rehearsal_has_the_rows_of_the_search_that_follows_the_gradient(
    sampled: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}  # whether it is rehearsed → of gradients

    def evaluated(objective: MergeSampleScore, candidate: Candidate) -> Evaluation:
        if candidate.gradient:
            shapes[candidate.rehearsal].add(candidate.coefficients.shape)
        return evaluate(objective, candidate)

    evaluate = MergeSampleScore.evaluate
    monkeypatch.setattr(MergeSampleScore, "evaluate", evaluated)
    typed("run", "sampled.yaml", "~held_out")
    assert shapes[True] == shapes[False] == {(6, 3)}, "a row for each channel of the network's layer"


def test_a_search_goes_on_with_another_batch_size_and_device_as_if_it_had_not_ended(
    sampled: Path, typed: Typed
) -> None:
    run = ("run", "sampled.yaml", "--optimizer", "LCSCGradient", "~held_out")
    begin = (*run, "budget.evaluations=4", "objective.settings.batch_size=16")
    for name in ("name=sampled", "name=whole"):
        typed(*begin, name)
    typed(*begin, "name=whole", "--budget", "8")
    changed = ("objective.settings.batch_size=7", "objective.settings.device=cpu")
    typed(*run, "budget.evaluations=8", *changed)
    storage = open_storage("sqlite:///studies.db", write=False)
    found, whole = (StoredStudy.open(storage, f"{name}/LCSCGradient/0") for name in ("sampled", "whole"))
    trials = [study.trials() for study in (found, whole)]
    assert len(trials[0]) == len(trials[1]) >= 8
    checked = [
        [coefficients_of(trial) for trial in of_study if trial.state is TrialState.COMPLETE] for of_study in trials
    ]
    assert len(checked[0]) >= 2
    np.testing.assert_allclose(checked[0], checked[1], atol=2**-12)  # and checks are rounded


def test_advice_about_rows_is_given_once(scored: Path, typed: Typed) -> None:
    command = ("run", "scored.yaml", "space.rows=layers", "held_out=null")
    assert typed(*command).err.count("scored/LCSC/0: without a gradient, more rows do not help") == 1


RANDOM = """
import random
import torch

GENERATOR = random.Random(0)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.other = torch.nn.Parameter(torch.zeros(4))
        self.calls = 0

def random_score(model):
    return float(model.weight.mean()) + GENERATOR.random()

def drifting(model):
    model.calls += 1
    return float(model.weight.mean()) * (1 + model.calls)

def detached(model):
    return (model.weight.detach() + 0.2 * model.other).square().mean()

def half(model):
    return torch.stack([model.weight[0], model.weight[1].detach(), model.other[0].detach()]).square().mean()

def slightly(model):
    return model.weight.square().mean() + 0.1 * model.other.detach().square().mean()

def without_other(model):
    return model.weight.square().mean()

def doubled(model):
    return {"score": (model.weight + model.weight.detach()).square().mean()}
"""


@pytest.fixture
def scores(workplace: Path) -> Path:
    (workplace / "random_parts.py").write_text(RANDOM)
    draw = torch.Generator().manual_seed(0)
    for step in (10, 20, 30):
        weights = {name: step + torch.randn(4, generator=draw) for name in ("weight", "other")}
        torch.save(weights, workplace / f"model{step}.pt")
    study = {
        "name": "scores",
        "objective": {"file": "score.py", "settings": {"checkpoints": "model*.pt", "model": "random_parts:Net"}},
        "budget": {"evaluations": 3},
    }
    (workplace / "scores.yaml").write_text(yaml.safe_dump(study))
    return workplace


def score(name: str, *optimizers: str) -> tuple[str, ...]:
    return ("run", "scores.yaml", f"objective.settings.score=random_parts:{name}", f"optimizers={[*optimizers]}")


@pytest.mark.parametrize("name", ["random_score", "drifting"])
def test_a_score_that_is_no_function_of_the_weights_is_refused(scores: Path, typed: Typed, name: str) -> None:
    said = typed(*score(name, "LCSC"), status=2).err
    assert "scores: one model was scored twice, and got " in said
    assert not (scores / "studies.db").exists()


def test_of_a_random_score_the_mean_of_repeats_counts_with_its_error(scores: Path, typed: Typed) -> None:
    typed(*score("random_score", "LCSC"), "objective.settings.repeats=20")
    [first, *_] = load_study("scores/LCSC/0").trials
    assert first["metrics"].keys() == {"random_score", "random_score_stderr"}
    assert 0.02 < first["metrics"]["random_score_stderr"] < 0.2


@pytest.mark.parametrize("rows", ["layers", "null"])
@pytest.mark.parametrize("name", ["detached", "doubled", "half"])
def test_a_gradient_with_holes_is_refused(scores: Path, typed: Typed, name: str, rows: str) -> None:
    said = typed(*score(name, "LCSCGradient"), f"space.rows={rows}", status=2).err
    assert re.search(r"scores: the gradient says that the loss rises by [0-9.]+ where it rises by [0-9.]+", said)
    typed(*score(name, "LCSCQuadratic"))


def test_a_layer_without_a_graph_that_changes_little_is_refused_and_one_that_changes_nothing_is_named(
    scores: Path, typed: Typed
) -> None:
    rows = ("space.rows=layers",)
    said = typed(*score("slightly", "LCSCGradient"), *rows, status=2).err
    assert re.search(r"scores: the gradient in other is zero, where the loss rises by [0-9.-]+: some weights", said)
    said = typed(*score("without_other", "LCSCGradient"), *rows).err
    assert said.count("scores: the gradient in other is zero, since the loss does not depend on the weights there") == 1


def test_a_sampler_with_a_layer_without_a_graph_is_refused_with_a_row_for_each_layer(
    sampled: Path, typed: Typed
) -> None:
    changed = {"model": "holes:Net", "sampler": "holes:sample", "checkpoints": "two*.pt"}
    (sampled / "holes.py").write_text(HOLES)
    for step in (10, 20, 30):
        torch.manual_seed(step)
        torch.save({name: 0.3 * torch.randn(3, 3, 1, 1) for name in ("a.weight", "b.weight")}, f"two{step}.pt")
    settings = [f"objective.settings.{name}={value}" for name, value in changed.items()]
    run = ("run", "sampled.yaml", "--optimizer", "LCSCGradient", "~held_out", "name=holes", *settings)
    said = typed(*run, "space.rows=layers", status=2).err
    assert "some weights reach the score without a graph" in said


@pytest.mark.parametrize(
    ("name", "complaint"), [("random_score", "scored twice, and got"), ("doubled", "the score rises by")]
)
def test_a_maximized_score_has_its_own_sign_in_what_is_refused(
    scores: Path, typed: Typed, name: str, complaint: str
) -> None:
    optimizer = "LCSC" if name == "random_score" else "LCSCGradient"
    said = typed(*score(name, optimizer), "objective.settings.maximize=true", status=2).err
    assert complaint in said
    assert not re.search(r"(got|rises by|then) -", said)


HOLES = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Conv2d(3, 3, 1, bias=False)
        self.b = torch.nn.Conv2d(3, 3, 1, bias=False)

def sample(model, noise):
    with torch.no_grad():
        inside = model.a(noise)
    return torch.tanh(model.b(inside) + noise)
"""

KEEPS_FIRST = """

class Cached(Net):
    def forward(self):
        if not hasattr(self, "first"):
            self.first = self.weight.detach().clone()
        return self.first[0] / 1000 + (self.weight[0] - 25) ** 2

class Plain(Net):
    def forward(self):
        return (self.weight[0] - 25) ** 2

def value(model, draw):
    return float(model())
"""
VALUE = "score=scored_parts:value"


@pytest.mark.parametrize(("model", "is_warned"), [("Cached", True), ("Plain", False)])
def test_a_network_that_keeps_what_its_first_weights_gave_is_found_when_the_answer_is_loaded_anew(
    scored: Path, typed: Typed, model: str, is_warned: bool
) -> None:
    (scored / "scored_parts.py").write_text(PARTS + KEEPS_FIRST)
    changes = (f"model=scored_parts:{model}", VALUE)
    said = typed("run", "scored.yaml", *(f"objective.settings.{change}" for change in changes)).err
    assert ("in a new network" in said) == is_warned
    assert "depends on what was scored before" not in said
    assert ("in a new network" in " ".join(typed("compare", "scored").err.split())) == is_warned


@pytest.mark.parametrize(("error", "status"), [("ValueError", 0), ("KeyboardInterrupt", 130)])
def test_a_report_is_stored_also_where_a_second_network_cannot_be_loaded(
    scored: Path, typed: Typed, error: str, status: int
) -> None:
    once = f"made = []\n\ndef once():\n    if made:\n        raise {error}\n    made.append(1)\n    return Plain()\n"
    (scored / "scored_parts.py").write_text(PARTS + KEEPS_FIRST + once)
    run = ("run", "scored.yaml", *(f"objective.settings.{key}" for key in ("model=scored_parts:once", VALUE)))
    typed(*run, status=status)
    assert "The answer is" in typed("compare", "scored").err
    assert "finished" in typed(*run).err


DRIFTS = """

class Drifts(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self):
        self.calls += 1
        return self.weight.mean() * (1 + 2e-4 * self.calls)

def drifting(model, draw):
    return float(model())
"""


def test_a_score_that_drifts_too_slowly_for_the_rehearsal_is_said_after_the_search(scored: Path, typed: Typed) -> None:
    (scored / "scored_parts.py").write_text(PARTS + DRIFTS)
    changes = ["objective.settings.model=scored_parts:Drifts", "objective.settings.score=scored_parts:drifting"]
    said = typed("run", "scored.yaml", *changes, "budget.evaluations=10", "seeds=[0,1]").err
    assert said.count("scored: one model had the loss") == 1, "said once for all searches"
    assert "depends on what was scored before" in " ".join(typed("compare", "scored").err.split())


@pytest.mark.parametrize(("data", "is_warned"), [("7", True), ("draw.seed", False)])
def test_a_score_that_ignores_its_draw_is_said_to_hold_nothing_out(
    scored: Path, typed: Typed, data: str, is_warned: bool
) -> None:
    (scored / "scored_parts.py").write_text(
        PARTS + f"\ndef fixed(model, draw):\n    return float(model.weight.mean()) ** 2 + ({data}) % 1000\n"
    )
    said = typed("run", "scored.yaml", "objective.settings.score=scored_parts:fixed").err
    assert ("does the score use its draw" in said) == is_warned
    assert ("does the score use its draw" in " ".join(typed("compare", "scored").err.split())) == is_warned
