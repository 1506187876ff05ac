from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import CHANNELS_LAST, HELD_OUT, SEARCH, SELECTION
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.sampling import DifferentiableSampler, ImageNoise, SchedulerSettings
from lcsc_opt.sampling.base import prompts_of
from lcsc_opt.sampling.layout import fastest_layout, lay_out
from lcsc_opt.sampling.network import NetworkSettings
from lcsc_opt.sampling.text_to_image import LatentDiffusionSampler, load_pipeline, read_prompts
from tests import tiny_pipelines
from tests.sampling.conftest import Clock

if not (find_spec("peft") and find_spec("transformers")):
    pytest.skip("needs peft and transformers", allow_module_level=True)

PROMPTS = ("a cat", "the dog sits", "a red house")
SIZE = (16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pipeline")
    tiny_pipelines.stable_diffusion(place).save_pretrained(place / "saved")
    return place / "saved"


def load(place: Path | str, *, lora: bool = False) -> Any:
    return load_pipeline(str(place), NetworkSettings(device="cpu"), lora=lora)


@pytest.fixture
def pipeline(folder: Path) -> Any:
    return load(folder)


def sampler(pipeline: Any, **changes: Any) -> LatentDiffusionSampler:
    schedule = SchedulerSettings(
        **{"steps": 3} | {key: changes.pop(key) for key in ("steps", "timesteps", "step") if key in changes}
    )
    chosen = {"component": "unet", "prompts": PROMPTS, "noise_seed": 3, **changes}
    return LatentDiffusionSampler(pipeline, schedule, **chosen)


def own_images(pipeline: Any, start: int, stop: int, **changes: Any) -> Tensor:
    """The pipeline's own images of the same latents, prompts as texts, and generators."""
    noise = ImageNoise(3, (4, 8, 8))
    called = pipeline(
        prompt=[PROMPTS[i % 3] for i in range(start, stop)],
        latents=noise.batch(SEARCH, start, stop),
        generator=noise.generators(SEARCH, start, stop),
        output_type="pt",
        **{"num_inference_steps": 3, "guidance_scale": 1.0, **changes},
    )
    return called.images * 2 - 1


def lora(seed: int, rank: int = 2, *, text: bool = False) -> dict[str, Tensor]:
    """A LoRA with the names that diffusers writes."""
    from peft.utils import get_peft_model_state_dict

    network = tiny_pipelines.adapted_unet(seed, ["to_q", "to_out.0", "conv1"], r=rank, lora_alpha=rank)
    factors = {f"unet.{name}": value for name, value in get_peft_model_state_dict(network).items()}
    if text:
        generator = torch.Generator().manual_seed(seed)
        stem = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
        factors |= {
            f"{stem}.{part}.weight": torch.randn(shape, generator=generator)
            for part, shape in (("down", (rank, 16)), ("up", (16, rank)))
        }
    return factors


def test_a_layout_changes_neither_images_nor_what_identifies_the_pipeline(pipeline: Any) -> None:
    made = sampler(pipeline)
    assert made.networks_to_lay_out == (pipeline.unet, pipeline.vae.decoder)
    expected = made.sample(SEARCH, 0, 2)
    lay_out([made], CHANNELS_LAST)
    for convolution in (pipeline.unet.conv_in, pipeline.vae.decoder.conv_in):
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(made.sample(SEARCH, 0, 2), expected, rtol=0, atol=1e-4)
    assert made.describe() == sampler(load(Path(pipeline.config._name_or_path))).describe()


def test_a_layout_is_chosen_by_calls_of_the_denoiser_and_of_the_decoder(pipeline: Any, clock: Clock) -> None:
    ran = []
    made = sampler(pipeline)
    for network in made.networks_to_lay_out:
        network.register_forward_hook(lambda network, *_: ran.append(network))
    clock(made, 0.2, 0.1)
    layout, relative = fastest_layout(made, trial_images=3, gradient=True)
    assert (layout, round(relative, 6)) == (CHANNELS_LAST, 0.5)
    assert set(ran[-2:]) == {pipeline.unet, pipeline.vae.decoder}
    assert len(ran) > 8


@pytest.mark.parametrize("scheduler", ["LCMScheduler", "DPMSolverMultistepScheduler"])
def test_images_are_the_pipelines_own(pipeline: Any, scheduler: str) -> None:
    import diffusers

    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    expected = own_images(pipeline, 2, 7)
    images = sampler(pipeline).sample(SEARCH, 2, 7)
    assert images.shape == (5, 3, *SIZE)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert images.abs().max() <= 1
    assert images.std() > 0.1


def test_an_image_does_not_depend_on_the_others_of_its_batch(pipeline: Any) -> None:
    each = sampler(pipeline)
    together = each.sample(SEARCH, 0, 6)
    alone = torch.cat([each.sample(SEARCH, i, i + 1) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(sampler(pipeline).sample(SEARCH, 4, 6), together[4:], rtol=0, atol=1e-5)


def test_groups_of_noise_differ_and_the_held_out_one_may_have_its_own_prompts(pipeline: Any) -> None:
    each = sampler(pipeline, held_out_prompts=["a boat"])
    assert prompts_of(each, HELD_OUT, 3, 5) == ["a boat", "a boat"]
    assert prompts_of(each, SEARCH, 1, 3) == [each.prompts[1 % len(each.prompts)], each.prompts[2 % len(each.prompts)]]
    assert (each.sample(SEARCH, 0, 2) - each.sample(SELECTION, 0, 2)).abs().max() > 0.01
    of_boats = sampler(pipeline, prompts=["a boat"])
    torch.testing.assert_close(each.sample(HELD_OUT, 0, 2), of_boats.sample(HELD_OUT, 0, 2), rtol=0, atol=1e-5)
    assert (each.sample(SELECTION, 0, 2) - of_boats.sample(SELECTION, 0, 2)).abs().max() > 1e-3
    same = sampler(pipeline)
    assert (same.sample(HELD_OUT, 0, 2) - each.sample(HELD_OUT, 0, 2)).abs().max() > 1e-3


def test_merged_weights_change_the_images(pipeline: Any, folder: Path) -> None:
    each = sampler(pipeline)
    before = each.sample(SEARCH, 0, 3)
    weights = {name: 1.1 * value for name, value in pipeline.unet.state_dict().items()}
    each.load(weights)
    after = each.sample(SEARCH, 0, 3)
    assert (after - before).abs().max() > 0.01
    other = load(folder)
    other.unet.load_state_dict(weights)
    torch.testing.assert_close(after, own_images(other, 0, 3), rtol=0, atol=1e-5)
    with pytest.raises(ObjectiveError, match="do not fit"):
        each.load({"conv_in.weight": torch.ones(1)})


def test_a_lora_changes_the_images_as_a_file_of_it_does(folder: Path, tmp_path: Path) -> None:
    each = sampler(load(folder, lora=True), component="lora")
    images = []
    for seed in (1, 2):  # the second is copied into the adapter of the first
        each.load(lora(seed, text=True))
        images.append(each.sample(SEARCH, 0, 3))
        save_file(lora(seed, text=True), tmp_path / "lora.safetensors")
        other = load(folder)
        other.load_lora_weights(tmp_path / "lora.safetensors")
        torch.testing.assert_close(images[-1], own_images(other, 0, 3), rtol=0, atol=1e-5)
    assert (images[0] - images[1]).abs().max() > 0.01
    plain = load(folder)
    plain.load_lora_weights(lora(2))
    assert (images[1] - own_images(plain, 0, 3)).abs().max() > 1e-4, "the prompts' embeddings"


def test_a_lora_of_several_ranks_has_the_scale_of_each(folder: Path) -> None:
    """Diffusers 0.35 to 0.38 take the alpha of one rank for the modules of the others."""
    from peft.tuners.lora import LoraLayer

    pipeline = load(folder, lora=True)
    factors = {name: value for name, value in lora(1).items() if "to_q" in name}
    factors |= {name: value for name, value in lora(1, rank=4).items() if "to_q" not in name}
    sampler(pipeline, component="lora", alphas=LoraAlphas.constant(3.0)).load(factors)
    layers: dict[str, Any] = {n: layer for n, layer in pipeline.unet.named_modules() if isinstance(layer, LoraLayer)}
    assert {layer.r["merged"] for layer in layers.values()} == {2, 4}
    for name, layer in layers.items():
        up, down = factors[f"unet.{name}.lora_B.weight"], factors[f"unet.{name}.lora_A.weight"]
        expected = (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:]) * 3.0 / len(down)
        torch.testing.assert_close(layer.get_delta_weight("merged"), expected)


def test_a_lora_that_does_not_fit_is_one_line(folder: Path) -> None:
    each = sampler(load(folder, lora=True), component="lora")
    wrong = {"unet.nowhere.lora_A.weight": torch.ones(1, 3), "unet.nowhere.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(ObjectiveError, match="LoRA") as caught:
        each.load(wrong)
    assert "\n" not in str(caught.value)
    with pytest.raises(ObjectiveError, match="component that StableDiffusionPipeline lacks"):
        each.load({f"text_encoder_2.x.lora_{part}.weight": torch.ones(1, 1) for part in "AB"})
    each.load(lora(1))
    with pytest.raises(ObjectiveError, match=r"lora_A.weight. as \[3, 8\] and not \[2, 8\]"):
        each.load(lora(1, rank=3))
    with pytest.raises(ObjectiveError, match="does not fit the one in the pipeline: it"):
        each.load(lora(1, text=True))


LATENT = {"guidance_scale": 8.5}  # which such a U-Net embeds: one call a step is enough
PIXART = {"use_resolution_binning": False, "clean_caption": False}


@pytest.mark.parametrize(
    ("build", "chosen", "options", "nfe"),
    [
        (tiny_pipelines.latent_consistency, LATENT, {}, 3),
        (lambda folder: tiny_pipelines.stable_diffusion(folder, time_cond_proj_dim=8), LATENT, {}, 3),
        (tiny_pipelines.stable_diffusion_xl, {"guidance_scale": 1.0}, {}, 3),
        # no negative prompt is another thing than an empty one
        (tiny_pipelines.stable_diffusion_xl, {"guidance_scale": 4.0}, {}, 6),
        (tiny_pipelines.stable_diffusion_xl, {"guidance_scale": 4.0, "negative_prompt": ""}, {}, 6),
        (tiny_pipelines.stable_diffusion_3, {"guidance_scale": 4.0, "negative_prompt": "blurry"}, {}, 6),
        (tiny_pipelines.pixart, {"guidance_scale": 4.0, "negative_prompt": "blurry"}, PIXART, 6),
        (tiny_pipelines.pixart, {"guidance_scale": 1.0}, PIXART, 3),
    ],
)
def test_images_of_other_pipelines_are_their_own(
    tmp_path: Path, build: Any, chosen: dict[str, Any], options: dict[str, Any], nfe: int
) -> None:
    pipeline = build(tmp_path)
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    each = sampler(pipeline, component=component, **chosen)
    given = {name: [value] * 4 if name == "negative_prompt" else value for name, value in chosen.items()}
    images = each.sample(SEARCH, 0, 4)
    torch.testing.assert_close(images, own_images(pipeline, 0, 4, **given, **options), rtol=0, atol=1e-5)
    assert each.nfe == nfe
    each.load({name: 1.1 * value for name, value in getattr(pipeline, component).state_dict().items()})
    assert (each.sample(SEARCH, 0, 4) - images).abs().max() > 1e-3


def test_a_lora_of_a_transformer_changes_the_images_as_a_file_of_it_does(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"{stem}.lora_{part}.weight": torch.randn(shape, generator=generator)
        for part, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    each = sampler(tiny_pipelines.stable_diffusion_3(tmp_path), component="lora")
    each.load(factors)
    other = tiny_pipelines.stable_diffusion_3(tmp_path)
    other.load_lora_weights(factors)
    torch.testing.assert_close(each.sample(SEARCH, 0, 2), own_images(other, 0, 2), rtol=0, atol=1e-5)
    with pytest.raises(ObjectiveError, match="PixArtSigmaPipeline does not support LoRAs"):
        sampler(tiny_pipelines.pixart(tmp_path), component="lora")


def test_what_decides_images_is_described(pipeline: Any, folder: Path) -> None:
    described = sampler(pipeline).describe()
    assert json.loads(json.dumps(described)) == described
    again = load(folder)
    assert sampler(again).describe() == described
    changed = [
        {"guidance_scale": 2.0},
        {"negative_prompt": "x", "guidance_scale": 2.0},
        {"prompts": ["a"]},
        {"held_out_prompts": ["a"]},
        {"steps": 4},
        {"height": 32},
        {"noise_seed": 4},
        {"component": "lora", "alphas": LoraAlphas.constant(2.0)},
    ]
    assert all(sampler(again, **change).describe() != described for change in changed)  # type: ignore[arg-type]
    with torch.no_grad():
        again.vae.decoder.conv_out.bias.add_(1)
    assert sampler(again).describe()["weights"] != described["weights"]


def test_the_weights_that_are_merged_are_no_part_of_the_description(folder: Path) -> None:
    pipeline = load(folder, lora=True)
    each = sampler(pipeline)
    before = each.describe()
    each.load({name: 2 * value for name, value in pipeline.unet.state_dict().items()})
    assert sampler(pipeline).describe() == before
    adapted = sampler(pipeline, component="lora")
    before = sampler(pipeline, component="lora").describe()
    adapted.load(lora(1))
    assert adapted.describe() == before


def test_a_pipeline_that_was_saved_without_its_third_encoder_is_loaded(tmp_path: Path) -> None:
    saved = tiny_pipelines.stable_diffusion_3(tmp_path)
    saved.save_pretrained(tmp_path / "saved")
    images = sampler(load(tmp_path / "saved"), component="transformer").sample(SEARCH, 0, 2)
    torch.testing.assert_close(images, own_images(saved, 0, 2), rtol=0, atol=1e-5)


def test_a_pipeline_that_is_not_supported_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ObjectiveError, match="FluxPipeline is not supported; expected one of StableDiffusionPipeline"):
        load(tmp_path)


def test_code_in_a_pipelines_folder_never_runs(folder: Path, tmp_path: Path) -> None:
    import shutil

    for change in ({"vae": ["evil", "Evil"]}, {"_class_name": ["pipeline", "Evil"]}):
        place = tmp_path / next(iter(change))
        shutil.copytree(folder, place)
        index = json.loads((place / "model_index.json").read_text())
        (place / "model_index.json").write_text(json.dumps({**index, **change}))
        for code in (place / "vae" / "evil.py", place / "pipeline.py"):
            code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
        with pytest.raises(ObjectiveError, match="never run"):
            load(place)
    assert not (tmp_path / "ran").exists()


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  über \n", encoding="utf-8")
    assert read_prompts(path) == ("a cat", "über")
    path.write_bytes(
        "a cat\r\nan owl\u2028in a tree\r\na café\x85 at night\x0b\n".encode()
    )  # as of captions of the web
    assert read_prompts(path) == ("a cat", "an owl\u2028in a tree", "a café\x85 at night")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ObjectiveError, match="as UTF-8"):
        read_prompts(path)
    path.write_text("\n \n")
    with pytest.raises(ObjectiveError, match="holds no prompt"):
        read_prompts(path)
    with pytest.raises(ObjectiveError, match=r"there is no file .*other\.txt"):
        read_prompts(tmp_path / "other.txt")


def test_what_is_more_than_prompts_is_not_drawn_as_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na red fox --n blurry --w 512 --d 1\n")
    with pytest.raises(ObjectiveError, match="has options of sd-scripts, '--n blurry'"):
        read_prompts(path)
    path.write_text("a cat -- and a dog\nan e-mail --really\n")
    assert len(read_prompts(path)) == 2
    (tmp_path / "study.yaml").write_text("name: digits\n")
    with pytest.raises(ObjectiveError, match=r"study\.yaml is no text file"):
        read_prompts(tmp_path / "study.yaml")


def kohya(factors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The LoRA of a U-Net under kohya's names, with other alphas than ranks."""
    from diffusers.utils import convert_state_dict_to_kohya

    named = convert_state_dict_to_kohya(factors)
    return {name: torch.tensor(alpha) if name.endswith(".alpha") else value for name, value in named.items()}


LORAS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "PEFT": lambda: {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in lora(1).items()},
    "kohya": lambda: kohya(lora(1), 5.0),
    "diffusers, of the text encoder, too": lambda: lora(1, text=True),
}


@pytest.mark.parametrize(
    ("merged", "guidance_scale"),
    [("unet", 3.0), *zip(LORAS, (1.0, 3.0, 3.0), strict=True)],
)
def test_the_gradient_is_the_directional_derivative(folder: Path, merged: str, guidance_scale: float) -> None:
    pipeline = load(folder, lora=merged in LORAS).to(torch.float64)
    chosen = {"component": "lora", "alphas": LoraAlphas.constant(3.0)} if merged in LORAS else {}
    made = sampler(pipeline, prompts=("a cat", "the dog"), steps=2, guidance_scale=guidance_scale, **chosen)
    assert isinstance(made, DifferentiableSampler)
    start = LORAS[merged]() if merged in LORAS else made.denoiser.state_dict()
    weights = {name: tensor.to(torch.float64, copy=True) for name, tensor in start.items()}
    varying = {name for name in weights if not name.endswith(".alpha")}
    assert made.weights.why_no_gradient(varying) is None  # before anything is loaded
    made.load(weights)
    with torch.no_grad():
        plain = made.sample(SEARCH, 0, 2)
    with made.weights.differentiable(varying) as leaves:
        for _ in range(2):  # the second time as in the second batch
            images = made.sample(SEARCH, 0, 2)
            found = torch.autograd.grad(images.square().mean(), tuple(leaves.values()), allow_unused=True)
    torch.testing.assert_close(images.detach(), plain, rtol=0, atol=1e-6)  # attention has another kernel with a graph
    gradients = {name: part for name, part in zip(leaves, found, strict=True) if part is not None}
    assert merged == "unet" or gradients.keys() == varying
    norm = math.sqrt(sum(float(part.square().sum()) for part in gradients.values()))

    def ahead(step: float) -> float:
        made.load({n: w + step * gradients[n] / norm if n in gradients else w for n, w in weights.items()})
        with torch.no_grad():
            return float(made.sample(SEARCH, 0, 2).square().mean())

    step = 1e-3
    assert (ahead(step) - ahead(-step)) / (2 * step) == pytest.approx(norm, rel=1e-4)
    modules = (part for part in made.pipeline.components.values() if isinstance(part, torch.nn.Module))
    assert all(parameter.grad is None for part in modules for parameter in part.parameters())
    assert "forward" not in vars(made.denoiser)


def test_an_alpha_that_differs_between_checkpoints_has_no_gradient(pipeline: Any) -> None:
    reason = sampler(pipeline, component="lora").weights.why_no_gradient({"a.lora_up.weight", "a.alpha"})
    assert reason == "a.alpha, which scales a LoRA, differs between checkpoints"


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_a_negative_prompt_that_cannot_act_is_refused(pipeline: Any, guidance_scale: float) -> None:
    with pytest.raises(ObjectiveError, match="negative_prompt: only classifier-free guidance has one"):
        sampler(pipeline, negative_prompt="blurry", guidance_scale=guidance_scale)
