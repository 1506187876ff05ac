"""torchcfm: what its CIFAR-10 example calls, with checkpoints as that writes them, sampled by torchdyn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
from torchcfm.models.unet.unet import UNetModelWrapper
from torchdyn.core import NeuralODE

SHAPE = (1, 8, 8)
STEPS = 8  # of Euler
EMA_DECAY = 0.99
EVERY = 60


def build() -> nn.Module:
    """The network that the example trains, small."""
    network: nn.Module = UNetModelWrapper(
        dim=SHAPE, num_channels=32, num_res_blocks=1, channel_mult=(1, 1), num_heads=2, attention_resolutions="4"
    )
    return network


def train(steps: int = 960) -> None:
    """Checkpoints of the network and of its EMA, with the optimizer."""
    images = 2 * tiny.digits("train")[0] - 1
    tiny.write_images(tiny.IMAGES, tiny.digits("train")[0])
    network = build()
    average = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: min(step, 100) / 100)
    matcher: Any = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    Path("runs").mkdir()
    for step in range(steps + 1):
        optimizer.zero_grad()
        clean = images[torch.randint(len(images), (64,))]
        times, point, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(clean), clean)
        (network(times, point) - velocity).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for averaged, trained in zip(average.parameters(), network.parameters(), strict=True):
                averaged.lerp_(trained, 1 - EMA_DECAY)
        if step > 0 and step % EVERY == 0:
            saved = {
                "net_model": network.state_dict(),
                "ema_model": average.state_dict(),
                "sched": schedule.state_dict(),
                "optim": optimizer.state_dict(),
                "step": step,
            }
            torch.save(saved, f"runs/otcfm_cifar10_weights_step_{step}.pt")


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    """What torchdyn's solver makes of noise, as the example's ``generate_samples``."""
    node = NeuralODE(model, solver="euler", sensitivity="adjoint")
    images: Tensor = node.trajectory(noise, t_span=torch.linspace(0, 1, STEPS + 1))[-1]
    return images.clip(-1, 1)


@torch.no_grad()
def evaluate(path: str) -> list[float]:
    """The Fréchet distance of images that the EMA samples; the example's FID needs a network to download."""
    model = build()
    model.load_state_dict(torch.load(path, weights_only=True)["ema_model"])
    model.eval()
    drawn = [sample(model, torch.randn(tiny.SAMPLES, *SHAPE)) for _ in range(tiny.EVALUATIONS)]
    return [tiny.distance((images + 1) / 2) for images in drawn]


if __name__ == "__main__":
    tiny.main(train, evaluate)
