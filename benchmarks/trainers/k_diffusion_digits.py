"""k-diffusion: what ``train.py`` of this version calls, with files such as ``model_00000300.pth``; wheels lack it."""

from __future__ import annotations

import copy
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import tiny
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.modules["clip"] = types.ModuleType("clip")  # which needs an older setuptools; its features are not used here
import k_diffusion  # noqa: E402

WRITTEN = {
    "model": {
        "type": "image_v1",
        "input_channels": 1,
        "input_size": [8, 8],
        "mapping_out": 32,
        "depths": [1, 1],
        "channels": [16, 32],
        "self_attn_depths": [False, True],
        "loss_weighting": "soft-min-snr",
        "augment_prob": 0.12,
        "sigma_data": 0.75,
        "sigma_min": 1e-2,
        "sigma_max": 80,
        "sigma_sample_density": {"type": "cosine"},
    },
    "ema_sched": {"power": 0.6667, "max_value": 0.9999},
}
CONFIG: dict[str, Any] = k_diffusion.config.load_config(io.StringIO(json.dumps(WRITTEN)))
LIMITS = CONFIG["model"]["sigma_min"], CONFIG["model"]["sigma_max"]
SHAPE = (1, 8, 8)
STEPS = 15  # of its sampler; the script takes 50


def build() -> nn.Module:
    """The network of the configuration."""
    network: nn.Module = k_diffusion.config.make_model(CONFIG)
    return network


def train() -> None:
    """A checkpoint every 30 steps, with the raw weights and the EMA."""
    tiny.write_images(tiny.IMAGES, tiny.digits("train")[0])
    augmented = k_diffusion.augmentation.KarrasAugmentationPipeline(CONFIG["model"]["augment_prob"])
    images = k_diffusion.utils.FolderOfImages(tiny.IMAGES, transform=lambda image: augmented(image.convert("L")))
    loader = DataLoader(images, 32, shuffle=True, drop_last=True)
    accelerator = Accelerator(cpu=True)
    inner = build()
    inner_ema = copy.deepcopy(inner)
    model, model_ema = (k_diffusion.config.make_denoiser_wrapper(CONFIG)(network) for network in (inner, inner_ema))
    optimizer = torch.optim.AdamW(inner.parameters(), lr=2e-3, betas=(0.95, 0.999), eps=1e-6, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    warmup = k_diffusion.utils.EMAWarmup(**WRITTEN["ema_sched"])
    density = k_diffusion.config.make_sample_density(CONFIG["model"])
    Path("runs").mkdir()
    step = 0
    for epoch in range(22):
        for [(reals, _, condition)] in loader:
            losses = model.loss(reals, torch.randn_like(reals), density([len(reals)]), aug_cond=condition)
            accelerator.backward(losses.mean())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            k_diffusion.utils.ema_update(model, model_ema, warmup.get_value())
            warmup.step()
            if step % 30 == 0:
                saved = {
                    "model": inner.state_dict(),
                    "model_ema": inner_ema.state_dict(),
                    "opt": optimizer.state_dict(),
                    "sched": schedule.state_dict(),
                    "ema_sched": warmup.state_dict(),
                    "epoch": epoch,
                    "step": step,
                    "gns_stats": None,
                }
                accelerator.save(saved, f"runs/model_{step:08}.pth")
            step += 1


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    """The sampler of the script, which runs under ``no_grad``."""
    denoiser = k_diffusion.config.make_denoiser_wrapper(CONFIG)(model)
    sigmas = k_diffusion.sampling.get_sigmas_karras(STEPS, *LIMITS)
    images: Tensor = k_diffusion.sampling.sample_dpmpp_2m(denoiser, noise * LIMITS[1], sigmas, disable=True)
    return images


def evaluate(path: str) -> list[float]:
    """Its ``evaluation.fid`` of images that the EMA samples, in pixels: its extractors need a network to download."""
    model = build().eval()
    model.load_state_dict(torch.load(path, weights_only=True)["model_ema"])
    real = 2 * tiny.digits("train")[0].double().flatten(1) - 1
    numbers = []
    for _ in range(tiny.EVALUATIONS):
        made = sample(model, torch.randn(tiny.SAMPLES, *SHAPE)).clamp(-1, 1)
        numbers.append(k_diffusion.evaluation.fid(made.double().flatten(1), real).item())
    return numbers


if __name__ == "__main__":
    tiny.main(train, evaluate)
