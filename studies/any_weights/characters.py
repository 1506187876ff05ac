"""A classifier of drawn characters: its training, and its scores. ``characters.yaml`` searches over its checkpoints.

    python characters.py        # about two minutes on two cores; writes runs/characters/*.pt

The characters are drawn with the font that Pillow carries: shifted, turned, shaded and noisy. Training, search
and report use different characters.
"""

from __future__ import annotations

import argparse
import functools
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = string.digits + string.ascii_uppercase
POOL = 30_000  # characters of a group, from which draws choose
SIDE = 16  # pixels
NOISE = 0.3
GROUPS = ("train", "search", "selection", "held-out")


def build() -> nn.Module:
    """A small convolutional network, ``[N, 1, 16, 16]`` → logits ``[N, 36]``."""

    def block(channels: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Linear(256, len(CLASSES)))


def accuracy(model: nn.Module, draw: Any) -> Tensor:
    """``[n]``: 1 for each character that is recognized."""
    images, labels = drawn(draw.group, draw.seed, draw.size)
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double()


def loss(model: nn.Module, draw: Any) -> dict[str, Tensor]:
    """The cross-entropy of each character, with its graph; and the accuracy."""
    images, labels = drawn(draw.group, draw.seed, draw.size)
    logits = model(images)
    return {
        "cross-entropy": F.cross_entropy(logits, labels, reduction="none"),
        "accuracy": (logits.argmax(1) == labels).double(),
    }


def drawn(group: str, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Images ``[size, 1, 16, 16]`` and labels ``[size]`` of a group, chosen by the seed."""
    images, labels = pool(group)
    chosen = torch.from_numpy(np.random.default_rng([GROUPS.index(group), seed]).permutation(len(labels))[:size])
    return images[chosen], labels[chosen]


@functools.cache
def pool(group: str) -> tuple[Tensor, Tensor]:
    """All characters of a group: images ``[30000, 1, 16, 16]`` and labels."""
    random = np.random.default_rng([1, GROUPS.index(group)])
    labels = random.integers(len(CLASSES), size=POOL)
    images = drawn_characters([CLASSES[label] for label in labels], random)
    images += random.normal(0, NOISE, images.shape)
    return torch.from_numpy(images.astype(np.float32))[:, None], torch.from_numpy(labels)


def drawn_characters(texts: Sequence[str], random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Characters ``[n, 16, 16]`` in [−1, 1] in the font that Pillow carries: shifted, turned, between two shades."""
    fonts = [ImageFont.load_default(size) for size in range(22, 33, 2)]
    images = np.empty((len(texts), SIDE, SIDE))
    # the order of the draws decides which images these are
    for image, text in zip(images, texts, strict=True):
        canvas = Image.new("L", (2 * SIDE, 2 * SIDE))  # scaled down after it was turned, which smooths edges
        middle = SIDE + random.uniform(-3, 3, size=2)
        font = fonts[random.integers(len(fonts))]
        ImageDraw.Draw(canvas).text(tuple(middle), text, fill=255, font=font, anchor="mm")
        turned = canvas.rotate(random.uniform(-25, 25), Image.Resampling.BILINEAR)
        dark = random.uniform(-1, -0.2)
        light = random.uniform(0.2, 1)
        small = turned.resize((SIDE, SIDE), Image.Resampling.BOX)
        image[:] = np.asarray(small) / 255 * (light - dark) + dark
    return images


def train(folder: Path, *, steps: int = 4000, every: int = 50, seed: int = 0) -> None:
    """Adam at a constant rate, as the averages of WSM expect; a checkpoint every ``every`` steps of the later half."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = pool("train")
    folder.mkdir(parents=True, exist_ok=True)
    for step in range(1, steps + 1):
        batch = torch.randint(len(labels), (64,), generator=generator)
        error = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if step % every == 0:
            print(f"step {step} of {steps}: cross-entropy {error.item():.3f}")
            if 2 * step > steps:
                torch.save(model.state_dict(), folder / f"step_{step:06}.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/characters"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
