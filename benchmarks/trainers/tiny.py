"""The small data of all trainers, a Fréchet distance to compare with ours, and the command line of each file here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from lcsc_opt.base.imports import allow_mismatched_torchvision

allow_mismatched_torchvision()  # first, since most trainers import a torchvision that may not fit this torch

PARTS = {"train": (0, 900), "search": (900, 1200), "selection": (1200, 1500), "held-out": (1500, 1797)}
SAMPLES = 2000  # of an evaluation, as in our reports: a Fréchet distance falls with their number
EVALUATIONS = 8  # of a model whose images are sampled anew
IMAGES = Path("images")  # of the digits that the image models are trained on


def digits(part: str) -> tuple[Tensor, Tensor]:
    """A part of scikit-learn's digits: images ``[N, 1, 8, 8]`` in [0, 1], and labels ``[N]``."""
    first, last = PARTS[part]
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))[first:last]  # neighbours are of one writer
    images = torch.tensor(data.images[order], dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(data.target[order])


def write_images(folder: Path, images: Tensor) -> None:
    """Write images ``[N, 1, H, W]`` in [0, 1] as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate((images[:, 0] * 255).round().to(torch.uint8).numpy()):
        Image.fromarray(image).save(folder / f"{number:04}.png")


def lines(remainder: int) -> list[str]:
    """Every tenth line of the help that comes with Python; 7, 8 and 9 are for no training."""
    whole = [line.strip() for name in sorted(topics) for line in topics[name].splitlines()]
    return [line for line in whole if len(line) > 40][remainder::10]


class Pixels:
    """The 64 pixels of an 8×8 image as its features."""

    name = "pixels-8"
    dimension = 64

    def __call__(self, images: Tensor) -> Tensor:
        """``[N, C, 8, 8]`` → ``[N, 64]``."""
        return images.float().mean(dim=1).flatten(1)


def distance(images: Tensor) -> float:
    """The Fréchet distance of samples ``[N, C, 8, 8]`` in [0, 1] to :data:`IMAGES`, in the pixels of [−1, 1]."""
    real = [np.asarray(Image.open(path).convert("RGB")).mean(axis=2) / 255 for path in sorted(IMAGES.glob("*.png"))]
    one = 2 * np.stack(real).reshape(len(real), -1) - 1
    other = 2 * images.clamp(0, 1).mean(dim=1).flatten(1).double().numpy() - 1
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = _root(first)
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def batches(part: str, draw: Any = None, size: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
    """The digits of a part, batch by batch; with ``draw.size``, as many of them as that."""
    images, labels = digits(part)
    order = torch.arange(len(images))
    if draw is not None and draw.size is not None:
        order = torch.tensor(np.random.default_rng(draw.seed).permutation(len(images))[: draw.size])
    for indices in order.split(size):
        yield images[indices], labels[indices]


def main(train: Callable[[], None], evaluate: Callable[[str], list[float]]) -> None:
    """``train``; or ``evaluate PATH...``: the trainer's own number of what its own loader reads there, as JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    command, *paths = sys.argv[1:]
    if command == "train":
        train()
    else:
        print(json.dumps([evaluate(path) for path in paths]))
