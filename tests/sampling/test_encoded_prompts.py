"""Prompts are encoded once, and the images are those of prompts that are encoded anew each time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lcsc_opt.base.records import HELD_OUT, SEARCH, SELECTION, Noise
from lcsc_opt.sampling import SchedulerSettings
from lcsc_opt.sampling.encoded_prompts import EncodedPrompts
from lcsc_opt.sampling.text_to_image import LatentDiffusionSampler
from tests import tiny_pipelines
from tests.sampling.test_latent_diffusion import lora

if not (find_spec("peft") and find_spec("transformers")):
    pytest.skip("needs peft and transformers", allow_module_level=True)

PROMPTS = ("a cat", "the dog sits", "a red house")
FAMILIES = (
    (tiny_pipelines.stable_diffusion, None),
    (tiny_pipelines.latent_consistency, None),  # its guidance has no negative prompt
    (tiny_pipelines.stable_diffusion_xl, "blurry"),
    (tiny_pipelines.stable_diffusion_3, "blurry"),
    (tiny_pipelines.pixart, "blurry"),
)


def sampler(pipeline: Any, *, most_bytes: int | None = None, **changes: Any) -> LatentDiffusionSampler:
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    settings = {"component": component, "prompts": PROMPTS, "noise_seed": 3, **changes}
    made = LatentDiffusionSampler(pipeline, SchedulerSettings(steps=2), **settings)
    if most_bytes is not None:
        made.encoded_prompts = EncodedPrompts(most_bytes)
    return made


@contextlib.contextmanager
def counted_calls(pipeline: Any) -> Iterator[list[int]]:
    """The batch size of each call of a text encoder of the pipeline."""
    sizes: list[int] = []

    def count(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        sizes.append(len(arguments[0]))

    encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
    hooks = [encoder.register_forward_pre_hook(count) for encoder in encoders]
    yield sizes
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("build", "negative_prompt"), FAMILIES)
def test_each_prompt_is_encoded_once_and_the_images_stay_the_same(
    tmp_path: Path, build: Callable[[Path], Any], negative_prompt: str | None
) -> None:
    pipeline = build(tmp_path)
    kept = sampler(pipeline, guidance_scale=4.0, negative_prompt=negative_prompt)
    anew = sampler(pipeline, guidance_scale=4.0, negative_prompt=negative_prompt, most_bytes=0)
    with counted_calls(pipeline) as calls:
        images = kept.sample(SEARCH, 0, 7)
        first_calls = len(calls)
        again = [kept.sample(SEARCH, 0, 7), kept.sample(SELECTION, 2, 9), kept.sample(SEARCH, 6, 7)]
        assert len(calls) == first_calls, "all prompts were encoded before"
        assert set(calls) == {1}
        expected = [anew.sample(SEARCH, 0, 7), anew.sample(SELECTION, 2, 9), anew.sample(SEARCH, 6, 7)]
        assert len(calls) >= first_calls + 15 * first_calls // len(PROMPTS)
    assert torch.equal(images, expected[0])
    for one, other in zip(again, expected, strict=True):
        assert torch.equal(one, other)
    assert "encode_prompt" not in vars(pipeline)


def test_memory_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    prompt_bytes = 2 * 16 * 16 * 4  # of the prompt and the negative one: tokens, features, float32
    kept = sampler(pipeline, guidance_scale=4.0, negative_prompt="blurry")
    kept.sample(SEARCH, 0, 3)
    assert kept.encoded_prompts.used_bytes == len(PROMPTS) * prompt_bytes
    bounded = sampler(pipeline, guidance_scale=4.0, negative_prompt="blurry", most_bytes=2 * prompt_bytes)
    with counted_calls(pipeline) as calls:
        for _ in range(3):
            images = bounded.sample(SEARCH, 0, 3)
    assert len(calls) == 2 * (2 + 3)  # with the negative one: two prompts once, the third three times
    assert bounded.encoded_prompts.used_bytes == 2 * prompt_bytes
    assert torch.equal(images, kept.sample(SEARCH, 0, 3))
    assert capsys.readouterr().err.count("the others are encoded again with each batch") == 1


@pytest.mark.parametrize("text", [False, True])
def test_prompts_are_encoded_anew_for_a_lora_of_the_text_encoder(tmp_path: Path, text: bool) -> None:
    pipeline = tiny_pipelines.stable_diffusion(tmp_path)
    each = sampler(pipeline, component="lora")
    with counted_calls(pipeline) as calls:
        before = each.sample(SEARCH, 0, 3)
        each.load(lora(1, text=text))
        calls.clear()
        images = [each.sample(SEARCH, 0, 3)]
        each.load(lora(2, text=text))
        images.append(each.sample(SEARCH, 0, 3))
    assert calls == ([3, 3] if text else [])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], before)


def test_embeddings_of_inference_mode_can_be_used_in_a_graph(tmp_path: Path) -> None:
    each = sampler(tiny_pipelines.stable_diffusion(tmp_path))
    with torch.inference_mode():
        each.sample(SEARCH, 0, 3)
    with each.weights.differentiable({"conv_in.weight"}) as leaves:
        images = each.sample(SEARCH, 0, 3)
        [gradient] = torch.autograd.grad(images.sum(), [leaves["conv_in.weight"]])
    assert gradient.abs().max() > 0


def test_few_images_on_fresh_noise_are_of_all_prompts(tmp_path: Path) -> None:
    """As a search by gradient asks for them: each step few images on noise of its own."""
    prompts = [f"prompt {number}" for number in range(20)]
    each = sampler(tiny_pipelines.stable_diffusion(tmp_path), prompts=prompts)
    drawn = {prompt for step in range(100) for prompt in each.prompts_of(Noise("gradient", step), 0, 2)}
    assert drawn == set(prompts)
    step = Noise("gradient", 5)
    assert each.prompts_of(step, 0, 9)[4:7] == each.prompts_of(step, 4, 7), "the range does not matter"
    for group in (SEARCH, SELECTION, HELD_OUT, Noise(HELD_OUT.group, 3)):
        assert each.prompts_of(group, 0, 3) == prompts[:3]
