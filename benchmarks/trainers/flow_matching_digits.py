"""Meta's flow_matching: what ``examples/image`` calls, whose EMA keeps averages beside the model; wheels lack it."""

from __future__ import annotations

import argparse
from pathlib import Path

import tiny
import torch
from flow_matching.path import CondOTProbPath
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper
from torch import Tensor, nn

SHAPE = (1, 8, 8)
STEPS = 8  # of the midpoint rule, as in the example's evaluation


class Velocity(nn.Module):
    """A small convolutional network of images and times."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        """The velocity at each pixel."""
        hidden = self.first(images) + self.time(times[:, None])[:, :, None, None]
        for layer in self.middle:
            hidden = hidden + layer(nn.functional.silu(hidden))
        velocity: Tensor = self.last(nn.functional.silu(hidden))
        return velocity


class EMA(nn.Module):
    """Has the state dict, and the change at ``train`` and ``eval``, of ``examples/image/models/ema.py``."""

    def __init__(self, model: nn.Module, decay: float = 0.99) -> None:
        super().__init__()
        self.model = model
        self.decay = decay
        self.register_buffer("num_updates", torch.tensor(0))
        copies = [nn.Parameter(weights.detach().clone(), requires_grad=False) for weights in model.parameters()]
        self.shadow_params = nn.ParameterList(copies)
        self.raw: list[Tensor] = []

    def train(self, mode: bool = True) -> EMA:
        """The averages are in the model while it is evaluated."""
        if mode != self.training:
            taken = self.raw if mode else [weights.detach() for weights in self.shadow_params]
            self.raw = [weights.detach().clone() for weights in self.model.parameters()]
            for weights, other in zip(self.model.parameters(), taken, strict=True):
                weights.data.copy_(other)
        super().train(mode)
        return self

    @torch.no_grad()
    def update(self) -> None:
        """One step of the averages."""
        self.num_updates += 1
        count = self.num_updates.item()
        decay = min(self.decay, (1 + count) / (10 + count))
        for average, weights in zip(self.shadow_params, self.model.parameters(), strict=True):
            average.lerp_(weights, 1 - decay)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        """As the model's."""
        velocity: Tensor = self.model(images, times)
        return velocity


class Field(ModelWrapper):
    """The velocity as the solver calls it: one time for all images."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As the model's."""
        velocity: Tensor = self.model(x, t.expand(len(x)))
        return velocity


def build() -> EMA:
    """What the example trains and loads."""
    return EMA(Velocity())


def train(epochs: int = 24) -> None:
    """A checkpoint each epoch, and the last one again as ``checkpoint.pth``."""
    images = 2 * tiny.digits("train")[0] - 1
    tiny.write_images(tiny.IMAGES, tiny.digits("train")[0])
    model = build()
    path = CondOTProbPath()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, total_iters=epochs, factor=1.0)
    Path("runs").mkdir()
    for epoch in range(epochs):
        model.train()
        for indices in torch.randperm(len(images)).split(32):
            clean = images[indices]
            point = path.sample(t=torch.rand(len(clean)), x_0=torch.randn_like(clean), x_1=clean)
            optimizer.zero_grad()
            (model(point.x_t, point.t) - point.dx_t).square().mean().backward()
            optimizer.step()
            model.update()
        schedule.step()
        saved = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_schedule": schedule.state_dict(),
            "epoch": epoch,
            "scaler": {},
            "args": argparse.Namespace(epochs=epochs, use_ema=True),
        }
        for name in (f"checkpoint-{epoch}.pth", "checkpoint.pth"):
            torch.save(saved, Path("runs") / name)


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    """What the solver of flow_matching makes of noise."""
    solver = ODESolver(Field(model))
    images: Tensor = solver.sample(
        noise, step_size=1 / STEPS, method="midpoint", time_grid=torch.tensor([0.0, 1.0]), enable_grad=False
    )
    return images


def evaluate(path: str) -> list[float]:
    """The Fréchet distance of images that the EMA samples; the example's FID needs a network to download."""
    model = build()
    model.load_state_dict(torch.load(path, weights_only=False)["model"])
    model.eval()
    drawn = [sample(model, torch.randn(tiny.SAMPLES, *SHAPE)) for _ in range(tiny.EVALUATIONS)]
    return [tiny.distance((images + 1) / 2) for images in drawn]


if __name__ == "__main__":
    tiny.main(train, evaluate)
