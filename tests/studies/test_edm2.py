"""``studies/edm2``: NVlabs' released snapshots, as small files under their names, searched."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lcsc_opt.base.paths import SHIPPED
from lcsc_opt.base.study_file import read_study_file
from lcsc_opt.cli import run as lcsc
from lcsc_opt.trajectory import Trajectory
from tests import tiny_pipelines
from tests.checkpoints.nvlabs_examples import EasyDict, nvlabs_modules
from tests.objectives.edm_networks import TinyPrecond
from tests.objectives.image_objectives import PIXELS, settings

FOLDER = SHIPPED / "studies" / "edm2"
WIDTHS = (0.05, 0.1)  # of phema.PowerFunctionEMA
STEPS = tuple((count << 26) // 1000 for count in (1, 2, 3, 4))  # thousands of images: snapshots every 64 Mi
NAMES = ("img512", "img64")


def network(step: int, width: float, channels: int) -> TinyPrecond:
    """A network that is pickled with source code, which fails if it is run."""
    made = TinyPrecond(8, channels, 5)
    tiny_pipelines.randomize(made, step % 1000)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1 + width)
    return made.eval().to(torch.float16)


def write_snapshots(name: str, checkpoints: str) -> int:
    """The files of one size, under the names of the release; how many."""
    channels = 4 if name == "img512" else 3
    folder = Path(checkpoints).parent  # of a glob
    folder.mkdir(parents=True)
    for step in STEPS:
        for width in WIDTHS:
            content = EasyDict(encoder=EasyDict(), dataset_kwargs=EasyDict(path="x.zip"), loss_fn=None)
            content["ema"] = network(step, width, channels)
            with nvlabs_modules():
                (folder / f"{folder.name}-{step:07d}-{width:.3f}.pkl").write_bytes(pickle.dumps(content))
    return len(STEPS) * len(WIDTHS)


@pytest.fixture
def changes(request: pytest.FixtureRequest, workplace: Path) -> list[str]:
    """The release of one size in an empty folder, and what is smaller than in the study file."""
    name = request.param
    spec = read_study_file(FOLDER / f"{name}.yaml")
    given = dict(spec.objective.settings)
    write_snapshots(name, str(given["checkpoints"]))
    settings(Path())
    Path("reference.npz").rename(str(given["reference"]))
    if name == "img512":
        tiny_pipelines.seeded(tiny_pipelines.vae).save_pretrained("sd-vae-ft-mse")
    smaller: dict[str, Any] = {"loss": PIXELS, "held_out_metrics": [], "images": 18, "batch_size": 6}
    smaller |= {"device": "cpu", "dtype": "fp32", "sampler.steps": 2}
    smaller |= {"network": "tests.objectives.edm_networks:TinyPrecond"}
    return [f"objective.settings.{key}={json.dumps(value)}" for key, value in smaller.items()]


def test_every_file_reports_as_many_images_as_the_paper() -> None:
    files = sorted(FOLDER.glob("*.yaml"))
    assert [path.stem for path in files] == sorted(NAMES)
    for path in files:
        spec = read_study_file(path)
        assert spec.name.startswith(f"edm2_{path.stem}_")
        assert spec.held_out is not None
        assert spec.held_out.images == 50_000


@pytest.mark.parametrize("changes", NAMES, indirect=True)
def test_a_rehearsal_and_a_few_trials_run_on_the_released_files(
    request: pytest.FixtureRequest, changes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = request.node.callspec.params["changes"]
    path = FOLDER / f"{name}.yaml"
    spec = read_study_file(path)
    assert lcsc(["run", str(path), *changes, "--dry-run"]) == 0, capsys.readouterr().err
    assert f"{spec.name}/EMAGrid/0" in capsys.readouterr().out
    assert not Path("studies.db").exists()
    small = [*changes, "held_out.images=18", "held_out.top=1", "budget.images=90"]
    assert lcsc(["run", str(path), *small]) == 0, capsys.readouterr().err
    assert lcsc(["compare", spec.name, "--format", "json"]) == 0
    rows = {row["optimizer"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"EMAGrid", "CMA", "answer"}
    assert all(math.isfinite(row["held_out"]) for row in rows.values())

    [packed] = [Trajectory.open(folder) for folder in Path("studies.files").iterdir() if folder.suffix == ".trajectory"]
    assert packed.steps == STEPS
    weights = network(STEPS[1], WIDTHS[0], 4 if name == "img512" else 3).state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in packed.checkpoint(1).items())
