"""denoising-diffusion-pytorch: its ``Trainer``, and its sampler, which runs in ``inference_mode``."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import tiny
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from torch import Tensor, nn


def build() -> GaussianDiffusion:
    """A small U-Net, sampled in ten steps of DDIM."""
    unet = Unet(dim=16, dim_mults=(1, 2), channels=1, attn_dim_head=8, attn_heads=2)
    return GaussianDiffusion(unet, image_size=8, timesteps=200, sampling_timesteps=10)


def trainer(milestone: int | None = None, folder: str = "runs") -> Trainer:
    """The trainer, with the weights of a milestone."""
    made = Trainer(
        build(),
        str(tiny.IMAGES),
        train_batch_size=32,
        train_lr=1e-3,
        train_num_steps=600,
        save_and_sample_every=30,
        num_samples=4,
        augment_horizontal_flip=False,
        results_folder=folder,
        calculate_fid=False,
    )
    if milestone is not None:
        made.load(milestone)
    return made


def train() -> None:
    """A milestone every 30 steps."""
    tiny.write_images(tiny.IMAGES, tiny.digits("train")[0])
    trainer().train()


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    """The trainer's own sampler, which begins with this noise."""
    assert isinstance(model, GaussianDiffusion)
    with mock.patch("torch.randn", return_value=noise):
        return model.sample(len(noise)) * 2 - 1


def evaluate(path: str) -> list[float]:
    """The Fréchet distance of images that the trainer's EMA samples; its own FID needs a network to download."""
    file = Path(path)
    milestone = int(file.stem.removeprefix("model-"))
    model = trainer(milestone, str(file.parent)).ema.ema_model
    return [tiny.distance(model.sample(tiny.SAMPLES)) for _ in range(tiny.EVALUATIONS)]


if __name__ == "__main__":
    tiny.main(train, evaluate)
