"""Parts that another package adds by entry points: one that is installed for real, and broken ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import lcsc_opt
from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import reading
from lcsc_opt.database.store import our_studies
from lcsc_opt.testing import check_checkpoint, check_optimizer
from tests.commands import Typed

PACKAGE = Path(__file__).parent / "plugin_package"
OWN = "tests.test_plugins"
STUDY = f"""
name: parts
objective:
  file: torch_module.py
  settings:
    checkpoints: runs/*.npz
    model: {OWN}:generator
    sampler: {OWN}:sample
    image_shape: [3, 8, 8]
    images: 20
    reference: real
    loss: energy@patches
    held_out_metrics: [energy@pixels]
    device: cpu
space: {{tail: {{checkpoints: 3}}}}
optimizers: [Perturb: {{mutation: 0.1}}]
budget: {{evaluations: 6}}
held_out: {{images: 20, top: 1}}
"""


def generator() -> nn.Module:
    return nn.Conv2d(3, 3, 1, bias=False)


def sample(network: nn.Module, noise: Tensor) -> Tensor:
    return torch.tanh(network(noise))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pip installed the package."""
    folder = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source") / "package"
    shutil.copytree(PACKAGE, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder, source], check=True, capture_output=True)
    return folder


@pytest.fixture
def place(workplace: Path) -> Path:
    """Checkpoints of numpy, and real images."""
    generator = np.random.default_rng(0)
    for folder in ("runs", "real"):
        Path(folder).mkdir()
    for step in range(1, 5):
        np.savez(f"runs/model{step}.npz", weight=generator.standard_normal((3, 3, 1, 1), dtype=np.float32))
    for index in range(40):
        pixels = generator.integers(90, 160, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"real/{index}.png")
    Path("study.yaml").write_text(STUDY)
    return workplace


def stored(study: str) -> Any:
    """The attributes of a stored study."""
    with reading("sqlite:///studies.db") as storage:
        return our_studies(storage)[study]


def packages_of(study: str) -> dict[str, Any]:
    """The packages in a stored study's fingerprint."""
    packages: dict[str, Any] = stored(study)["fingerprint"]["environment"]["packages"]
    return packages


def test_a_study_file_of_five_parts(
    place: Path, installed: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed, tmp_path: Path
) -> None:
    assert "space: expected 'affine' or 'convex', got 'tail'" in typed.refused("run", "study.yaml")
    monkeypatch.syspath_prepend(str(installed))
    assert "Perturb" in typed("run", "study.yaml", "--dry-run").out
    assert not Path("studies.db").exists()
    assert lcsc(["run", "study.yaml"]) == 0
    assert packages_of("parts/Perturb/0")["example-parts"] == "1.2.3"
    (study,) = lcsc_opt.run("study.yaml")
    assert study.coefficients[0] == pytest.approx(study.trials[0]["coefficients"][0]), "the tail space leaves it alone"
    assert len({trial["coefficients"][-1] for trial in study.trials}) == 6
    assert "energy@pixels" in str(stored("parts/Perturb/0")["held_out"])
    listed = typed.json("list", "--catalog")
    assert listed["metrics"] == {"energy": "example-parts 1.2.3"}
    assert listed["formats"] == {"npz": "example-parts 1.2.3"}
    for command in (["compare", "parts"], ["show", "parts/Perturb/0"], ["export", "parts/Perturb/0", "-o", "x.pt"]):
        assert lcsc(command) == 0

    newer = tmp_path / "newer"
    shutil.copytree(installed, newer)
    (newer / "example_parts-1.2.3.dist-info").rename(newer / "example_parts-2.0.dist-info")
    metadata = newer / "example_parts-2.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.2.3", "Version: 2.0"))
    monkeypatch.setattr(sys, "path", [str(newer), *(entry for entry in sys.path if entry != str(installed))])
    said = typed.refused("run", "study.yaml", "--budget", "7")
    assert 'environment.packages.example-parts was "1.2.3", is now "2.0"' in said
    assert lcsc(["run", "study.yaml", "--budget", "7", "--accept-changes"]) == 0

    monkeypatch.setattr(sys, "path", sys.path[1:])
    assert lcsc(["compare", "parts"]) == 0
    assert lcsc(["show", "parts/Perturb/0"]) == 0
    assert "tail" in typed.refused("resume", "parts/Perturb/0", "--budget", "8")


def test_search_in_python(place: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))
    result = lcsc_opt.search(
        "runs/*.npz",
        build=generator,
        sample=sample,
        reference="real",
        image_shape=(3, 8, 8),
        images=20,
        loss="energy@patches",
        held_out=20,
        held_out_metrics=[],
        optimizers=["LCSCGradient", "Perturb"],
        space="tail",
        budget=3,
        device="cpu",
        name="parts",
    )
    assert [len(study.trials) for study in result.studies] == [3, 3]
    text = parse_yaml(result.to_study_file())
    assert text["space"] == {"tail": None}, "Perturb follows no gradient, so one row serves both"
    assert packages_of("parts/LCSCGradient/0")["example-parts"] == "1.2.3"


def test_nothing_is_imported_that_is_not_named(place: Path, installed: Path) -> None:
    code = """
import sys, torch
import lcsc_opt
states = {step: {"weight": torch.rand(1, 3)} for step in range(4)}
lcsc_opt.search(states, build=torch.nn.Linear(3, 1, bias=False), score=lambda net: net.weight.sum(), budget=2)
assert "example_parts" not in sys.modules
from lcsc_opt.checkpoints.reading import read_checkpoint
read_checkpoint("runs/model1.npz")
assert "example_parts.formats" in sys.modules
assert "example_parts.search" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": f"{installed}:{Path(__file__).parents[1]}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def distribution(folder: Path, name: str, version: str, parts: dict[str, str], code: str = "") -> None:
    """Install a package without pip: group → NAME = OBJECT."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, line in parts.items():
        lines += [f"[lcsc_opt.{group}]", line]
    (information / "entry_points.txt").write_text("\n".join(lines))
    if code:
        (folder / f"{name}.py").write_text(code)


@pytest.fixture
def packages(place: Path, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with the working package, and a folder for others."""
    monkeypatch.syspath_prepend(str(installed))
    others = tmp_path / "others"
    others.mkdir()
    monkeypatch.syspath_prepend(str(others))
    return others


def test_the_checks_for_authors_pass(packages: Path) -> None:
    check_optimizer("Perturb", {"mutation": 0.1})
    with np.load("runs/model1.npz") as file:
        weights = {name: torch.from_numpy(file[name]) for name in file.files}
    check_checkpoint(Path("runs/model1.npz"), weights, step=1)


def test_ours_win(packages: Path, typed: Typed) -> None:
    parts = {
        "metrics": "fid = nowhere:fid",
        "extractors": "pixels = nowhere:pixels",
        "optimizers": "EMAGrid = nowhere:EMAGrid\nCMA = nowhere:CMA",
        "spaces": "affine = nowhere:Affine",
        "formats": "pt = nowhere:read",
    }
    distribution(packages, "hiding", "1.0", parts)
    torch.save({"weight": torch.ones(3, 3, 1, 1)}, "runs/model5.pt")
    torch.save({"weight": torch.zeros(3, 3, 1, 1)}, "runs/model6.pt")
    changes = ["objective.settings.checkpoints=runs/*.pt", "objective.settings.loss=fid@pixels", "space=affine"]
    assert lcsc(["run", "study.yaml", *changes, "optimizers=[EMAGrid, CMA]", "budget.evaluations=2"]) == 0
    assert "hiding" not in packages_of("parts/CMA/0")


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("metrics", "energy"),
        ("extractors", "patches"),
        ("optimizers", "Perturb"),
        ("spaces", "tail"),
        ("formats", "npz"),
    ],
)
def test_a_name_that_two_packages_claim(packages: Path, typed: Typed, group: str, name: str) -> None:
    distribution(packages, "rival", "0.1", {group: f"{name} = nowhere:part"})
    said = typed.refused("run", "study.yaml")
    assert "rival 0.1 and example-parts 1.2.3 both have" in said
    assert not Path("studies.db").exists()


WRONG = """
import numpy as np
number = 3
def nothing(*arguments, **options): return None
def broken(*arguments, **options): raise RuntimeError("out of order\\nand more")
def two(samples, real): return samples.mean(0)[:2]
class Elsewhere:
    def __init__(self, steps, origin): self.steps, self.shape = steps, (1,)
    def to_coefficients(self, free): return np.ones(len(self.steps)) / len(self.steps)
    def to_free(self, coefficients): return np.zeros(1)
"""


@pytest.mark.parametrize(
    ("group", "part", "changes", "said"),
    [
        ("metrics", "gone", "objective.settings.loss=wrong@patches", "cannot be loaded: AttributeError"),
        ("metrics", "number", "objective.settings.loss=wrong@patches", "is a int; expected something to call"),
        ("extractors", "broken", "objective.settings.loss=fid@wrong", "cannot be made: RuntimeError: out of order"),
        ("extractors", "nothing", "objective.settings.loss=fid@wrong", "made NoneType, which lacks name"),
        ("optimizers", "broken", "optimizers=[wrong]", "cannot be made: RuntimeError: out of order"),
        ("optimizers", "nothing", "optimizers=[wrong]", "made a NoneType; expected Nevergrad's"),
        ("spaces", "broken", "space=wrong", "cannot be made: RuntimeError: out of order"),
        ("spaces", "nothing", "space=wrong", "cannot be made: AttributeError"),
        ("spaces", "Elsewhere", "space=wrong", "expected the zero vector to map to the origin"),
        ("formats", "broken", "objective.settings.checkpoints=runs/*.wrong", "cannot read it: RuntimeError"),
        ("formats", "nothing", "objective.settings.checkpoints=runs/*.wrong", "returned a NoneType"),
    ],
)
def test_a_broken_part_is_one_line_that_names_its_package(
    packages: Path, typed: Typed, group: str, part: str, changes: str, said: str
) -> None:
    module = f"wrong_{group}_{part}"
    distribution(packages, module, "0.3", {group: f"wrong = {module}:{part}"}, WRONG)
    for step in (1, 2):
        shutil.copy(f"runs/model{step}.npz", f"runs/model{step}.wrong")
    message = typed("run", "study.yaml", changes, status=2).err
    assert "Traceback" not in message
    assert f"of {module} 0.3" in message
    assert said in message
    assert not Path("studies.db").exists()


@pytest.mark.parametrize(("part", "said"), [("two", "numbers of the shape [2]"), ("broken", "RuntimeError: out of")])
def test_a_metric_that_cannot_measure_ends_the_search(packages: Path, typed: Typed, part: str, said: str) -> None:
    module = f"unable_{part}"
    distribution(packages, module, "0.3", {"metrics": f"wrong = {module}:{part}"}, WRONG)
    message = typed("run", "study.yaml", "objective.settings.loss=wrong@patches", status=1).err
    assert f"the metric wrong of {module} 0.3: " in message
    assert said in message
    assert "Traceback" not in message
