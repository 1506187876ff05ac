"""Feature networks for the bundled images.

Inception's features say little about 8×8 images, and Inception must be downloaded. So the penultimate layer of a small
classifier of such images replaces it: FID in its features falls when samples look more like the images. The
classifier was trained in seconds, without augmentation (``objectives/weights/train.py``): a network that has learned to
ignore noise and shifts would not see them in samples.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.paths import BUNDLED_WEIGHTS
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.metrics.bundled_images import COLUMNS, FORMATS, ROWS, SIDE, SIZE, Bundled

SECOND_SEED = 1  # of the second network, which only held-out reports use
SECOND_DIMENSION = 48


@dataclasses.dataclass(frozen=True)
class ClassifierSettings:
    """The settings of a classifier; the images and the constants of its training are versioned by :data:`FORMATS`.

    Attributes:
        name: the name of the images; the extractor and its file are named after it.
        image_shape: ``[C, H, W]``.
        strides: the strides of the three convolutions; their product divides height and width.
        classes: how many there are.
        epochs: passes over the 80 % of the images that are trained on.
        dimension: D, the number of features.
        seed: the seed of the split, the initial weights and the order of the batches.
    """

    name: Bundled
    image_shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    classes: int
    epochs: int
    dimension: int = 64
    seed: int = 0


SETTINGS: dict[Bundled, ClassifierSettings] = {
    "digits": ClassifierSettings("digits", (1, 8, 8), strides=(1, 2, 2), classes=10, epochs=40),
    "photographs": ClassifierSettings(
        "photographs", (3, SIZE, SIZE), strides=(2, 2, 2), classes=2 * ROWS * COLUMNS, epochs=40
    ),
    "mnist": ClassifierSettings("mnist", (1, SIDE, SIDE), strides=(2, 1, 2), classes=10, epochs=30),
}


class Classifier(nn.Module):
    """A classifier of three convolutions and a hidden layer of features, differentiable in the images.

    SiLU is smooth and does not saturate. No layer mixes images of a batch. It is made without weights. Its call ends at
    the features: ``head``, which tells classes apart, is for the training alone.
    """

    def __init__(self, settings: ClassifierSettings) -> None:
        super().__init__()
        self.settings = settings
        self.dimension = settings.dimension
        channels, height, width = settings.image_shape
        first, second, third = settings.strides
        stride = first * second * third
        # on the meta device the layers' own initialization draws nothing from torch's global generator
        self.conv_1 = nn.Conv2d(channels, 16, 3, stride=first, padding=1, device="meta")
        self.conv_2 = nn.Conv2d(16, 32, 3, stride=second, padding=1, device="meta")
        self.conv_3 = nn.Conv2d(32, 64, 3, stride=third, padding=1, device="meta")
        positions = (height // stride) * (width // stride)  # the strides divide the sides
        self.hidden = nn.Linear(64 * positions, settings.dimension, device="meta")
        self.head = nn.Linear(settings.dimension, settings.classes, device="meta")

    @functools.cached_property
    def name(self) -> str:
        """``<images>-<dimension>-<hash of the weights>``."""
        return f"{self.settings.name}-{self.dimension}-{weights_sha256(self.state_dict())[:12]}"

    @property
    def file(self) -> Path:
        """Where the weights ship; its name has a hash of all settings, so that weights of others are not found."""
        settings = self.settings
        text = json.dumps({"format": FORMATS[settings.name], **dataclasses.asdict(settings)}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return BUNDLED_WEIGHTS / f"{settings.name}-network-{digest}.safetensors"

    @property
    def in_words(self) -> str:
        """What it is, for reports."""
        which = "second" if self.settings.seed == SECOND_SEED else "small"
        return f"a {which} network trained on {self.settings.name}"

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of ``[B, C, H, W]`` in [−1, 1].

        Raises:
            MetricError: for images of another shape.
        """
        if tuple(images.shape[1:]) != self.settings.image_shape:
            sizes = ", ".join(f"{name} {_in_words(network.image_shape)}" for name, network in SETTINGS.items())
            raise MetricError(
                f"loss: the network {self.settings.name} takes images of {_in_words(self.settings.image_shape)}, and "
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


def feature_network(name: Bundled, *, second: bool = False) -> Classifier:
    """The classifier of these images.

    Args:
        name: the name of the images.
        second: another network with other features, which no search uses.
    """
    settings = SETTINGS[name]
    if second:
        settings = dataclasses.replace(settings, seed=SECOND_SEED, dimension=SECOND_DIMENSION)
    network = Classifier(settings)
    network.load_state_dict(load_file(network.file), assign=True)  # to a meta tensor nothing can be copied
    return network.eval().requires_grad_(requires_grad=False)
