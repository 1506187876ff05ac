"""Feature networks for the bundled images.

Inception's features say little about 8×8 images, and Inception must be downloaded. So the penultimate layer of a small
classifier of such images replaces it: FID in its features falls when samples look more like the images. The
classifier is trained in seconds, without augmentation: a network that has learned to ignore noise and shifts would not
see them in samples. It is cached by its settings.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lcsc_opt.base.descent import descend, torch_threads
from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.paths import BUNDLED_WEIGHTS
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.metrics.bundled_images import (
    COLUMNS,
    FORMATS,
    MNIST_TRAINED_ON,
    ROWS,
    SIDE,
    SIZE,
    Bundled,
    bundled_images,
)

BATCH = 128  # of the classifiers
LEARNING_RATE = 1e-3
HELD_OUT_FRACTION = 0.2
SECOND_SEED = 1  # of the second network, which only held-out reports use
SECOND_DIMENSION = 48


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of a classifier; the images and the constants above are versioned by :data:`FORMATS`.

    Attributes:
        name: the name of the images; the extractor and the cached file are named after it.
        image_shape: ``[C, H, W]``.
        strides: the strides of the three convolutions; their product divides height and width.
        classes: how many there are.
        dimension: D, the number of features.
        epochs: passes over the 80 % of the images that are trained on.
        seed: the seed of the split, the initial weights and the order of the batches.
    """

    name: Bundled
    image_shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    classes: int
    dimension: int
    epochs: int
    seed: int

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, f"{self.name}-network", purpose))


SETTINGS: dict[Bundled, _Settings] = {
    "digits": _Settings(
        name="digits",
        image_shape=(1, 8, 8),
        strides=(1, 2, 2),
        classes=10,
        dimension=64,
        epochs=40,
        seed=0,
    ),
    "photographs": _Settings(
        name="photographs",
        image_shape=(3, SIZE, SIZE),
        strides=(2, 2, 2),
        classes=2 * ROWS * COLUMNS,
        dimension=64,
        epochs=40,
        seed=0,
    ),
    "mnist": _Settings(
        name="mnist",
        image_shape=(1, SIDE, SIDE),
        strides=(2, 1, 2),
        classes=10,
        dimension=64,
        epochs=30,
        seed=0,
    ),
}


