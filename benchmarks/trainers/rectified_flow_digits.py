"""rectified-flow (of Liu and others): its ``RectifiedFlow``, folders that its U-Net's ``save_pretrained`` writes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import tiny
import torch
from rectified_flow.models.unet import SongUNet, SongUNetConfig
from rectified_flow.rectified_flow import RectifiedFlow
from rectified_flow.samplers import EulerSampler
from torch import Tensor, nn

CONFIG = "unet_config.json"
SHAPE = (1, 8, 8)
STEPS = 8
EVERY = 40
EMA_DECAY = 0.98


def build() -> SongUNet:
    """Its U-Net, small."""
    return SongUNet(
        SongUNetConfig(
            img_resolution=8,
            in_channels=1,
            out_channels=1,
            model_channels=16,
            channel_mult=[1, 2],
            num_blocks=1,
            attn_resolutions=[],
            dropout=0.0,
        )
    )


def flow(network: nn.Module) -> RectifiedFlow:
    """What trains it, and samples with it."""
    return RectifiedFlow(SHAPE, network)


def train(steps: int = 640) -> None:
    """Folders with the network, and with its average where ``from_pretrained(use_ema=True)`` looks for it."""
    images = 2 * tiny.digits("train")[0] - 1
    tiny.write_images(tiny.IMAGES, tiny.digits("train")[0])
    network = build()
    average = copy.deepcopy(network)
    rectified = flow(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        clean = images[torch.randint(len(images), (64,))]
        times = rectified.sample_train_time(len(clean), expand_dim=False)
        rectified.get_loss(x_0=None, x_1=clean, t=times).backward()
        optimizer.step()
        with torch.no_grad():
            for averaged, trained in zip(average.parameters(), network.parameters(), strict=True):
                averaged.lerp_(trained, 1 - EMA_DECAY)
        if step % EVERY == 0:
            folder = Path(f"runs/checkpoint-{step}")
            network.save_pretrained(str(folder))
            torch.save(average.state_dict(), folder / "unet_ema.pt")
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def sample(network: nn.Module, noise: Tensor) -> Tensor:
    """What its sampler makes of noise."""
    sampler = EulerSampler(flow(network), num_steps=STEPS).sample_loop(x_0=noise)
    images: Tensor = sampler.trajectories[-1]
    return images.clip(-1, 1)


@torch.no_grad()
def evaluate(path: str) -> list[float]:
    """The Fréchet distance of images of what ``from_pretrained`` reads; an export gets the configuration beside it."""
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
        shutil.copy(f"runs/checkpoint-640/{CONFIG}", folder)
    network = SongUNet.from_pretrained(str(folder)).eval()
    sampler = EulerSampler(flow(network), num_steps=STEPS)
    drawn = [sampler.sample_loop(num_samples=tiny.SAMPLES).trajectories[-1] for _ in range(tiny.EVALUATIONS)]
    return [tiny.distance((images.clip(-1, 1) + 1) / 2) for images in drawn]


if __name__ == "__main__":
    tiny.main(train, evaluate)
