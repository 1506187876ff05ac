"""``lcsc init``: a study file for whatever lies in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.cli import run as lcsc
from tests.checkpoints import checkpoint_examples
from tests.commands import Typed
from tests.objectives.image_objectives import PIXELS
from tests.unet_examples import unet

pytestmark = pytest.mark.usefixtures("workplace")


def plain() -> None:
    Path("runs").mkdir()
    for step in (1, 2, 3):
        save_file({"w": torch.ones(2) * step}, Path("runs") / f"model{step}.safetensors")


def test_a_run_of_diffusers_next_to_real_images_needs_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    for step in (100, 200, 300):
        unet(step).save_pretrained(Path("out") / f"checkpoint-{step}" / "unet")
    Path("real").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(Path("real") / f"{i}.png")
    assert lcsc(["init", "out"]) == 0
    said = capsys.readouterr().err
    assert "study.yaml: 3 checkpoints, steps 100 to 300, for objectives/diffusers_unconditional.py" in said
    text = Path("study.yaml").read_text()
    assert "FILL IN" not in text
    assert "space: {rows: layers}   # coefficients for each layer; one row for all: affine" in text
    small = ["budget.evaluations=13", "objective.settings.images=12", "held_out=null"]
    small.append(f"objective.settings.loss={PIXELS}")  # Inception would be downloaded
    assert lcsc(["run", "study.yaml", *small, "--dry-run"]) == 0
    assert lcsc(["run", "study.yaml", *small, "--optimizer", "LCSCGradient"]) == 0
    assert lcsc(["init", "out"]) == 2
    assert "study.yaml: exists already" in capsys.readouterr().err


def test_what_only_the_user_knows_is_marked_and_named_by_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    plain()
    assert lcsc(["init", "runs", "-o", "mine.yaml", "--reference", "cifar10-train"]) == 0
    names = [f"objective.settings.{name}" for name in ("model", "sampler", "image_shape")]
    assert f"to be filled in: {', '.join(names)}" in capsys.readouterr().err
    assert lcsc(["run", "mine.yaml", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in names)
    assert "reference: cifar10-train" in Path("mine.yaml").read_text()


def test_one_checkpoint_is_no_range_of_steps(typed: Typed) -> None:
    plain()
    assert "study.yaml: 1 checkpoint, step 3, for objectives/" in typed("init", "runs/model3.safetensors").err


def test_real_images_that_do_not_exist_are_refused(typed: Typed) -> None:
    plain()
    said = typed.refused("init", "runs", "--reference", "nowhere")
    assert said.startswith("lcsc: reference: nowhere does not exist, and is not a data set; known: cifar10-train")
    assert "is not a reference" in typed.refused("init", "runs", "reference=runs/model1.safetensors")
    assert not Path("study.yaml").exists()
    Path("elsewhere/photographs").mkdir(parents=True)
    typed("init", "runs", "-o", "elsewhere/study.yaml", "--reference", "photographs")


@pytest.mark.parametrize("name", ["JiT, RiT, JLT", "icefall", "torchtitan with its EMA", "OLMo-core"])
def test_a_folder_of_a_known_trainer_needs_no_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_examples.write(name, Path("run"))
    assert lcsc(["init", "run"]) == 0, capsys.readouterr().err
    assert "steps 100 to 300" in next(Path().glob("*.yaml")).read_text()


def test_of_many_checkpoints_it_says_how_many_are_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lcsc_opt.coefficients.layer_groups._MANY_CHECKPOINTS", 2)
    for step in (100, 200, 300):
        unet(step).save_pretrained(Path("out") / f"checkpoint-{step}" / "unet")
    assert lcsc(["init", "out", "--reference", "cifar10-train"]) == 0
    assert "for the next training: 3 checkpoints: with a row of coefficients for each layer" in capsys.readouterr().err


def test_answers_go_into_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    plain()
    answers = iter(["models:build", "models:sample", "[3, 8, 8]", ""])
    monkeypatch.setattr("lcsc_opt.cli.studies._ask", lambda name, what: next(answers, "") or None)
    assert lcsc(["init", "runs"]) == 0
    text = Path("study.yaml").read_text()
    for line in ("model: models:build", "image_shape: [3, 8, 8]", "reference: 'FILL IN: a folder of real images"):
        assert line in text
    assert lcsc(["trajectory", "pack", "runs", "-o", "letters.trajectory"]) == 0
    assert lcsc(["init", "letters.trajectory", "-o", "letters.yaml"]) == 0
    assert "name: letters" in Path("letters.yaml").read_text()


@pytest.mark.parametrize(
    ("config", "tensors", "lines"),
    [
        ({"config.json": {"model_type": "llama"}}, ["lm_head.weight"], ["model: ", "score: ", "- LCSCGradient"]),
        ({}, ["conv.weight", "fc.weight"], ["model: 'FILL IN", "score: 'FILL IN", "- LCSCGradient"]),
        (
            {"adapter_config.json": {"task_type": "CAUSAL_LM", "base_model_name_or_path": "me/base"}},
            ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"],
            ["model: 'FILL IN", "score: 'FILL IN", "- LCSCGradient"],
        ),
        (  # what peft writes where no task was named
            {"adapter_config.json": {"auto_mapping": {"parent_library": "transformers.models.gpt2.modeling_gpt2"}}},
            ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"],
            ["model: 'FILL IN", "score: 'FILL IN", "- LCSCGradient"],
        ),
    ],
    ids=["transformers", "classifier", "adapter", "adapter without a task"],
)
def test_what_makes_no_images_gets_a_score(config: dict[str, object], tensors: list[str], lines: list[str]) -> None:
    for step in (100, 200):
        folder = Path("out") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name, content in config.items():
            (folder / name).write_text(json.dumps(content))
        name = "adapter_model" if "adapter_config.json" in config else "model"
        save_file({tensor: torch.ones(5, 5) for tensor in tensors}, folder / f"{name}.safetensors")
    assert lcsc(["init", "out"]) == 0
    text = Path("study.yaml").read_text()
    assert all(line in text for line in ("file: score.py", *lines)), text
    assert "reference" not in text
    assert lcsc(["run", "study.yaml", "--dry-run"]) == 2  # the score is still to be filled in


def loras(*names: str) -> None:
    Path("loras").mkdir()
    for step in (1, 2):
        save_file({name: torch.ones(2, 2) for name in names}, Path("loras") / f"checkpoint-{step}.safetensors")


def test_a_lora_asks_for_its_pipeline_and_prompts() -> None:
    loras(*(f"unet.mid.attn.to_q.lora_{part}.weight" for part in ("A", "B")))
    assert lcsc(["init", "loras"]) == 0
    text = Path("study.yaml").read_text()
    for line in ("file: latent_diffusion.py", "component: lora", "- LCSCGradient"):
        assert line in text
    assert text.count("FILL IN") == 3


@pytest.mark.parametrize(("count", "taken"), [(2000, True), (2001, False)])
def test_a_file_of_more_prompts_than_images_is_not_taken(count: int, taken: bool) -> None:
    loras(*(f"unet.mid.attn.to_q.lora_{part}.weight" for part in ("A", "B")))
    Path("captions.txt").write_text("\n".join(f"a cat {number}" for number in range(count)))
    assert lcsc(["init", "loras"]) == 0
    text = Path("study.yaml").read_text()
    assert ("prompts: captions.txt" in text) == taken
    assert ("at most as many as images" in text) == (not taken)


@pytest.mark.parametrize(
    "name", ["photos #1", "2024", "a: b", "1e-4", "null", "it's", "[x", "ünï", "a\nb", "2024-01-01"]
)
def test_names_of_files_are_written_as_text(name: str) -> None:
    Path(name).mkdir()
    for step in (1, 2):
        save_file({"w": torch.ones(2) * step}, Path(name) / f"model{step}.safetensors")
    assert lcsc(["init", name, "--reference", name]) == 0
    study = parse_yaml(Path("study.yaml").read_text(encoding="utf-8"))
    assert study["objective"]["settings"]["checkpoints"] == name
    assert study["objective"]["settings"]["reference"] == name
    assert isinstance(study["name"], str)


def test_an_answer_is_text_unless_the_setting_is_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    plain()
    answers = {"model": "2024", "sampler": "photos #1", "image_shape": "[3, 8, 8]", "reference": "a: b"}
    monkeypatch.setattr("lcsc_opt.cli.studies._ask", lambda name, what: answers[name])
    assert lcsc(["init", "runs"]) == 0
    settings = parse_yaml(Path("study.yaml").read_text())["objective"]["settings"]
    assert {name: settings[name] for name in answers} == {**answers, "image_shape": [3, 8, 8]}


def test_an_answer_that_is_no_yaml_is_written_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    plain()
    monkeypatch.setattr("lcsc_opt.cli.studies._ask", lambda name, what: "[3, 8" if name == "image_shape" else None)
    assert lcsc(["init", "runs"]) == 0
    assert parse_yaml(Path("study.yaml").read_text())["objective"]["settings"]["image_shape"] == "[3, 8"


def test_folders_without_permission_and_huge_images_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    plain()
    Path("locked").mkdir()
    Path("real").mkdir()
    for size in (64, 8):
        Image.new("L", (size, size)).save(Path("real") / f"of_{size}_pixels.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    iterdir = Path.iterdir

    def refuse_locked(path: Path) -> Iterator[Path]:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse_locked)
    assert lcsc(["init", "runs"]) == 0
    settings = parse_yaml(Path("study.yaml").read_text())["objective"]["settings"]
    assert settings["reference"] == "real"
    assert settings["image_shape"] == [1, 8, 8]


@pytest.mark.parametrize("page", ["start.md", "tutorials/letters.ipynb"])
def test_the_documentation_runs_the_file_that_init_writes(page: str) -> None:
    plain()
    assert lcsc(["init", "runs"]) == 0
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    commands = text[text.index("lcsc init") :].split("lcsc init", 2)[1]  # up to where it is shown once more
    files = re.findall(r"lcsc run (\S+\.yaml)", commands)
    assert files
    assert all(Path(file).is_file() for file in files), files
