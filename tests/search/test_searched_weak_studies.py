"""Studies that search a weak model's coefficients, too: stored, continued, drawn, forked, exported as two models."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import lcsc_opt
from lcsc_opt.coefficients.layer_groups import NETWORK, WEAK
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.exports import publishing
from lcsc_opt.exports.recipe import Recipe
from lcsc_opt.exports.writing import Destination
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from lcsc_opt.views.figures.study import coefficients_figure, distances_figure
from lcsc_opt.views.landscape import Landscape
from tests.commands import Typed
from tests.sampling.test_gradient_sampling import Smooth

STEPS = (10, 20, 30, 40, 50)
START = np.eye(len(STEPS))[1]  # of step 20
STORAGE = "sqlite:///studies.db"

OBJECTIVE = """
from lcsc_opt.objective.weak import WeakSearch, with_weak_weights
from lcsc_opt.sampling import Autoguidance
from lcsc_opt.trajectory import Trajectory
from tests.objective.test_objective_gradient import build as objective_of
from tests.sampling.test_gradient_sampling import Smooth, diffusers


def build(settings):
    trajectory = Trajectory.open(settings["path"])
    weak, start = with_weak_weights(Smooth(), WeakSearch(**settings["weak"]), trajectory)
    module = Autoguidance(Smooth(), weak, guidance=1.8, weak_start=start)
    return objective_of(trajectory, diffusers(module, "ddim", trained=module.trained, calls=2), images=30)
