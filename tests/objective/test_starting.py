"""``lcsc init``: the template of a kind, with what lies in the folder as a fact, and the lines that are left."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
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


def snapshots_of_edm(classes: int) -> None:
    Path("edm").mkdir()
    for step in (100, 200):
        write_snapshot(Path("edm") / f"network-snapshot-{step:06d}.pkl", tiny(step, label_dim=classes))


def adapters(config: dict[str, object]) -> None:
    for step in (100, 200):
        folder = Path("out") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {f"base_model.model.q.lora_{part}.weight": torch.ones(5, 5) for part in "AB"}
        save_file(tensors, folder / "adapter_model.safetensors")


def model_of_transformers() -> None:
    for step in (100, 200):
        folder = Path("out") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({"lm_head.weight": torch.ones(5, 5)}, folder / "model.safetensors")


NAMED_BY_PEFT: dict[str, object] = {"base_model_name_or_path": "me/pipeline", "auto_mapping": "none"}
CLASSES_OR_NOT = "if 4 means no class, add guidance: {scale: 1, null_label: 4}"
YOUR_COPY = "training.networks:TinyPrecond: your copy of this class"
KINDS: dict[str, tuple[Callable[[], object], str, str, dict[str, Any], str]] = {
    "a run of diffusers, whose scheduler has its betas and its clipping": (
        diffusers_run, "diffusers out", "reference", {"model": "out", "sampler": {"steps": 50}, "labels": None}, "",
    ),
    "without the run's scheduler the sampler is a question": (
        partial(diffusers_run, scheduler=False), "diffusers out", "reference sampler",
        {"model": "out/checkpoint-300"}, "",
    ),
    "a model that is named says what the folder of the checkpoints does not": (
        lambda: (diffusers_run(), plain()), "diffusers runs model=out", "reference", {"model": "out"}, "",
    ),
    "shapes, classes and latents are read from the configuration": (
        partial(diffusers_run, sample_size=None, num_class_embeds=5, in_channels=4), "diffusers out",
        "reference image_shape decoder", {"labels": "balanced"}, CLASSES_OR_NOT,
    ),
    "a network that reads text needs its pipeline and prompts": (
        partial(diffusers_run, cross_attention_dim=8), "diffusers out", "pipeline prompts guidance_scale reference",
        {"component": "unet"}, "",
    ),
    "a snapshot of EDM tells its class": (
        partial(snapshots_of_edm, 0), "edm edm", "network reference", {"labels": None}, YOUR_COPY,
    ),
    "and its labels": (
        partial(snapshots_of_edm, 3), "edm edm", "network reference", {"labels": "balanced"}, YOUR_COPY,
    ),
    "checkpoints without the interface of EDM ask for a snapshot": (
        plain, "edm runs", "network arguments_from reference", {}, "",
    ),
    "a LoRA asks for its pipeline unless PEFT names it": (
        partial(adapters, NAMED_BY_PEFT), "lora out", "prompts guidance_scale reference",
        {"component": "lora", "pipeline": "me/pipeline"}, "",
    ),
    "a model of transformers is its own configuration": (
        model_of_transformers, "score out", "score maximize size", {"model": "out/checkpoint-200"}, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lies_there", "arguments", "missing", "known", "said"), KINDS.values(), ids=KINDS)
def test_what_lies_in_the_folder_is_known_and_the_rest_is_to_be_filled_in(
    lies_there: Callable[[], object], arguments: str, missing: str, known: dict[str, Any], said: str
) -> None:
    lies_there()
    settings, to_fill_in = init(*arguments.split())
    assert to_fill_in == set(missing.split())
    assert {name: settings.get(name) for name in known} == known
    assert said in Path("study.yaml").read_text()


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
    assert "pass --steps" in typed.refused("init", "score", "runs", "maximize=true")
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
