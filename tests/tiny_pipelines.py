"""Text-to-image pipelines of a few thousand parameters, made and saved by diffusers and transformers themselves."""

from __future__ import annotations

import functools
import json
import string
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def tokenizer(folder: Path) -> Any:
    """CLIP's byte-pair tokenizer over single letters."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + ",."
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with warnings.catch_warnings():  # of older transformers, which call tokenizers in a way of before
        warnings.simplefilter("ignore", DeprecationWarning)
        return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def text_encoder(vocabulary: int, *, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **changes})


def vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **changes,
    )


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """What ``build`` makes, with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def scheduler() -> Any:
    from diffusers import LCMScheduler

    return LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def stable_diffusion(folder: Path, **changes: Any) -> Any:
    """Stable Diffusion; ``changes`` go to the U-Net. ``folder`` keeps the vocabulary."""
    from diffusers import StableDiffusionPipeline

    return _without_checker(StableDiffusionPipeline, folder, **changes)


def latent_consistency(folder: Path) -> Any:
    """A latent consistency model, whose U-Net is told the guidance scale."""
    from diffusers import LatentConsistencyModelPipeline

    return _without_checker(LatentConsistencyModelPipeline, folder, time_cond_proj_dim=8)


def _without_checker(kind: Any, folder: Path, **changes: Any) -> Any:
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return _quiet(kind(unet=seeded(lambda: unet(**changes)), scheduler=scheduler(), **_texts(folder), **nothing))


def _texts(folder: Path, *, projections: Sequence[bool] = (False,), **changes: Any) -> dict[str, Any]:
    """The decoder, with ``changes``; and for each entry a text encoder, with or without projection, and a tokenizer."""
    tokens = tokenizer(folder / "vocabulary")
    parts = {"vae": seeded(lambda: vae(**changes))}
    for number, projection in enumerate(projections):
        end = f"_{number + 1}" if number else ""
        build = functools.partial(text_encoder, len(tokens), projection=projection)
        parts |= {f"text_encoder{end}": seeded(build, number), f"tokenizer{end}": tokens}
    return parts


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion_xl(folder: Path) -> Any:
    """SDXL: two text encoders, and the size of the image as a further condition."""
    from diffusers import StableDiffusionXLPipeline

    conditions = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 32}
    network = seeded(lambda: unet(**conditions, projection_class_embeddings_input_dim=16 + 6 * 8))
    parts = {**_texts(folder, projections=(False, True)), "scheduler": scheduler()}
    return _quiet(StableDiffusionXLPipeline(unet=network, **parts, add_watermarker=False))


def stable_diffusion_3(folder: Path) -> Any:
    """Stable Diffusion 3 without its third text encoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    settings = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    settings |= {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32}
    settings |= {"caption_projection_dim": 16, "pooled_projection_dim": 32}
    network = seeded(lambda: SD3Transformer2DModel(**settings))
    parts = {**_texts(folder, projections=(True, True), shift_factor=0.1), "text_encoder_3": None, "tokenizer_3": None}
    return _quiet(StableDiffusion3Pipeline(transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(), **parts))


def pixart(folder: Path) -> Any:
    """PixArt-Sigma with a T5 encoder over single letters."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [(letter, -2.0) for letter in "▁" + string.ascii_lowercase]
    tokens = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0), *letters], extra_ids=0)
    encoder = T5Config(vocab_size=len(tokens), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    settings = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "cross_attention_dim": 16, "caption_channels": 32}
    network = seeded(lambda: PixArtTransformer2DModel(**settings, **sizes, use_additional_conditions=False))
    text = {"text_encoder": seeded(lambda: T5EncoderModel(encoder)).eval(), "tokenizer": tokens}
    parts = {"transformer": network, "vae": seeded(vae), "scheduler": DPMSolverMultistepScheduler()}
    return _quiet(PixArtSigmaPipeline(**parts, **text))


def randomize(module: nn.Module, seed: int, *, only: str = "") -> None:
    """Fill the parameters whose names contain ``only``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def adapted_unet(seed: int, targets: Sequence[str], **changes: Any) -> Any:
    """A U-Net with a LoRA of PEFT, of rank 2 and alpha 6, whose factors are not zero."""
    from peft import LoraConfig

    network = unet()
    network.add_adapter(LoraConfig(**{"r": 2, "lora_alpha": 6.0, "target_modules": list(targets), **changes}))
    randomize(network, seed, only="lora_")
    return network


def save_lora(network: Any, folder: Path) -> Path:
    """As the trainers of diffusers do."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    config = network.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    return folder / "pytorch_lora_weights.safetensors"


class Colours:
    """Features that are the mean colours of the image's quarters."""

    name, dimension = "colours", 12

    def __call__(self, images: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