"""


def content() -> dict[str, Any]:
    """The content of a study file."""
    return {
        "name": "weak",
        "objective": {"file": "guided.py", "settings": {"path": "run.trajectory", "weak": {"search": 20}}},
        "optimizers": ["EMAGrid", "LCSCGradient"],
        "budget": {"evaluations": 12},
        "held_out": {"images": 30, "top": 2},
    }


def write_files() -> None:
    with TrajectoryWriter("run.trajectory") as writer:
        for seed, step in enumerate(STEPS):
            writer.append(step, Smooth(seed=seed).state_dict())
    Path("guided.py").write_text(OBJECTIVE)


@pytest.fixture
def study(workplace: Path) -> dict[str, Any]:
    """The content of a study file, in whose folder the process is."""
    write_files()
    return content()


@pytest.fixture(scope="module")
def finished_studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the study file has been run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LCSC_CACHE", str(folder / "cache"))
        write_files()
        lcsc_opt.run(content())
    return folder


@pytest.fixture
def finished(workplace: Path, finished_studies: Path) -> None:
    """A copy of that folder, in which the process is."""
    shutil.copytree(finished_studies, workplace, dirs_exist_ok=True)


def stored(name: str) -> StoredStudy:
    return StoredStudy.open(open_storage(STORAGE, write=False), name)


def asked(name: str) -> list[Any]:
    return [coefficients_of(trial) for trial in stored(name).with_arrays(stored(name).trials())]


@pytest.mark.parametrize("space", ["affine", {"rows": "layers"}, {"principal": 2}])
@pytest.mark.parametrize("optimizer", ["LCSC", "CMA", "LCSCGradient"])
def test_it_begins_at_its_start_and_is_continued_bit_for_bit(study: Any, optimizer: str, space: Any) -> None:
    del study["held_out"]
    study |= {"optimizers": [optimizer], "space": space, "budget": {"evaluations": 5}}
    lcsc_opt.run(study)
    before = asked(f"weak/{optimizer}/0")
    lcsc_opt.run(study, budget=9)
    after = asked(f"weak/{optimizer}/0")
    assert [rows.tobytes() for rows in after[:5]] == [rows.tobytes() for rows in before]
    found = lcsc_opt.load_study(f"weak/{optimizer}/0")
    layers = ("classes", "first", "last") if space == {"rows": "layers"} else (NETWORK,)
    assert found.layer_groups == (*layers, WEAK)
    assert {rows.shape for rows in after} == {(len(layers) + 1, len(STEPS))}
    first = after[0]
    if optimizer != "CMA":  # whose first candidate is drawn
        np.testing.assert_allclose(first[-1], START, rtol=0, atol=1e-12)
    assert np.abs(after[-1][-1] - START).max() > 1e-3
    assert np.abs(after[-1][0] - after[-1][-1]).max() > 0.1  # not one model twice


def test_averages_move_the_network_beside_the_weak_model_at_its_start(study: Any) -> None:
    study |= {"optimizers": ["EMAGrid"]}
    lcsc_opt.run(study)
    trials = asked("weak/EMAGrid/0")
    assert {rows.shape for rows in trials} == {(len(STEPS),)}
    objective = lcsc_opt.load_study("weak/EMAGrid/0").objective
    average = default_origin(STEPS)
    assert objective(average) == objective(np.stack([average, START]))


@pytest.mark.usefixtures("finished")
def test_the_network_and_its_weak_model_are_two_files(typed: Typed) -> None:
    found = lcsc_opt.load_study("weak/LCSCGradient/0")
    said = typed("export", found.name, "-o", "best.safetensors").err
    assert "best-weak.safetensors: the weak model" in said
    trajectory = Trajectory.open("run.trajectory")
    network, weak = found.coefficients
    for file, coefficients in (("best", network), ("best-weak", weak)):
        for name, tensor in trajectory.merge(coefficients).items():
            torch.testing.assert_close(load_file(f"{file}.safetensors")[name], tensor, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.merge()["first.weight"], trajectory.merge(network)["first.weight"])
    assert torch.equal(found.merge(weak)["first.weight"], trajectory.merge(weak)["first.weight"])
    typed("apply", "best.safetensors", "run.trajectory", "-o", "again.safetensors")
    typed("apply", "best-weak.safetensors", "run.trajectory", "-o", "alone.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("best.safetensors").read_bytes()
    weak_bytes = Path("best-weak.safetensors").read_bytes()
    assert {Path(name).read_bytes() for name in ("again-weak.safetensors", "alone.safetensors")} == {weak_bytes}
    assert not Path("alone-weak.safetensors").exists()
    shown = typed("show", "best.safetensors").out
    assert re.search(rf"^all .*\n{WEAK} ", shown, re.MULTILINE)
    Path("other-weak.safetensors").write_bytes(b"")
    refusal = typed.refused("export", found.name, "-o", "other.safetensors")
    assert "other-weak.safetensors: exists already" in refusal
    assert not Path("other.safetensors").exists()
    typed("export", found.name, "-o", "other.safetensors", "--overwrite")
    assert Path("other-weak.safetensors").read_bytes() == weak_bytes


@pytest.mark.usefixtures("finished")
def test_a_grids_answer_is_exported_with_the_weak_model_at_its_start(typed: Typed) -> None:
    typed("export", "weak/EMAGrid/0", "-o", "ema.safetensors")
    at_start = Trajectory.open("run.trajectory").checkpoint(1)
    assert torch.equal(load_file("ema-weak.safetensors")["first.weight"], at_start["first.weight"])


@pytest.mark.usefixtures("finished")
def test_the_card_says_both_and_both_are_uploaded(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stored("weak/LCSCGradient/0")
    typed("export", found.name, "-o", "best.safetensors")
    uploaded = {}

    class Api:
        def create_repo(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def create_commit(self, _: str, operations: Any, **__: Any) -> None:
            uploaded.update({operation.path_in_repo: operation.path_or_fileobj for operation in operations})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    to = Destination.of(Path("best.safetensors"), overwrite=True)
    recipe = Recipe.read(to.path)
    publishing.push_to_hub("me/guided", to, found, lcsc_opt.load_study(found.name).objective, recipe)
    assert set(uploaded) == {"README.md", "best.safetensors", "best-weak.safetensors"}
    card = uploaded["README.md"].decode()
    assert "| step | coefficient | weak model | SHA-256 |" in card
    assert f"| 20 | {recipe.coefficients[1]!r} | {recipe.weak[1]!r} |" in card  # type: ignore[index]
    assert "away from the weak model `best-weak.safetensors`" in card


def test_figures_and_landscapes_show_the_network_and_the_heat_map_both(study: Any, typed: Typed) -> None:
    study["optimizers"].append("LCSC")
    lcsc_opt.run(study)
    reader = HistoryReader(open_storage(STORAGE, write=False))
    names = ["weak/EMAGrid/0", "weak/LCSCGradient/0"]
    ema, searched = [reader.read_study(name) for name in names]
    answer = reader.answer(searched)
    assert answer is not None
    bars, heat = coefficients_figure(reader, [searched]).data
    np.testing.assert_allclose(bars.y, answer[0])
    assert list(heat.y) == [NETWORK, WEAK]
    np.testing.assert_allclose(heat.z, answer, rtol=1e-6)
    average = reader.answer(ema)
    distance = np.linalg.norm(average - answer[0])
    np.testing.assert_allclose(distances_figure(reader, [ema, searched]).data[0].z[0][1], distance)
    typed("landscape", "weak/LCSC/0", "--grid", "3")
    landscape = Landscape.read(HistoryReader(open_storage(STORAGE, write=False)), "weak/Landscape/0")
    [projected] = [search for search in landscape.searches if search.study.optimizer == "EMAGrid"]
    [in_rows] = [search for search in landscape.searches if search.study.optimizer == "LCSC"]
    # the paper's averages, with which LCSC begins, are those of the grid
    of_average = dict(zip(projected.trials["number"].tolist(), projected.positions.tolist(), strict=True))
    np.testing.assert_allclose(in_rows.positions[0], of_average[0], atol=1e-9)


def test_a_fork_of_averages_has_the_weak_model_at_its_start(study: Any, typed: Typed) -> None:
    study["optimizers"] = ["EMAGrid"]
    lcsc_opt.run(study)
    typed("fork", "weak/EMAGrid/0", "forked", "--optimizer", "LCSCGradient", "--budget", "3")
    first_own = next(rows for rows, _ in asked("forked/LCSCGradient/0") if rows.ndim > 1)
    np.testing.assert_allclose(first_own[-1], START, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("finished")
def test_what_needs_one_model_says_so_in_one_line(typed: Typed) -> None:
    study = content()
    name = "weak/LCSCGradient/0"
    Path("answer.json").write_text(typed("show", name, "--format", "json").out)
    refusal = typed.refused("apply", "answer.json", "run.trajectory", "-o", "one.safetensors")
    assert "the last row is of a weak model" in refusal
    assert "has a row for its weak model" in typed.refused("fork", name, "rows", "--rows", "layers")
    assert "here a weak model is searched, too" in typed.refused("refine", name, "-o", "refined.trajectory")
    study |= {"name": "unknown", "objective": {**study["objective"], "settings": {"path": "run.trajectory"}}}
    study["objective"]["settings"]["weak"] = {"search": 20}
    Path("unknown.yaml").write_text(yaml.safe_dump(study))
    assert "moves all rows alike" in typed.refused("run", "unknown.yaml", "--optimizer", "LCSCQuadratic")
    study["objective"]["settings"]["weak"] = {"search": 25}
    Path("unknown.yaml").write_text(yaml.safe_dump(study))
    assert "expected ema:RATE, or the step of one of the checkpoints, 10 to 50; got 25" in typed.refused(
        "run", "unknown.yaml"
    )
