"""``lcsc init``: the template of a kind, with what lies in the folder as a fact, and the lines that are left."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.base.study_file import FILL_IN
from lcsc_opt.cli import run as lcsc
from lcsc_opt.objective.settings import CheckpointSettings
from tests.checkpoints.nvlabs_examples import write_snapshot
from tests.commands import Typed
from tests.objectives.edm_networks import tiny
from tests.unet_examples import unet

pytestmark = pytest.mark.usefixtures("workplace")


def plain() -> None:
    Path("runs").mkdir()
    for step in (1, 2, 3):
        save_file({"w": torch.ones(2) * step}, Path("runs") / f"model{step}.safetensors")


def diffusers_run(*, scheduler: bool = True, **config: Any) -> None:
    """A training of diffusers in ``out``, next to images and a text that are none of its business."""
    for step in (100, 200, 300):
        network = unet(step)
        network.register_to_config(**config)
        network.save_pretrained(Path("out") / f"checkpoint-{step}" / "unet")
    if scheduler:
        Path("out/scheduler").mkdir()
        Path("out/scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
        network.save_config("out/unet")
    Path("samples").mkdir()
    for name in ("samples/1.png", "samples/2.png", "captions.txt"):
        Path(name).write_text("a cat")


def init(*arguments: str) -> tuple[dict[str, Any], set[str]]:
    """The settings of the study file that is written, and the names of the lines that are to be filled in."""
    assert lcsc(["init", *arguments]) == 0
    text = Path("study.yaml").read_text(encoding="utf-8")
    missing = {line.partition(":")[0].strip() for line in text.splitlines() if FILL_IN in line}
    return parse_yaml(text)["objective"]["settings"], missing


def test_of_a_diffusers_run_only_the_real_images_are_missing(typed: Typed) -> None:
    diffusers_run()
    settings, missing = init("diffusers", "out")
    assert missing == {"reference"}
    assert settings["model"] == "out"
    assert settings["sampler"] == {"steps": 50}  # the scheduler of the run, with its betas and its clipping
    assert "labels" not in settings


def test_without_the_runs_scheduler_the_sampler_is_a_question(typed: Typed) -> None:
    diffusers_run(scheduler=False)
    settings, missing = init("diffusers", "out")
    assert missing == {"reference", "sampler"}
    assert settings["model"] == "out/checkpoint-300"


def test_a_checkpoint_with_its_scheduler_is_preferred_to_a_configuration_without(typed: Typed) -> None:
    """As pipelines that were saved below a root with the network's configuration alone."""
    diffusers_run()
    Path("out/scheduler").rename("out/checkpoint-300/scheduler")
    settings, missing = init("diffusers", "out")
    assert (settings["model"], missing) == ("out/checkpoint-300", {"reference"})


def test_a_model_that_is_named_says_what_the_folder_of_the_checkpoints_does_not() -> None:
    diffusers_run()
    plain()
    settings, missing = init("diffusers", "runs", "model=out")
    assert (settings["model"], missing) == ("out", {"reference"})


@pytest.mark.parametrize(
    ("classes", "advice"),
    [
        ("num_class_embeds", "classes 0 to 4; if 4 means no class, add guidance: {scale: 1, null_label: 4}"),
        # the null label of DiT is a row beside those of its classes
        (
            "num_embeds_ada_norm",
            "classes 0 to 4; for classifier-free guidance, add guidance: {scale: 1.5, null_label: 5}",
        ),
    ],
)
def test_shapes_classes_and_latents_are_read_from_the_configuration(classes: str, advice: str) -> None:
    config: dict[str, Any] = {"sample_size": None, classes: 5, "in_channels": 4}
    diffusers_run(**config)
    settings, missing = init("diffusers", "out")
    assert missing == {"reference", "image_shape", "decoder"}
    assert settings["labels"] == "balanced"
    assert advice in Path("study.yaml").read_text()


def test_a_network_that_reads_text_needs_its_pipeline_and_prompts() -> None:
    diffusers_run(cross_attention_dim=8)
    settings, missing = init("diffusers", "out")
    assert missing == {"pipeline", "prompts", "guidance_scale", "reference"}
    assert settings["component"] == "unet"