class _Classifier(nn.Module):
    """A classifier of three convolutions and a hidden layer of features, differentiable in the images.

    SiLU is smooth and does not saturate. No layer mixes images of a batch. Weights are He normal, biases zero.
    """

    def __init__(self, settings: _Settings) -> None:
        super().__init__()
        self._settings = settings
        self.dimension = settings.dimension
        channels, height, width = settings.image_shape
        first, second, third = settings.strides
        stride = first * second * third
        # On the meta device the layers' own initialization draws nothing from torch's global generator.
        self.conv_1 = nn.Conv2d(channels, 16, 3, stride=first, padding=1, device="meta")
        self.conv_2 = nn.Conv2d(16, 32, 3, stride=second, padding=1, device="meta")
        self.conv_3 = nn.Conv2d(32, 64, 3, stride=third, padding=1, device="meta")
        positions = (height // stride) * (width // stride)  # the strides divide the sides
        self.hidden = nn.Linear(64 * positions, settings.dimension, device="meta")
        self.head = nn.Linear(settings.dimension, settings.classes, device="meta")
        self.to_empty(device="cpu")
        generator = settings.generator("weights")
        for parameter in self.parameters():
            if parameter.ndim > 1:
                # He's gain is that of ReLU, which is near enough for SiLU
                nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
            else:
                nn.init.zeros_(parameter)

    @functools.cached_property
    def name(self) -> str:
        """``<images>-<dimension>-<hash of the weights>``."""
        return f"{self._settings.name}-{self.dimension}-{weights_sha256(self.state_dict())[:12]}"

    @property
    def in_words(self) -> str:
        """What it is, for reports."""
        which = "second" if self._settings.seed == SECOND_SEED else "small"
        return f"a {which} network trained on {self._settings.name}"

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of ``[B, C, H, W]`` in [−1, 1].

        Raises:
            MetricError: for images of another shape.
        """
        if tuple(images.shape[1:]) != self._settings.image_shape:
            sizes = ", ".join(f"{name} {_in_words(other.image_shape)}" for name, other in SETTINGS.items())
            raise MetricError(
                f"loss: the network {self._settings.name} takes images of {_in_words(self._settings.image_shape)}, and "
                f"these are {_in_words(images.shape[1:])}. The small networks take one size each ({sizes}); fdr, "
                "fdr@clip and fdr@dinov2 take any"
            )
        x = images.to(self.hidden.weight)
        for convolution in (self.conv_1, self.conv_2, self.conv_3):
            x = F.silu(convolution(x))
        return F.silu(self.hidden(x.flatten(1)))


def _in_words(shape: Sequence[int]) -> str:
    """``[C, H, W]`` → ``C×H×W``."""
    return "×".join(str(size) for size in shape)


def feature_network(name: Bundled, *, second: bool = False, **changes: Any) -> _Classifier:
    """The classifier of these images as it ships; with other settings it is trained.

    On the same machine, training again gives the same weights with any number of torch's threads. On another kind of
    processor the weights differ by rounding, so the extractor's name differs, too.

    Args:
        name: the name of the images.
        second: another network with other features, which no search uses.
        changes: ``seed``, ``dimension`` or ``epochs`` in place of the defaults.
    """
    settings = _settings(name, second=second, **changes)
    network = _Classifier(settings)
    file = _file(settings)
    if file.exists():
        network.load_state_dict(load_file(file))
    else:
        with torch_threads(1):  # small layers gain nothing from more
            _train(network, settings)
    return network.eval().requires_grad_(requires_grad=False)


def ship_feature_network(name: Bundled, *, second: bool) -> None:
    """Train the network anew, and write it to where :func:`feature_network` finds it."""
    file = _file(_settings(name, second=second))
    file.unlink(missing_ok=True)
    save_file(feature_network(name, second=second).state_dict(), file)


def _settings(name: Bundled, *, second: bool, **changes: Any) -> _Settings:
    settings = SETTINGS[name]
    if second:
        settings = dataclasses.replace(settings, seed=SECOND_SEED, dimension=SECOND_DIMENSION)
    return dataclasses.replace(settings, **changes)


def _file(settings: _Settings) -> Path:
    """Where the weights of these settings ship; named by all that decides them."""
    text = json.dumps({"format": FORMATS[settings.name], **dataclasses.asdict(settings)}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return BUNDLED_WEIGHTS / f"{settings.name}-network-{digest}.safetensors"


def _train(network: _Classifier, settings: _Settings) -> None:
    """Train on 80 % of the images; of MNIST's, on 80 % of those that the shipped model was trained on."""
    images, classes = bundled_images(settings.name)
    if settings.name == "mnist":  # so that no network has seen the others
        images = images[MNIST_TRAINED_ON]
        classes = classes[MNIST_TRAINED_ON]
    order = torch.randperm(len(images), generator=settings.generator("split"))
    training_indices = order[math.ceil(len(images) * HELD_OUT_FRACTION) :]
    images = images[training_indices]
    classes = classes[training_indices]
    steps = settings.epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    batches = _batches(len(images), settings)

    def loss(_step: int) -> Tensor:
        batch = next(batches)
        return F.cross_entropy(network.head(network(images[batch])), classes[batch])

    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    descend(loss, optimizer, steps=steps, schedule=schedule, description=f"training the {settings.name} extractor")


def _batches(count: int, settings: _Settings) -> Iterator[Tensor]:
    """The indices of each batch; every epoch has a new order."""
    shuffle = settings.generator("batches")
    for _ in range(settings.epochs):
        yield from torch.split(torch.randperm(count, generator=shuffle), BATCH)
