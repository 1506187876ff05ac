"""diffusers: what ``examples/unconditional_image_generation/train_unconditional.py`` calls; wheels lack the script."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

STEPS = 20  # of the pipeline's own sampler, the script's --ddpm_num_inference_steps


def train(steps: int = 800) -> None:
    """A checkpoint every 40 steps, with the raw weights and the EMA, and the pipeline at the end."""
    tiny.write_images(tiny.IMAGES, tiny.digits("train")[0])
    images = 2 * tiny.digits("train")[0] - 1
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, power=0.75, model_cls=UNet2DModel, model_config=unet.config)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    accelerator = Accelerator(cpu=True)
    unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), lr=1e-3))

    def save(models: list[torch.nn.Module], weights: list[object], folder: str) -> None:
        ema.save_pretrained(str(Path(folder) / "unet_ema"))
        for model in models:
            assert isinstance(model, UNet2DModel)
            model.save_pretrained(str(Path(folder) / "unet"))
            weights.pop()

    accelerator.register_save_state_pre_hook(save)
    for step in range(1, steps + 1):
        clean = images[torch.randint(len(images), (32,))]
        noise = torch.randn(clean.shape)
        times = torch.randint(0, 1000, (len(clean),))
        optimizer.zero_grad()
        loss = F.mse_loss(unet(scheduler.add_noise(clean, noise, times), times).sample, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.step(unet.parameters())
        if step % 40 == 0:
            accelerator.save_state(f"runs/checkpoint-{step}")
    unet = accelerator.unwrap_model(unet)
    ema.copy_to(unet.parameters())
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained("runs")


def evaluate(path: str) -> list[float]:
    """The Fréchet distance of what the saved pipeline samples with this network."""
    pipeline = DDPMPipeline.from_pretrained("runs", unet=UNet2DModel.from_pretrained(path))
    pipeline.set_progress_bar_config(disable=True)
    numbers = []
    for seed in range(tiny.EVALUATIONS):
        noise = torch.Generator().manual_seed(seed)
        made = pipeline(tiny.SAMPLES, noise, num_inference_steps=STEPS, output_type="np").images
        numbers.append(tiny.distance(torch.from_numpy(made).permute(0, 3, 1, 2)))
    return numbers


if __name__ == "__main__":
    tiny.main(train, evaluate)