@pytest.mark.parametrize("classes", [0, 3])
def test_a_snapshot_of_edm_tells_its_class_and_its_labels(classes: int) -> None:
    Path("edm").mkdir()
    for step in (100, 200):
        write_snapshot(Path("edm") / f"network-snapshot-{step:06d}.pkl", tiny(step, label_dim=classes))
    settings, missing = init("edm", "edm")
    assert missing == {"network", "reference"}
    assert ("labels" in settings) == bool(classes)
    assert "training.networks:TinyPrecond: your copy of this class" in Path("study.yaml").read_text()


def test_checkpoints_without_the_interface_of_edm_ask_for_a_snapshot() -> None:
    plain()
    assert init("edm", "runs")[1] == {"network", "arguments_from", "reference"}


def adapters(config: dict[str, object]) -> None:
    for step in (100, 200):
        folder = Path("out") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {f"base_model.model.q.lora_{part}.weight": torch.ones(5, 5) for part in "AB"}
        save_file(tensors, folder / "adapter_model.safetensors")


def test_a_lora_asks_for_its_pipeline_unless_peft_names_it() -> None:
    adapters({"base_model_name_or_path": "me/pipeline", "auto_mapping": "none"})
    settings, missing = init("lora", "out")
    assert missing == {"prompts", "guidance_scale", "reference"}
    assert (settings["component"], settings["pipeline"]) == ("lora", "me/pipeline")


def test_what_is_given_stands_in_place_of_its_examples() -> None:
    adapters({"base_model_name_or_path": "me/pipeline", "auto_mapping": "none"})
    given = {"loss": "fdr@mine:Net", "keep": "reward", "reward": "mine:fits"}
    settings, _ = init("lora", "out", *(f"{key}={value}" for key, value in given.items()))
    assert given.items() <= settings.items()
    lines = [line.strip() for line in Path("study.yaml").read_text().splitlines()]
    for key, value in given.items():
        assert [line for line in lines if line.startswith((f"{key}:", f"# {key}:"))] == [f"{key}: {value}"]
    assert [line for line in lines if line.startswith("# trainer_ema: FILE")], "an example of what was not given"


@pytest.mark.parametrize(
    ("given", "keep"),
    [
        (["reward=mine:fits"], "reward"),
        (["reward=mine:fits", "keep={reward: 0.8}"], {"reward": 0.8}),
        (["reward=mine:fits", "loss={fdr: 1, reward: -1}"], None),
        ([], None),
    ],
)
def test_a_reward_that_is_given_is_kept_unless_it_is_in_the_loss(given: list[str], keep: object) -> None:
    adapters({"base_model_name_or_path": "me/pipeline", "auto_mapping": "none"})
    assert init("lora", "out", *given)[0].get("keep") == keep


def test_loras_are_no_models_of_diffusers(typed: Typed) -> None:
    adapters({"base_model_name_or_path": "me/pipeline", "auto_mapping": "none"})
    assert "a LoRA, and no whole model: lcsc init lora" in typed.refused("init", "diffusers", "out")


@pytest.mark.parametrize(
    "config",
    [
        {"task_type": "CAUSAL_LM"},
        {"auto_mapping": {"parent_library": "transformers.models.gpt2.modeling_gpt2"}},  # where no task was named
    ],
)
def test_an_adapter_of_a_language_model_has_a_score(config: dict[str, object], typed: Typed) -> None:
    adapters({**config, "base_model_name_or_path": "me/base"})
    assert "lcsc init score" in typed.refused("init", "lora", "out")
    assert "model" in init("score", "out")[1]
    assert "which returns me/base with this adapter" in Path("study.yaml").read_text()


def test_a_model_of_transformers_is_its_own_configuration() -> None:
    for step in (100, 200):
        folder = Path("out") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({"lm_head.weight": torch.ones(5, 5)}, folder / "model.safetensors")
    settings, missing = init("score", "out")
    assert settings["model"] == "out/checkpoint-200"
    assert missing == {"score", "maximize", "size"}


