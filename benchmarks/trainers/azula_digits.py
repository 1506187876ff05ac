"""azula: its denoiser, trained with an average as its CIFAR-10 tutorial does, and its DDIM sampler."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from azula.denoise import KarrasDenoiser
from azula.nn.layers import SineEncoding
from azula.nn.unet import UNet
from azula.noise import VPSchedule
from azula.sample import DDIMSampler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SHAPE = (1, 8, 8)
FEATURES = 32  # of a time
STEPS = 8
EVERY = 40


class Backbone(nn.Module):
    """A small U-Net with a time."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(1, 1, hid_channels=(16, 32), hid_blocks=(1, 1), mod_features=FEATURES)
        self.encoding = SineEncoding(FEATURES)

    def forward(self, noisy: Tensor, time: Tensor) -> Tensor:
        """``[N, 1, 8, 8]`` and ``[N]`` → ``[N, 1, 8, 8]``."""
        images: Tensor = self.unet(noisy, self.encoding(time))
        return images


def build() -> KarrasDenoiser:
    """The denoiser around it."""
    return KarrasDenoiser(Backbone(), VPSchedule())


def averaging(denoiser: KarrasDenoiser) -> AveragedModel:
    """The tutorial's average."""
    return AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(0.98))


def train(steps: int = 640) -> None:
    """Checkpoints of the denoiser, its average and the optimizer."""
    images = 2 * tiny.digits("train")[0] - 1
    tiny.write_images(tiny.IMAGES, tiny.digits("train")[0])
    denoiser = build()
    averaged = averaging(denoiser)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    Path("runs").mkdir()
    for step in range(1, steps + 1):
        clean = images[torch.randint(len(images), (64,))]
        denoiser.loss(clean, torch.rand(len(clean))).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(denoiser)
        if step % EVERY == 0:
            saved = {
                "denoiser": denoiser.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(saved, f"runs/denoiser_{step:05}.pt")


def sample(denoiser: nn.Module, noise: Tensor) -> Tensor:
    """What its sampler makes of noise, which at the time 1 is nearly all that is left of an image."""
    assert isinstance(denoiser, KarrasDenoiser)
    images: Tensor = DDIMSampler(denoiser, steps=STEPS, silent=True)(noise)
    return images.clip(-1, 1)


@torch.no_grad()
def evaluate(path: str) -> list[float]:
    """The Fréchet distance of images of the averaged denoiser, from its sampler's own noise."""
    averaged = averaging(build())
    averaged.load_state_dict(torch.load(path, weights_only=True)["averaged"])
    denoiser = averaged.module.eval()
    sampler = DDIMSampler(denoiser, steps=STEPS, silent=True)
    drawn = [sampler(sampler.init((tiny.SAMPLES, *SHAPE))) for _ in range(tiny.EVALUATIONS)]
    return [tiny.distance((images.clip(-1, 1) + 1) / 2) for images in drawn]


if __name__ == "__main__":
    tiny.main(train, evaluate)
