"""``lcsc train`` as a user types it: what it leaves, that it can be searched, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lcsc_opt.base.files import only_process
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import SEARCH
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.cli import run as lcsc
from lcsc_opt.coefficients.profiles import power_ema_coefficients
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.sampling.consistency import ConsistencyFunction
from lcsc_opt.training.models import TrainedModel
from lcsc_opt.training.recipes import RECIPES
from lcsc_opt.trajectory import Trajectory
from tests.commands import Typed
from tests.objectives.image_objectives import PIXELS
from tests.unet_examples import unet

SHORT = ["--data", "digits", "--steps", "4", "--checkpoint-every", "2", "batch_size=4"]


@pytest.fixture
def folder(workplace: Path) -> Path:
    """With a diffusion model and a tiny network."""
    unet(0).save_config(workplace / "network")
    save_model("edm.model", {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5})
    return workplace


def save_model(folder: str, scheduler: dict[str, Any]) -> None:
    unet(1).save_pretrained(Path(folder) / "unet")
    (Path(folder) / "scheduler").mkdir()
    (Path(folder) / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


def options(recipe: str) -> list[str]:
    return ["--teacher", "edm.model"] if recipe == "cd" else ["--network", "network"]


def study_settings() -> dict[str, Any]:
    """What the study file of the training says of its objective."""
    settings: dict[str, Any] = yaml.safe_load(Path("run.yaml").read_text())["objective"]["settings"]
    return settings


def study_objective() -> Any:
    """That objective, of few images."""
    file = yaml.safe_load(Path("run.yaml").read_text())["objective"]["file"]
    few = {"loss": PIXELS, "held_out_metrics": [], "images": 6, "batch_size": 6, "device": "cpu"}
    given = {**study_settings(), **few}
    return load_objective(ObjectiveSpec(file=file, settings=given), BuildContext(Path.cwd()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_leaves_what_can_be_searched_and_an_average(folder: Path, recipe: str, typed: Typed) -> None:
    command = ["train", recipe, *SHORT, *options(recipe), "-o", "run.trajectory"]
    assert "next: lcsc run run.yaml" in typed(*command).err
    trajectory = Trajectory.open("run.trajectory")
    assert trajectory.steps == (2, 4)
    given = study_settings()
    assert (given["loss"], given["held_out_metrics"]) == ("fid@digits", ["fid@digits2"])
    objective = study_objective()
    images = objective.images([0.5, 0.5], SEARCH, 3)
    assert images.shape == (3, 1, 8, 8)
    assert images.isfinite().all()
    model = TrainedModel.read(folder / "run.model", "-")
    assert objective.sampler.nfe == (1 if model.kind == "consistency" else 10)
    average = trajectory.merge(power_ema_coefficients(trajectory.steps, 0.1))
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, average[name])


def test_a_model_that_was_tuned_is_told_noise_as_before(folder: Path) -> None:
    """EDM's ln(sigma) / 4 where the scheduler of consistency models has 250 ln(sigma)."""
    assert lcsc(["train", "ict", *SHORT, "--from", "edm.model", "-o", "run.trajectory", "sigma_max=3"]) == 0
    objective, network = study_objective(), unet(0)
    network.load_state_dict(Trajectory.open("run.trajectory").merge([0.0, 1.0]))
    z = objective.sampler.noise.batch(SEARCH, 0, 5)
    function = ConsistencyFunction(network, noise_scale=0.25)
    with torch.no_grad():
        expected = function(3 * z, torch.full((5,), 3.0)).clamp(-1, 1)
    assert (objective.images([0.0, 1.0], SEARCH, 5) - expected).abs().max() < 1e-5


def test_a_trajectory_stands_for_the_model_beside_it(folder: Path) -> None:
    assert lcsc(["train", "edm", *SHORT, *options("edm"), "-o", "teacher.trajectory"]) == 0
    for name in ("teacher.model", "teacher.trajectory"):
        given = ["--teacher", name, "--network", "network", "-o", f"of-{name}.trajectory"]
        assert lcsc(["train", "cd", *SHORT, *given]) == 0
    assert len({Trajectory.open(path).sha256 for path in folder.glob("of-*.trajectory")}) == 1


def test_a_folder_of_images_is_trained_on(folder: Path) -> None:
    save_images([(8, 8)] * 5)
    arguments = ["--data", "images", *SHORT[2:], "--network", "network", "-o", "run.trajectory"]
    assert lcsc(["train", "flow", *arguments]) == 0
    settings = study_settings()
    assert (settings["loss"], settings["reference"]) == ("fid", str((folder / "images").absolute()))


