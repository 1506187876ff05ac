"""An experiment knows its checkpoints: whatever happens to their folder, it goes on with exactly these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lcsc_opt import Trajectory, TrajectoryWriter, load_study
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.measurement import Measurement
from lcsc_opt.database.store import StoredStudy
from tests.commands import Typed
from tests.model_studies import OBJECTIVE, state_dict

STEPS = (10, 20, 30)
IMPORTS = "from lcsc_opt.objective.settings import CheckpointSettings\n"
OPENING = """
def build(settings, context):
    trajectory = CheckpointSettings(checkpoints=settings["checkpoints"]).trajectory(context)
    return Model(trajectory, 0.0, None)
"""
OBJECTIVE_HERE = IMPORTS + OBJECTIVE.replace("Trajectory.open(path)", "path").partition("def build(")[0] + OPENING
STUDY = """
name: grown
objective: {file: grown_model.py, settings: {checkpoints: runs}}
optimizers: [LCSC, CMA]
budget: {evaluations: 3}
held_out: {images: 20, top: 1}
"""
NAME = "grown/LCSC/0"
RUN = ["run", "grown.yaml", "--optimizer", "LCSC"]


def save(*steps: int, folder: str = "runs", shift: int = 0) -> None:
    Path(folder).mkdir(exist_ok=True)
    for step in steps:
        save_file(state_dict(step + shift), Path(folder) / f"model{step:06d}.safetensors")


def stored(name: str = "grown") -> StoredExperiment:
    return StoredExperiment.open(open_storage("sqlite:///studies.db", write=True), name)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("grown_model.py").write_text(OBJECTIVE_HERE)
    Path("grown.yaml").write_text(STUDY)
    return tmp_path


@pytest.fixture
def begun() -> None:
    save(*STEPS)
    assert lcsc(RUN) == 0


def packed() -> int:
    return len(list(Path("studies.files").glob("*.trajectory")))


COMMANDS = [
    ["evaluate", "grown", "--images", "30"],
    ["export", NAME, "-o", "recipe.json"],
    [*RUN, "--budget", "5"],
]


def grow() -> None:
    save(40)


def copy_elsewhere() -> None:
    """Another study packs a copy; then the first study's own packed copy is lost."""
    [own] = Path("studies.files").iterdir()
    shutil.copytree("runs", "copied")
    Path("copied.yaml").write_text(
        STUDY.replace("grown\n", "copied\n").replace("checkpoints: runs", "checkpoints: copied")
    )
    assert lcsc(["run", "copied.yaml", "--optimizer", "LCSC"]) == 0
    shutil.rmtree(own)


def remove() -> None:
    shutil.rmtree("runs")


def write_others() -> None:
    save(20, shift=57)


@pytest.mark.parametrize("accident", [grow, copy_elsewhere, remove, write_others])
def test_every_command_finds_them_again_says_so_and_packs_nothing(
    begun: None, accident: Callable[[], None], typed: Typed
) -> None:
    before = load_study(NAME).objective.trajectory
    assert before is not None
    accident()
    for command in COMMANDS:
        said = [line for line in typed(*command).err.splitlines() if "runs:" in line and "lcsc:" in line]
        is_said = accident != copy_elsewhere  # which changes nothing at the place
        assert ["continuing with the 3 packed checkpoints" in line for line in said] == [True] * is_said, command
        assert ["is gone" in line for line in said] == [accident == remove] * is_said, command
        assert packed() == 1, command
        assert load_study(NAME).objective.trajectory.sha256 == before.sha256, command  # type: ignore[union-attr]


