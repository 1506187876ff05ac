"""LoRAs of FLUX, Qwen-Image and Wan: under the names of diffusers, and under those of other trainers.

Names and widths are the real ones, of one block of each kind; weights are random, of rank 2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.imports import allow_mismatched_torchvision
from lcsc_opt.checkpoints.lora import lora_flavour, lora_modules
from lcsc_opt.sampling.lora import to_diffusers
from tests.commands import Typed

if not (find_spec("peft") and find_spec("transformers")):
    pytest.skip("needs peft and transformers", allow_module_level=True)

allow_mismatched_torchvision()

RANK = 2
ALPHA = 3.0
Shapes = Mapping[str, tuple[int, int]]
"""Module → its input and output width."""

FLUX: Shapes = {
    "double_blocks.0.img_attn.qkv": (3072, 9216),
    "double_blocks.0.txt_mlp.2": (12288, 3072),
    "double_blocks.0.txt_mod.lin": (3072, 18432),
    "single_blocks.0.linear1": (3072, 21504),
    "single_blocks.0.linear2": (15360, 3072),
    "single_blocks.0.modulation.lin": (3072, 9216),
}
FLUX_DIFFUSERS: Shapes = {
    "transformer_blocks.0.attn.to_q": (3072, 3072),
    "transformer_blocks.0.attn.add_k_proj": (3072, 3072),
    "transformer_blocks.0.ff.net.0.proj": (3072, 12288),
    "single_transformer_blocks.0.attn.to_k": (3072, 3072),
    "single_transformer_blocks.0.proj_out": (15360, 3072),
}
QWEN: Shapes = {
    "transformer_blocks.0.attn.to_q": (3072, 3072),
    "transformer_blocks.0.attn.to_out.0": (3072, 3072),
    "transformer_blocks.0.attn.add_k_proj": (3072, 3072),
    "transformer_blocks.0.attn.to_add_out": (3072, 3072),
    "transformer_blocks.0.img_mlp.net.0.proj": (3072, 12288),
    "transformer_blocks.0.txt_mlp.net.2": (12288, 3072),
    "transformer_blocks.0.img_mod.1": (3072, 18432),
}
WAN: Shapes = {
    **{f"blocks.0.{attention}.{name}": (1536, 1536) for attention in ("self_attn", "cross_attn") for name in "qkvo"},
    "blocks.0.ffn.0": (1536, 8960),
    "blocks.0.ffn.2": (8960, 1536),
}
WAN_DIFFUSERS: Shapes = {
    "blocks.0.attn1.to_q": (1536, 1536),
    "blocks.0.attn2.to_out.0": (1536, 1536),
    "blocks.0.ffn.net.0.proj": (1536, 8960),
}


def kohya(name: str) -> tuple[str, str, str]:
    stem = f"lora_unet_{name.replace('.', '_')}"
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def dotted(prefix: str, adapter: str = "", *, alpha: bool = False) -> Callable[[str], tuple[str, str, str]]:
    def names(name: str) -> tuple[str, str, str]:
        stem = f"{prefix}{name}"
        return f"{stem}.lora_A.{adapter}weight", f"{stem}.lora_B.{adapter}weight", f"{stem}.alpha" if alpha else ""

    return names


def dotted_down(prefix: str) -> Callable[[str], tuple[str, str, str]]:
    return lambda name: tuple(f"{prefix}{name}{end}" for end in (".lora_down.weight", ".lora_up.weight", ".alpha"))  # type: ignore[return-value]


FORMATS: dict[str, tuple[str, Shapes, Callable[[str], tuple[str, str, str]]]] = {
    "FLUX, ai-toolkit and diffusers": ("Flux", FLUX_DIFFUSERS, dotted("transformer.")),
    "FLUX, PEFT": ("Flux", FLUX_DIFFUSERS, dotted("base_model.model.")),
    "Qwen-Image, diffusers": ("QwenImage", QWEN, dotted("transformer.")),
    "Qwen-Image, DiffSynth-Studio": ("QwenImage", QWEN, dotted("", "default.")),
    "Qwen-Image, Lightning": ("QwenImage", QWEN, dotted_down("")),
    "Wan, diffusers": ("Wan", WAN_DIFFUSERS, dotted("transformer.")),
}
OTHER_NAMES = {
    "FLUX, kohya": (FLUX, kohya),
    "Qwen-Image, ai-toolkit": (QWEN, dotted("diffusion_model.")),
    "Wan, musubi-tuner": (WAN, kohya),
    "Wan, ComfyUI with alphas": (WAN, dotted_down("diffusion_model.")),
    "Wan, DiffSynth-Studio": (WAN, dotted("", "default.")),
}


def lora(kind: str, seed: int) -> dict[str, Tensor]:
    """Random weights under the names of a trainer."""
    shapes, names_of = OTHER_NAMES.get(kind) or FORMATS[kind][1:]
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, (width, out) in shapes.items():
        down, up, alpha = names_of(name)
        weights[down] = torch.randn(RANK, width, generator=generator)
        weights[up] = torch.randn(out, RANK, generator=generator)
        if alpha:
            weights[alpha] = torch.tensor(ALPHA)
    return weights


def transformer(family: str) -> Any:
    """One block of each kind in the real width, without memory."""
    import diffusers

    with torch.device("meta"):
        if family == "Flux":
            return diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
        if family == "QwenImage":
            return diffusers.QwenImageTransformer2DModel(num_layers=1)
        return diffusers.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=1
        )


def squared_norm(up: Tensor, down: Tensor) -> float:
    """Of the product, which is large, by the products of its factors with themselves, which are small."""
    return float(((up.double().T @ up.double()) * (down.double() @ down.double().T)).sum())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_merged_lora_is_written_for_its_own_pipeline(workplace: Path, typed: Typed, kind: str) -> None:
    family, shapes, names_of = FORMATS[kind]
    for step in (100, 200):
        folder = workplace / "runs" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(lora(kind, step), folder / "pytorch_lora_weights.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 5.0}))
    typed("apply", "last:2", "runs", "-o", "own.safetensors")
    own = load_file("own.safetensors")
    assert own.keys() == lora(kind, 100).keys()

    typed("apply", "last:2", "runs", "-o", "diffusers.safetensors", "--as", "lora")
    converted = load_file("diffusers.safetensors")
    places = {module.path: module for module in lora_modules(converted)}
    network = transformer(family)
    for path, module in places.items():
        weight = network.get_submodule(path).weight
        assert module.component == "transformer"
        assert tuple(weight.shape) == (len(converted[module.up]), converted[module.down].shape[1])

    energy = sum(squared_norm(converted[module.up], converted[module.down]) for module in places.values())
    expected = 0.0
    for name in shapes:
        down, up, alpha = names_of(name)
        factor = 5.0 / RANK
        if alpha:
            factor = ALPHA / RANK
        expected += squared_norm(factor * own[up], own[down])
    assert energy == pytest.approx(expected, rel=1e-4), "no module is lost, and each has its scale"


@pytest.mark.parametrize("kind", OTHER_NAMES)
def test_other_names_are_not_translated(kind: str) -> None:
    with pytest.raises(TrajectoryError, match="is no name of diffusers: without --as lora the file keeps its names"):
        to_diffusers(lora(kind, 100))


def test_other_names_are_kept(workplace: Path, typed: Typed) -> None:
    for step in (100, 200):
        save_file(lora("FLUX, kohya", step), workplace / f"lora-{step}.safetensors")
    typed("apply", "last:2", "lora-*.safetensors", "-o", "own.safetensors")
    assert load_file("own.safetensors").keys() == lora("FLUX, kohya", 100).keys()
    typed("apply", "last:2", "lora-*.safetensors", "-o", "other.safetensors", "--as", "lora", status=2)


def test_a_whole_network_with_an_adapter_is_no_lora() -> None:
    names = ["unet.to_q.base_layer.weight", "unet.to_q.lora_A.default.weight", "unet.to_q.lora_B.default.weight"]
    assert lora_flavour(names) is None
    assert lora_flavour(names[1:]) == "diffusers"
    assert [module.path for module in lora_modules(names[1:])] == ["to_q"]