def test_layers_of_a_named_network_draw_their_weights_in_their_own_way(folder: Path) -> None:
    unet(0, time_embedding_type="fourier").save_config("network")
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        out = f"run{number}.trajectory"
        assert lcsc(["train", "flow", *SHORT, "--network", "network", "--seed", str(seed), "-o", out]) == 0
        drawn.append(Trajectory.open(out).checkpoint(0)["time_proj.weight"])
    assert float(drawn[0].std()) > 1  # random frequencies, which no training moves
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def save_images(sizes: list[tuple[int, int]]) -> None:
    Path("images").mkdir()
    for i, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 255, (height, width), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{i}.png")


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path != folder}


def test_the_same_command_writes_over_nothing_and_resume_goes_on_with_its_settings(folder: Path, typed: Typed) -> None:
    command = ["train", "flow", *SHORT, *options("flow"), "-o", "run.trajectory"]
    assert lcsc(command) == 0
    before = written(folder)
    assert "run.trajectory exists already: continue with --resume, or name another" in typed.refused(*command)
    assert written(folder) == before
    with only_process(folder / "run.model", busy="never"):
        before = written(folder)
        assert "run.trajectory: another process trains it; wait until" in typed.refused(*command, "--resume")
        assert written(folder) == before
    Path("run.yaml").write_text("# changed by its user\n")
    assert lcsc([*command, "--resume", "--steps", "8"]) == 0
    assert Trajectory.open("run.trajectory").steps == (2, 4, 6, 8)
    assert Path("run.yaml").read_text() == "# changed by its user\n"
    for option, value, begun in (("--seed", "1", 0), ("--steps", "6", 8)):
        said = typed.refused(*command, "--resume", "--steps", "8", option, value)
        assert said == f"lcsc: {option[2:]}: cannot be changed when resuming (was {begun})"
    description = Path("run.model/training.json")
    assert json.loads(description.read_text())["steps"] == 8
    for damaged in ("{", "[1]"):
        description.write_text(damaged)
        said = typed.refused(*command, "--resume")
        assert "training.json: cannot be read (" in said
        assert said.endswith("); move the files of this training, or name another trajectory")


def test_the_study_file_of_any_name_can_be_run(folder: Path, typed: Typed) -> None:
    said = typed("train", "flow", *SHORT, *options("flow"), "-o", "my run (2).trajectory").err
    assert "next: lcsc run 'my run (2).yaml'\n" in said
    assert yaml.safe_load(Path("my run (2).yaml").read_text())["name"] == "my-run-2"
    few = [f"objective.settings.{key}=6" for key in ("images", "batch_size")]
    few += [f"objective.settings.loss={PIXELS}", "objective.settings.held_out_metrics=[]"]
    assert lcsc(["run", "my run (2).yaml", *few, "held_out.images=6", "--budget", "4", "--dry-run"]) == 0


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and models that do not suit."""
    made = tmp_path_factory.mktemp("wrong")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        save_images([(8, 8), (8, 10)])
        Path("empty").mkdir()
        save_model("big.model", {"_class_name": "EDMEulerScheduler"})
        unet(1, channels=3).save_pretrained("big.model/unet")
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["flow", "--data", "nowhere"],
            "--data: nowhere does not exist; expected digits, photographs, mnist, cifar10",
        ),
        (["flow", "--data", "images"], "--data: images: images differ in size: 0.png is 8x8 and 1.png 8x10"),
        (["flow", "--from", "edm.model"], "--from: edm.model is a edm model, and flow starts from flow"),
        (["flow", "--resume"], "run.trajectory: nothing to resume"),
        (["cd"], "cd needs an EDM model: name its folder with --teacher"),
        (["cd", "--teacher", "big.model"], "big.model is for [3, 8, 8], and the training data is [1, 8, 8]"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(
    folder: Path, wrong: Path, arguments: list[str], message: str, typed: Typed
) -> None:
    shutil.copytree(wrong, folder, dirs_exist_ok=True)
    before = set(folder.rglob("*"))
    assert message in typed.refused("train", arguments[0], *SHORT, "-o", "run.trajectory", *arguments[1:])
    made = {path for path in folder.rglob("*") if "studies.files" not in path.parts}
    assert made == before
