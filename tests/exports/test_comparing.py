"""``lcsc average`` and ``lcsc_opt.compare_averages``: checkpoints and averages of them, from the same noise."""

from __future__ import annotations

import io
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import lcsc_opt
from lcsc_opt.base.contact_sheet import thumbnails
from lcsc_opt.base.errors import LcscError, StudySpecError
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.exports.coefficients import coefficients_of_kind, usual_averages
from lcsc_opt.exports.recipe import Recipe
from tests import tiny_pipelines
from tests.commands import Typed
from tests.lora_files import SAVERS, deltas
from tests.objectives.image_objectives import PIXELS
from tests.unet_examples import unet

if not (find_spec("peft") and find_spec("transformers")):
    pytest.skip("needs peft and transformers", allow_module_level=True)

STEPS = (100, 200, 300)
TARGETS = ["to_q", "to_v", "to_out.0", "conv1"]
KOHYA_FILES = {100: "hat-000001.safetensors", 200: "hat-000002.safetensors", 300: "hat.safetensors"}
FAST = ("--sampler", "lcm", "--sampling-steps", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, LoRAs in each flavour and of another network, the training of a diffusion model, prompts, images."""
    from diffusers import DDPMPipeline, DDPMScheduler

    place = tmp_path_factory.mktemp("made")
    tiny_pipelines.stable_diffusion(place / "words").save_pretrained(place / "pipeline")
    for step in STEPS:
        network = tiny_pipelines.adapted_unet(step, TARGETS)
        for flavour in ("diffusers", "peft"):
            SAVERS[flavour](network, place / flavour / f"checkpoint-{step}")
        (place / "kohya").mkdir(exist_ok=True)
        weights = load_file(SAVERS["kohya"](network, place / "one"))
        save_file(weights, place / "kohya" / KOHYA_FILES[step], metadata={"ss_steps": str(step)})
        other = tiny_pipelines.save_lora(network, place / "other" / f"checkpoint-{step}")
        renamed = {name.replace("mid_block", "middle"): tensor for name, tensor in load_file(other).items()}
        assert any("middle" in name for name in renamed)
        save_file(renamed, other)
        for folder in ("model", "training"):
            unet(step).save_pretrained(place / folder / f"checkpoint-{step}" / "unet_ema")
    DDPMPipeline(unet(1), DDPMScheduler()).save_pretrained(place / "model")
    (place / "prompts.txt").write_text("a cat\na red house\n")
    (place / "photographs").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(image).save(place / "photographs" / f"{i}.png")
    return place


@pytest.fixture
def place(made: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with links to what was made."""
    for path in made.iterdir():
        (workplace / path.name).symlink_to(path)
    (workplace / "rewards_of_a_test.py").write_text(
        "def brightness(images, prompts):\n"
        "    assert len(prompts) == len(images)\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(workplace))
    return workplace


def column(compared: Any, kind: str) -> Any:
    return next(average for average in compared.averages if average.kind == kind)


def own_images(place: Path, lora: Path | None, compared: Any) -> Tensor:
    """``[2, 3, H, W]`` in [-1, 1] of the pipeline itself, with a LoRA that it loads, for the same noise."""
    from diffusers import DiffusionPipeline, LCMScheduler

    from lcsc_opt.base.records import SEARCH
    from lcsc_opt.sampling import ImageNoise

    pipeline = DiffusionPipeline.from_pretrained(place / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    noise = ImageNoise(0)
    drawn = {"latents": noise.batch(SEARCH, 0, 2, (4, 8, 8)), "generator": noise.generators(SEARCH, 0, 2)}
    prompts = ["a cat", "a red house"]
    called = pipeline(prompt=prompts, **drawn, num_inference_steps=2, guidance_scale=1.0, output_type="pt")
    images: Tensor = called.images * 2 - 1
    return images


@pytest.mark.parametrize("flavour", list(SAVERS))
def test_the_epochs_of_a_lora_are_sampled_and_the_chosen_one_is_exported(
    place: Path, typed: Typed, flavour: str
) -> None:
    export = ("--choose", "ema:0.995", "--export", "chosen.safetensors")
    said = typed("average", flavour, "--prompts", "prompts.txt", *FAST, "-o", "sheet.png", *export)
    assert "images: " in said.err
    assert "s left" in said.err, "progress has a remaining time"
    compared = lcsc_opt.compare_averages(flavour, prompts="prompts.txt", sampler="lcm", sampling_steps=2)
    assert [average.kind for average in compared.averages][:4] == ["step:100", "step:200", "step:300", "uniform"]
    assert compared.labels == ("a cat", "a red house")
    with Image.open("sheet.png") as sheet, Image.open(io.BytesIO(compared.sheet())) as without_choice:
        assert sheet.height == without_choice.height
        assert sheet.width > without_choice.width, "the chosen one has a column, too"

    expected = own_images(place, Path("chosen.safetensors"), compared)
    chosen = lcsc_opt.compare_averages(
        flavour, prompts=["a cat", "a red house"], sampler="lcm", sampling_steps=2, also=["ema:0.995"]
    )
    pixels = column(chosen, "ema:0.995").pixels.astype(int)
    assert np.abs(pixels - thumbnails(expected.numpy())).max() <= 1
    assert np.abs(pixels - thumbnails(own_images(place, None, compared).numpy())).max() > 1
    assert Recipe.read(Path("chosen.safetensors")).coefficients == tuple(ema_coefficients(STEPS, 0.995).tolist())


@pytest.mark.parametrize("flavour", list(SAVERS))
def test_apply_writes_a_lora_with_its_alphas(place: Path, typed: Typed, flavour: str) -> None:
    typed("apply", "step:200", flavour, "-o", "second.safetensors", "--as", "lora")
    pipeline = tiny_pipelines.stable_diffusion(place / "w")
    pipeline.load_lora_weights("second.safetensors")
    expected = deltas(tiny_pipelines.adapted_unet(200, TARGETS))
    torch.testing.assert_close(deltas(pipeline.unet), expected, rtol=1e-5, atol=1e-7)
    typed("apply", "second.safetensors", flavour, "-o", "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("second.safetensors").read_bytes()
    assert "An adapter needs none" in typed.refused("apply", "uniform", flavour, "-o", "folder")


def test_a_reward_chooses_and_is_measured_on_other_noise(place: Path, typed: Typed) -> None:
    arguments = ("average", "diffusers", "--prompts", "prompts.txt", *FAST, "--images", "6")
    rows = typed.json(*arguments, "--reward", "rewards_of_a_test:brightness", "--export", "best.safetensors")
    rewards = {row["kind"]: row["reward"] for row in rows}
    best = max(rewards, key=lambda kind: rewards[kind])
    assert Recipe.read(Path("best.safetensors")).study == best
    measured = {row["kind"] for row in rows if row["reward on other noise"] is not None}
    assert measured == {best, "step:300"}
    for row in rows:
        assert row["reward on other noise"] != row["reward"]
    table = typed(*arguments, "--reward", "rewards_of_a_test:brightness").out
    assert f"{best} (best)" in table
    in_python = lcsc_opt.compare_averages(
        "diffusers",
        prompts="prompts.txt",
        images=6,
        sampler="lcm",
        sampling_steps=2,
        reward=lambda images: -images.mean(dim=(1, 2, 3)),
    )
    assert in_python.best == min(rewards, key=lambda kind: rewards[kind])
    assert column(in_python, "step:100").metrics["reward"] == pytest.approx(-rewards["step:100"])


def test_a_model_without_prompts_is_sampled_and_compared_with_real_images(place: Path, typed: Typed) -> None:
    (place / "gray").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)):
        Image.fromarray(image).save(place / "gray" / f"{i}.png")
    distance = ("--reference", "gray", "--metric", PIXELS)
    arguments = ("--images", "40", "--sampling-steps", "2", "--export", "best")
    rows = typed.json("average", "model", *arguments, *distance)
    fids = {row["kind"]: row[PIXELS] for row in rows}
    best = min(fids, key=lambda kind: fids[kind])
    from diffusers import UNet2DModel

    network = UNet2DModel.from_pretrained("best")
    expected = lcsc_opt.average("model", best)
    torch.testing.assert_close(dict(network.state_dict()), expected, rtol=1e-6, atol=1e-7)
    compared = lcsc_opt.compare_averages("model", sampling_steps=2, most_checkpoints=2)
    assert [average.kind for average in compared.averages][:2] == ["step:100", "step:300"]
    assert compared.labels == tuple(f"image {number}" for number in range(1, 9))
    assert compared.best is None
    training = lcsc_opt.compare_averages("training", sampler="ddim", sampling_steps=2)
    assert [average.kind for average in training.averages][:3] == ["step:100", "step:200", "step:300"]
    with pytest.raises(LcscError, match="comes without a scheduler"):
        lcsc_opt.compare_averages("training", sampling_steps=2)
    with pytest.raises(StudySpecError, match="nothing chooses"):
        compared.export(place / "x.safetensors")
    wrong: dict[str, dict[str, Any]] = {
        "metric: kid is measured": {"metric": "kid"},
        "weights: are of a feature": {"weights": {"inception": "x"}},
        "reward: expected a name or a function, got int": {"reward": 5},
        "guidance: leads images to prompts": {"guidance": 3.0},
    }
    for message, options in wrong.items():
        with pytest.raises(StudySpecError, match=message):
            lcsc_opt.compare_averages("training", sampler="ddim", **options)


def test_how_to_export_is_refused_without_an_export(place: Path, typed: Typed) -> None:
    for options in (("--as", "diffusers"), ("--overwrite",)):
        line = typed.refused("average", "training", "--sampler", "ddim", *options)
        assert "give --export PATH, too" in line
    assert not (place / "averages.png").exists()


def test_a_checkpoint_whose_images_are_not_finite_is_not_measured(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states: dict[int, Any] = {step: dict(unet(step).state_dict()) for step in STEPS}
    states[300] = {name: tensor * 1e36 for name, tensor in states[300].items()}
    compared = lcsc_opt.compare_averages(
        states, pipeline="model", sampling_steps=2, reward=lambda images: images.mean(dim=(1, 2, 3))
    )
    assert "step:300: gives images that are not finite" in capsys.readouterr().err
    assert column(compared, "step:300").metrics == {}
    assert compared.best in ("step:100", "step:200")
    assert compared.sheet().startswith(b"\x89PNG")


LORA = ("average", "diffusers", "--prompts", "prompts.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("average", "nowhere", "--prompts", "prompts.txt"), "nowhere does not exist"),
        (("average", "photographs", "--prompts", "prompts.txt"), "No checkpoint in photographs"),
        (("average", "diffusers/checkpoint-100", "--prompts", "prompts.txt"), "at least 2"),
        (("average", "diffusers", "--prompts", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("average", "diffusers", "--prompts", "empty.txt"), "empty.txt holds no prompt"),
        (("average", "model", "--prompts", "prompts.txt"), "model has no text encoder; leave the prompts out"),
        (("average", "diffusers", "--pipeline", "pipeline"), "makes images of texts; give a file"),
        (("average", "diffusers", "--pipeline", "model"), "has no text encoder, and the checkpoints are a LoRA"),
        (("average", "other", "--prompts", "prompts.txt"), "has no place in the pipeline's UNet2DConditionModel"),
        ((*LORA, "--pipeline", "photographs"), "photographs has no text encoder"),
        ((*LORA, "--sampler", "nothing"), "sampler: expected 'ddpm'"),
        ((*LORA, "--reward", "rewards_of_a_test:nothing"), "has no attribute 'nothing'"),
        ((*LORA, "--reference", "nowhere"), "nowhere"),
        ((*LORA, "--export", "x.safetensors"), "give --choose KIND"),
        ((*LORA, "--choose", "ema:0.9"), "give --export PATH"),
        ((*LORA, "--choose", "step:7", "--export", "x.safetensors"), "there are 100, 200, 300"),
        ((*LORA, "--also", "mean"), "mean: expected uniform, last:N"),
        ((*LORA, "-o", "sheet.jpg"), "end its name in .png"),
        ((*LORA, "--export", "x.txt", "--choose", "uniform"), ".txt is no form"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    place: Path, typed: Typed, arguments: tuple[str, ...], message: str
) -> None:
    (place / "empty.txt").write_text("\n \n")
    before = sorted(place.iterdir())
    said = typed(*arguments, status=2).err.splitlines()
    assert said[-1].startswith("lcsc: ")
    assert message in said[-1]
    assert not any("Traceback" in line for line in said)
    assert sorted(path for path in place.iterdir() if path.name != "__pycache__") == before


def test_kinds_name_the_same_averages_everywhere() -> None:
    steps = tuple(range(10, 210, 10))
    averages = usual_averages(steps)
    assert {"uniform", "last:10"} <= set(averages)
    assert sum(kind.startswith("ema:") for kind in averages) >= 2
    assert sum(kind.startswith("power:") for kind in averages) >= 2
    for kind, coefficients in averages.items():
        np.testing.assert_array_equal(coefficients_of_kind(kind, steps), coefficients)
        assert coefficients.sum() == pytest.approx(1, abs=1e-12)
    states = {step: {"weight": torch.full((1,), float(step))} for step in steps}
    assert lcsc_opt.average(states, "step:50")["weight"].item() == 50
    assert lcsc_opt.average(states, "last:2")["weight"].item() == 195
    few = list(usual_averages((1, 2)).values())
    for index, coefficients in enumerate(few):
        assert all(np.abs(coefficients - other).sum() > 0.1 for other in few[:index]), "what is the same is shown once"
    assert "last:1" not in usual_averages((1, 2)), "it is step:2"
    for kind in ("last:0", "last:x", "step:", "uniform:3", "nothing"):
        with pytest.raises(StudySpecError, match="expected uniform"):
            coefficients_of_kind(kind, steps)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompts": []},
        {"prompts": [3]},
        {"images": 0},
        {"images": True},
        {"lora_alpha": -1.0},
        {"most_checkpoints": 0},
        {"sampling_steps": 0},
        {"guidance": math.inf},
        {"also": ["power:9"]},
    ],
)
def test_wrong_values_in_python_are_one_line(place: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(LcscError) as caught:
        lcsc_opt.compare_averages("diffusers", **{"prompts": ["a cat"], "sampling_steps": 2, **wrong})
    assert "\n" not in str(caught.value)


def test_json_is_for_programs(place: Path, typed: Typed) -> None:
    said = typed("average", "diffusers", "--prompts", "prompts.txt", *FAST, "--format", "json")
    assert [row["kind"] for row in json.loads(said.out)][:3] == ["step:100", "step:200", "step:300"]