@pytest.mark.parametrize("named", [False, True])
def test_the_trainers_ema_stays_in_the_report_when_the_files_are_gone(typed: Typed, named: bool) -> None:
    Path("runs").mkdir()
    for step in STEPS:
        torch.save({"model": state_dict(step), "ema": state_dict(step - 7)}, f"runs/model{step}.pt")
    torch.save(state_dict(1), "ema.pt")
    opening = OBJECTIVE_HERE.replace("[path], ", "[path], key='model', ")
    if named:  # it is not packed, but its measurement is stored
        opening = opening.replace(
            "    return Model", "    trajectory.trainer_ema_at = context.path('ema.pt')\n    return Model"
        )
    Path("grown_model.py").write_text(opening)
    typed(*RUN)
    with_files = trainers_ema()
    shutil.rmtree("runs")
    Path("ema.pt").unlink()
    again = typed(*RUN, "--budget", "5").err
    assert trainers_ema() == with_files
    assert "is left out" not in again
    if not named:
        typed("evaluate", "grown", "--images", "30", "--keep")
        assert trainers_ema().images == 30, "it can still be measured"


def trainers_ema() -> Measurement:
    report = stored().report
    assert report is not None
    measured = report.measured("trainer's EMA")
    assert measured is not None
    return measured


def test_other_weights_without_a_packed_copy_are_refused(begun: None, typed: Typed) -> None:
    write_others()
    shutil.rmtree("studies.files")
    said = typed("run", NAME, "--budget", "6", status=2).err
    assert "does not hold the 3 checkpoints that the study was begun with (steps 10 to 30)" in said


def test_a_finished_study_is_told_where_its_checkpoints_are_now(begun: None, typed: Typed) -> None:
    save(*STEPS, folder="others", shift=1)
    Path("runs").rename("elsewhere")
    shutil.rmtree("studies.files")
    export = ["export", NAME, "-o", "model.safetensors"]
    said = typed(*export, status=2).err
    assert "runs: does not hold the 3 checkpoints that the study was begun with" in said
    assert "lcsc run FILE objective.settings.checkpoints=PLACE" in said
    assert "others: does not hold the 3" in typed(*RUN, "objective.settings.checkpoints=others", status=2).err
    assert lcsc(export) == 2
    Path("grown_model.py").write_text(f"{OBJECTIVE_HERE}EDITED = True\n")
    moved = [*RUN, "objective.settings.checkpoints=elsewhere"]
    assert "grown_model.py changed" in typed(*moved, status=2).err
    typed(*moved, "--accept-changes")
    assert stored().attributes["objective"]["settings"]["checkpoints"] == "elsewhere"
    assert lcsc(export) == 0
    assert len(load_study(NAME).trials) == 3


def test_what_was_found_in_checkpoints_that_were_written_again_is_not_returned(begun: None, typed: Typed) -> None:
    assert "written again" not in typed(*RUN).err
    save(*STEPS, shift=1)
    for option in ((), ("--dry-run",)):
        assert "the checkpoints were written again" in typed(*RUN, *option, status=2).err
    typed("run", NAME, "name=second")
    assert stored("second").attributes["checkpoints"] != stored().attributes["checkpoints"]


def test_a_training_loop_that_goes_on_writing_disturbs_nobody(typed: Typed) -> None:
    with TrajectoryWriter("runs") as writer:
        for step in STEPS:
            writer.append(step, state_dict(step))
    assert "newer checkpoints" not in typed(*RUN).err + typed(*RUN).err
    with TrajectoryWriter("runs", resume=30) as writer:
        writer.append(40, state_dict(40))
    assert "there are newer checkpoints now" in typed(*RUN).err
    assert "has changed; continuing with" in typed("run", NAME, "--budget", "6").err
    assert lcsc(["export", NAME, "-o", "model.safetensors"]) == 0
    merged = Trajectory.open("runs", steps=STEPS).merge(load_study(NAME).coefficients)
    for name, tensor in load_file("model.safetensors").items():
        torch.testing.assert_close(tensor, merged[name])


def test_checkpoints_that_were_left_out_are_no_news(typed: Typed) -> None:
    save(*STEPS)
    own = Path("grown_model.py")
    selected = own.read_text().replace("context.files,", "context.files, selection=Selection(last_step=20),")
    own.write_text(f"from lcsc_opt.checkpoints.finding import Selection\n{selected}")
    assert "has changed" not in typed(*RUN).err + typed(*RUN, "--budget", "4").err


