"""An LCM-LoRA of a small text-to-image pipeline: its training, its reward and its features, for ``lora.yaml``.

    python digits_lora.py        # some minutes on one core; again: continues with the part that is missing

The pipeline is a StableDiffusionPipeline of diffusers: an AutoencoderKL, a UNet2DConditionModel, a CLIPTextModel and a
CLIPTokenizer, trained on half of scikit-learn's digits with captions such as "a handwritten seven". Its LCM-LoRA (Luo
et al. 2023) is distilled as diffusers' ``train_lcm_distill_lora_sd.py`` does it, with a checkpoint every few steps, in
the files of diffusers. The other half of the digits trains the reward of reports, and is held out in FID.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lcsc_opt.base.descent import descend, one_torch_thread
from lcsc_opt.base.imports import allow_mismatched_torchvision
from lcsc_opt.base.libraries import quiet_libraries
from lcsc_opt.metrics.bundled_images import bundled_images
from lcsc_opt.metrics.extractors.bundled import feature_network

allow_mismatched_torchvision()  # first, since transformers imports a torchvision that may not fit this torch

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a handwritten {}", "the digit {}")
"""The first is of the prompts that are searched, the second of those in reports."""
SIDE = 16  # pixels; the digits' 8×8 are enlarged
TIMESTEPS = 1000
SOLVER_STEPS = 50  # of the teacher's DDIM, as LCMScheduler's original_inference_steps
TIMESTEP_SCALING = 10.0  # of the boundary condition, as LCMScheduler's
GUIDANCE = 1.0  # of the teacher: conditional + GUIDANCE (conditional − unconditional)
DROPPED = 0.1  # share of captions that are left out in training
HUBER = 0.001


def half(number: int) -> tuple[Tensor, Tensor]:
    """Images ``[n, 3, 16, 16]`` in [-1, 1] and digits ``[n]`` of half A (0) or B (1)."""
    images, digits = bundled_images("digits")
    enlarged = F.interpolate(images[number::2], size=(SIDE, SIDE), mode="bilinear")
    return enlarged.expand(-1, 3, -1, -1).contiguous(), digits[number::2]


# The pipeline


def tokenizer(folder: Path, captions: Sequence[str]) -> Any:
    """CLIP's byte-pair tokenizer, with a token for each word of the captions."""
    from transformers import CLIPTokenizer

    words = sorted({word for caption in captions for word in caption.split()})
    symbols: dict[str, None] = {}
    merges: dict[str, None] = {}
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        symbols.update(dict.fromkeys(parts))
        whole = parts[0]
        for part in parts[1:]:
            merges[f"{whole} {part}"] = None
            whole += part
            symbols[whole] = None
    tokens = [*symbols, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def new_pipeline(folder: Path, captions: Sequence[str], **of_unet: Any) -> Any:
    """The pipeline with random weights, from torch's generator; ``folder`` keeps the vocabulary of all captions.

    ``of_unet`` are settings of the U-Net in place of those that stand here.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokens = tokenizer(folder, captions)
    text_config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokens.model_max_length,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIDE,
    )
    settings: dict[str, Any] = {
        "sample_size": SIDE // 2,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": None,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    schedule = DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokens,
        unet=UNet2DConditionModel(**{**settings, **of_unet}),
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_pipeline(folder: Path, *, autoencoder_steps: int, steps: int, batch: int = 32, seed: int = 0) -> None:
    """Train the autoencoder, then U-Net and text encoder together; write ``FOLDER/pipeline``."""
    torch.manual_seed(seed)
    images, digits = half(0)
    pipeline = new_pipeline(
        folder / "vocabulary", [template.format(digit) for template in TEMPLATES for digit in DIGITS]
    )
    autoencoder = pipeline.vae
    train_autoencoder(autoencoder, images, steps=autoencoder_steps)
    with torch.no_grad():
        latents = autoencoder.encode(images).latent_dist.mean
    autoencoder.register_to_config(scaling_factor=float(1 / latents.std()))
    latents = latents * autoencoder.config.scaling_factor

    unet = pipeline.unet.train()
    encoder = pipeline.text_encoder.train()
    tokens = [tokens_of(pipeline, [template.format(digit) for digit in DIGITS]) for template in TEMPLATES]
    captions = torch.stack([*tokens, tokens_of(pipeline, [""] * len(DIGITS))])  # [templates + 1, 10, length]
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)

    def loss(_step: int) -> Tensor:
        chosen = torch.randint(len(latents), (batch,))
        template = torch.randint(len(TEMPLATES), (batch,))
        template[torch.rand(batch) < DROPPED] = len(TEMPLATES)
        embeddings = encoder(captions[template, digits[chosen]])[0]
        noise = torch.randn(batch, *latents.shape[1:])
        times = torch.randint(TIMESTEPS, (batch,))
        noisy = pipeline.scheduler.add_noise(latents[chosen], noise, times)
        return F.mse_loss(unet(noisy, times, embeddings).sample, noise)

    descend(loss, optimizer, steps=steps, schedule=schedule, description="pipeline")
    with quiet_libraries():
        pipeline.save_pretrained(folder / "pipeline")


def train_autoencoder(autoencoder: Any, images: Tensor, *, steps: int, batch: int = 32) -> None:
    """Train it on images ``[N, 3, H, W]``, then freeze it."""
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    autoencoder.train()

    def loss(_step: int) -> Tensor:
        chosen = images[torch.randint(len(images), (batch,))]
        posterior = autoencoder.encode(chosen).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample
        error: Tensor = F.mse_loss(decoded, chosen) + 1e-5 * posterior.kl().mean()
        return error

    descend(loss, optimizer, steps=steps, schedule=schedule, description="autoencoder")
    autoencoder.eval().requires_grad_(requires_grad=False)


def tokens_of(pipeline: Any, captions: Sequence[str]) -> Tensor:
    """``[n, length]``, padded as the pipeline does it."""
    tokens = pipeline.tokenizer
    padded = tokens(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = padded.input_ids
    return ids


# Its LoRA


def add_lora(pipeline: Any, rank: int) -> list[Tensor]:
    """Freeze the pipeline and give its U-Net a LoRA; return the factors, which alone are trained."""
    from peft import LoraConfig

    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.eval().requires_grad_(requires_grad=False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    pipeline.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    return [parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad]


def distill(
    folder: Path, *, steps: int, every: int, rank: int = 8, batch: int = 24, rate: float = 1e-3, seed: int = 0
) -> None:
    """Distil the LCM-LoRA of ``FOLDER/pipeline``; write ``FOLDER/lora-SEED/checkpoint-N`` every few steps."""
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(seed)
    with quiet_libraries():
        pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline", safety_checker=None)
    optimizer = torch.optim.AdamW(add_lora(pipeline, rank), lr=rate)
    images, digits = half(0)
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
        captions = [template.format(digit) for template in TEMPLATES for digit in DIGITS]
        embeddings = pipeline.text_encoder(tokens_of(pipeline, captions))[0]
    embeddings = embeddings.unflatten(0, (len(TEMPLATES), len(DIGITS)))

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(latents), (batch,))
        return latents[chosen], embeddings[torch.randint(len(TEMPLATES), (batch,)), digits[chosen]]

    def save(step: int) -> None:
        if step % every == 0:
            save_lora(pipeline.unet, folder / f"lora-{seed}" / f"checkpoint-{step}")

    loss = consistency_loss(pipeline, draw)
    descend(loss, optimizer, steps=steps, after=save, description=f"LCM-LoRA {seed}")


def consistency_loss(pipeline: Any, draw: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
    """Step → the loss of an LCM-LoRA on a batch of latents and text embeddings, as in diffusers' script.

    The student at t is drawn to itself at t − TIMESTEPS / SOLVER_STEPS, after a DDIM step of the guided teacher, which
    is the U-Net without its LoRA.
    """
    unet = pipeline.unet
    with torch.no_grad():
        unconditional = pipeline.text_encoder(tokens_of(pipeline, [""]))[0]
    signal = pipeline.scheduler.alphas_cumprod.sqrt()
    noise_level = (1 - pipeline.scheduler.alphas_cumprod).sqrt()
    interval = TIMESTEPS // SOLVER_STEPS

    def of(values: Tensor, times: Tensor) -> Tensor:
        return values[times][:, None, None, None]

    def predicted(noisy: Tensor, times: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """The U-Net's latents and noise."""
        noise = unet(noisy, times, conditions).sample
        return (noisy - of(noise_level, times) * noise) / of(signal, times), noise

    def consistency(noisy: Tensor, times: Tensor, conditions: Tensor) -> Tensor:
        scaled = times[:, None, None, None] * TIMESTEP_SCALING
        skip = 0.25 / (scaled**2 + 0.25)
        out = scaled / (scaled**2 + 0.25).sqrt()
        return skip * noisy + out * predicted(noisy, times, conditions)[0]

    def loss(_step: int) -> Tensor:
        latents, conditions = draw()
        batch = len(latents)
        times = (torch.randint(1, SOLVER_STEPS + 1, (batch,)) * interval) - 1
        earlier = (times - interval).clamp(min=0)
        noise = torch.randn(latents.shape)
        noisy = of(signal, times) * latents + of(noise_level, times) * noise
        with torch.no_grad():
            unet.disable_adapters()
            both = torch.cat([conditions, unconditional.expand_as(conditions)])
            clean, noises = predicted(noisy.repeat(2, 1, 1, 1), times.repeat(2), both)
            unet.enable_adapters()
            guided = [part[:batch] + GUIDANCE * (part[:batch] - part[batch:]) for part in (clean, noises)]
            before = of(signal, earlier) * guided[0] + of(noise_level, earlier) * guided[1]
            target = consistency(before, earlier, conditions)
        difference = consistency(noisy, times, conditions) - target
        error: Tensor = ((difference**2 + HUBER**2).sqrt() - HUBER).mean()
        return error

    return loss


def save_lora(unet: Any, folder: Path) -> None:
    """As the trainers of diffusers do."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    config = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)


# What it is measured with


class Features:
    """The features of a small classifier of digits, of images ``[N, 3, 16, 16]``."""

    def __init__(self) -> None:
        self._network = feature_network("digits")
        self.name = f"{self._network.name}-of-{SIDE}"
        self.dimension = self._network.dimension

    def __call__(self, images: Tensor) -> Tensor:
        """``[N, D]``."""
        features: Tensor = self._network(_small(images))
        return features


def _small(images: Tensor) -> Tensor:
    """``[N, 3, 16, 16]`` → ``[N, 1, 8, 8]``, the digits' own size."""
    return F.avg_pool2d(images.float().mean(dim=1, keepdim=True), 2)


def likelihood(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``[N]``: the log-probability of the digit in the prompt, by a classifier of half A; at least −10. Searched."""
    return _likelihood(0, images, prompts)


def unseen_likelihood(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The same by a classifier of half B, which neither the pipeline nor a search has seen. Reported."""
    return _likelihood(1, images, prompts)


def _likelihood(number: int, images: Tensor, prompts: Sequence[str]) -> Tensor:
    digits = torch.tensor([DIGITS.index(prompt.split()[-1]) for prompt in prompts])
    scores: Tensor = classifier(number)(_small(images)).log_softmax(dim=1)
    return scores.gather(1, digits[:, None])[:, 0].clamp(min=-10)


@functools.cache
def classifier(number: int, steps: int = 200) -> nn.Module:
    """A classifier of half A (0) or B (1), trained in seconds."""
    enlarged, digits = half(number)
    images = _small(enlarged)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(number)
        network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        descend(
            lambda _: F.cross_entropy(network(images), digits),
            optimizer,
            steps=steps,
            description=f"classifier of half {'AB'[number]}",
        )
    return network.requires_grad_(requires_grad=False)


def write_data(folder: Path) -> None:
    """The prompts, and both halves of the digits as images: ``FOLDER/prompts.txt``, ``real/A`` and ``real/B`` …"""
    for template, name in zip(TEMPLATES, ("prompts.txt", "held_out_prompts.txt"), strict=True):
        (folder / name).write_text("".join(f"{template.format(digit)}\n" for digit in DIGITS))
    for number, name in enumerate("AB"):
        place = folder / "real" / name
        place.mkdir(parents=True, exist_ok=True)
        levels = ((half(number)[0] + 1) * 127.5).round().clamp(0, 255).byte()
        for index, image in enumerate(levels.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(place / f"{index:04}.png")


def train(
    folder: Path,
    *,
    seeds: Sequence[int] = (0,),
    autoencoder_steps: int = 500,
    steps: int = 2000,
    lora_steps: int = 800,
    every: int = 25,
) -> None:
    """Everything that is not there yet, on one thread: small layers gain nothing from more."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[tuple[Path, Callable[[], None]]] = [
        (folder / "real" / "B", lambda: write_data(folder)),
        (
            folder / "pipeline" / "model_index.json",
            lambda: train_pipeline(folder, autoencoder_steps=autoencoder_steps, steps=steps),
        ),
    ]
    for seed in seeds:
        last = folder / f"lora-{seed}" / f"checkpoint-{lora_steps // every * every}"
        parts.append((last, functools.partial(distill, folder, steps=lora_steps, every=every, seed=seed)))
    with one_torch_thread():
        for result, make in parts:
            if not result.exists():
                make()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/lora"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the LoRA's trainings")
    parser.add_argument("--autoencoder-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=2000, help="of the pipeline's training")
    parser.add_argument("--lora-steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=25, help="steps between the LoRA's checkpoints")
    train(**vars(parser.parse_args()))
