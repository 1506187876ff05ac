"""PostHocEMA of ema-pytorch: averages of two widths, in files such as ``1.100.pt``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tiny
import torch
from ema_pytorch import KarrasEMA, PostHocEMA
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (0.1, 0.05)


def build() -> nn.Module:
    """A classifier of digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train() -> None:
    """Two files every 25 steps."""
    model = build()
    averages = PostHocEMA(
        model,
        sigma_rels=WIDTHS,
        update_every=1,
        checkpoint_every_num_steps=25,
        checkpoint_folder="runs",
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images, labels = tiny.digits("train")
    for _ in range(750):
        indices = torch.randint(len(images), (30,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[indices]), labels[indices]).backward()
        optimizer.step()
        averages.update()


def loss(model: nn.Module, draw: Any) -> Iterator[Tensor]:
    """The cross-entropy of each image."""
    for images, labels in tiny.batches(draw.group, draw):
        yield F.cross_entropy(model(images), labels, reduction="none")


@torch.no_grad()
def evaluate(path: str) -> list[float]:
    """The loss of the average that ``KarrasEMA`` loads."""
    average = KarrasEMA(build(), sigma_rel=WIDTHS[1])
    average.load_state_dict(torch.load(path, weights_only=True))
    images, labels = tiny.digits("held-out")
    return [F.cross_entropy(average.ema_model(images), labels).item()]


if __name__ == "__main__":
    tiny.main(train, evaluate)