def test_init_and_run_list_the_same_lines(typed: Typed) -> None:
    plain()
    wrote = typed("init", "module", "runs", "model=my:build").err
    (listed,) = re.findall(r"to be filled in:\n(.*?)\nnext: lcsc run study.yaml", wrote, re.S)
    names = [line.partition(":")[0].strip() for line in listed.splitlines()]
    assert names == ["sampler", "image_shape", "reference"]
    assert all("# e.g. " in line for line in listed.splitlines())
    assert listed in typed("run", "study.yaml", status=2).err
    fewer = typed("run", "study.yaml", "objective.settings.reference=real", "--dry-run", status=2).err
    assert "  reference" not in fewer
    assert "  sampler" in fewer


def test_what_is_to_be_filled_in_is_said_before_torch_is_imported() -> None:
    plain()
    init("module", "runs")
    program = (
        "import sys\n"
        "from lcsc_opt.cli import run\n"
        "status = run(['run', 'study.yaml'])\n"
        "print(status, [name for name in ('torch', 'optuna', 'nevergrad') if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "2 []"
    assert "to be filled in" in ended.stderr


def test_a_file_that_is_there_is_left_alone(typed: Typed) -> None:
    plain()
    init("score", "runs")
    file = Path("study.yaml")
    written = file.read_text()
    assert "exists already" in typed("init", "score", "runs", "maximize=true", status=2).err
    assert file.read_text() == written


def test_steps_that_no_name_tells_are_given_to_init_and_searched(typed: Typed) -> None:
    Path("runs").mkdir()
    for name in ("first", "second"):
        save_file({"weight": torch.full((2,), float(len(name)))}, f"runs/{name}.safetensors")
    assert "give their steps (--steps" in typed.refused("init", "score", "runs", "maximize=true")
    files = [f"runs/{name}.safetensors" for name in ("second", "first")]
    settings, _ = init("score", *files, "maximize=true", "--steps", "100,200")
    assert (settings["checkpoints"], settings["steps"]) == (files, [100, 200])
    checked = CheckpointSettings(checkpoints=files, steps=settings["steps"])
    trajectory = checked.trajectory(BuildContext(files=Path("packed")))
    assert trajectory.steps == (100, 200)
    assert trajectory.sources[0].endswith("second.safetensors")


def test_a_glob_and_the_files_that_a_shell_makes_of_it_are_alike(typed: Typed) -> None:
    Path("runs").mkdir()
    for step in (5, 10):
        save_file({"weight": torch.full((2,), float(step))}, f"runs/epoch=1-step={step}.safetensors")
    files = ["runs/epoch=1-step=10.safetensors", "runs/epoch=1-step=5.safetensors"]  # as a shell sorts them
    typed("init", "score", "runs/*.safetensors", "maximize=true")
    by_glob = yaml.safe_load(Path("study.yaml").read_text())
    assert "2 checkpoints, steps 5 to 10" in typed("init", "score", *files, "maximize=true", "-o", "files.yaml").err
    by_files = yaml.safe_load(Path("files.yaml").read_text())
    settings = by_files["objective"]["settings"]
    assert settings["checkpoints"] == files
    settings["checkpoints"] = "runs/*.safetensors"
    assert by_files == by_glob
    typed("init", "score", "runs/epoch=*.safetensors", "-o", "signs.yaml")
    assert "not_there.pt" in typed.refused("init", "score", *files, "not_there.pt")


@pytest.mark.parametrize("given", ["budget.evaluations=8", "objective.settings.images=3", "~held_out=", "=3"])
def test_what_is_no_setting_is_for_run(typed: Typed, given: str) -> None:
    plain()
    assert "lcsc run takes" in typed.refused("init", "score", "runs", given)
    assert not Path("study.yaml").exists()


@pytest.mark.parametrize("page", ["start.md", "tutorials/mnist.ipynb"])
def test_the_documentation_runs_the_file_that_init_writes(page: str) -> None:
    plain()
    init("module", "runs")
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    commands = text[text.index("lcsc init") :].split("lcsc init", 2)[1]  # up to where it is shown once more
    files = re.findall(r"lcsc run (\S+\.yaml)", commands)
    assert files
    assert all(Path(file).is_file() for file in files), files


def test_a_packed_trajectory_may_be_named_from_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    plain()
    assert lcsc(["trajectory", "pack", "runs", "-o", "run.trajectory"]) == 0
    monkeypatch.setenv("HOME", str(Path.cwd()))
    settings, _ = init("module", "~/run.trajectory")
    assert settings["checkpoints"] == "~/run.trajectory"