def test_a_start_begins_on_a_longer_trajectory_from_the_found_coefficients(begun: None, typed: Typed) -> None:
    save(5, 40)
    found = load_study(NAME).coefficients
    typed(*RUN, "name=NEW", f"start={NAME}", "--budget", "3")
    longer = load_study("NEW/LCSC/0")
    assert longer.steps == (5, 10, 20, 30, 40)
    assert len(longer.trials) == 3
    asked = [trial["coefficients"] for trial in longer.trials]
    np.testing.assert_allclose(asked[0], [0.0, *found, 0.0], rtol=0, atol=1e-12)
    typed("delete", NAME, "--yes")  # it knows where it began
    for again in (["run", longer.name], [*RUN, "name=NEW", f"start={NAME}"]):
        assert lcsc([*again, "--budget", str(len(longer.trials) + 2)]) == 0
    assert len(longer.trials) == 7
    assert [trial["coefficients"] for trial in longer.trials[:3]] == asked


@pytest.mark.parametrize("message", ["no checkpoint of step 20 is here", "its checkpoints have other weights here"])
def test_a_start_on_checkpoints_that_lack_some_leaves_nothing_behind(begun: None, message: str, typed: Typed) -> None:
    Path("runs/model000020.safetensors").unlink()
    if "weights" in message:
        write_others()
    said = typed(*RUN, "name=longer", f"start={NAME}", status=2).err
    assert f"start: {NAME}: {message}; give all checkpoints of that study (later ones may be added)" in said
    with pytest.raises(Exception, match="no such study"):
        load_study("longer/LCSC/0")


class TestDryRun:
    """It refuses what the run would refuse, and stores no study."""

    def refused(self, typed: Typed, *options: str) -> str:
        before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        said = typed(*RUN, "--dry-run", *options, status=2).err
        assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
        return said

    def test_another_environment_and_changed_code(self, begun: None, typed: Typed) -> None:
        storage = open_storage("sqlite:///studies.db", write=True)
        study = StoredStudy.open(storage, NAME)
        environment = study.attributes["environment"]
        environment["packages"]["numpy"] = "1.0.0"
        study.set_attribute("environment", environment)
        storage.engine.dispose()
        assert 'changed since it began: environment.packages.numpy was "1.0.0"' in self.refused(typed, "--budget", "6")
        Path("grown_model.py").write_text(Path("grown_model.py").read_text() + "\nother = 1\n")
        assert "grown_model.py changed" in self.refused(typed, "--budget", "6")
        experiment = stored()
        key = json.loads(json.dumps(experiment.attributes["key"]))
        key["decides"]["the checkpoints"] = "others"
        experiment.set_attribute("key", key)
        StoredStudy.open(experiment.storage, NAME).set_attribute("key", key["decides"])
        said = typed(*RUN, "--budget", "6", "--accept-changes", status=2).err
        assert "began with other checkpoints" in said

    def test_weights_that_are_missing(self, typed: Typed) -> None:
        save(*STEPS)
        Path("reference.npz").write_bytes(b"not looked into")
        own = "tests.unet_examples:"
        settings: dict[str, object] = {"checkpoints": "runs", "image_shape": [1, 8, 8]}
        settings |= {"model": f"{own}unet", "sampler": f"{own}unet"}
        settings |= {"loss": "fid", "reference": "reference.npz", "weights": {"inception": "w.pt"}}
        objective = {"file": "torch_module.py", "settings": settings}
        Path("grown.yaml").write_text(yaml.safe_dump({**yaml.safe_load(STUDY), "objective": objective}))
        assert "w.pt does not exist" in self.refused(typed)
        assert "w.pt does not exist" in typed(*RUN, status=2).err
        assert not Path("studies.files").exists()
