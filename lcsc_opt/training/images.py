"""Images without a download (scikit-learn's 8×8 digits and photographs, drawn letters), and feature networks for each.

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
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.training.networks import descend, torch_threads

Bundled = Literal["digits", "photographs", "characters"]

# of images, training and cached file; raise on a change
FORMATS: dict[Bundled, int] = {"digits": 3, "photographs": 4, "characters": 1}

BATCH = 128  # of the classifiers
LEARNING_RATE = 1e-3
HELD_OUT_FRACTION = 0.2
SECOND_SEED = 1  # of the second network, which only held-out reports use
SECOND_DIMENSION = 48

SIZE = 32  # pixels, of a photograph's crops
STRIDE = 8  # pixels between neighbouring crops
ROWS = 4  # parts of a photograph, of two regions each
COLUMNS = 5

SIDE = 16  # pixels, of drawn characters
DRAWN = 12_000
CHARACTERS = string.ascii_uppercase[:10]


@functools.cache
def bundled_images(name: Bundled) -> tuple[Tensor, Tensor]:
    """Images ``[n, C, H, W]`` float32 in [−1, 1] and their classes ``[n]``. Both are cached: do not write to them.

    ``digits`` are the 1,797 of UCI. ``photographs`` are 4,000 crops of 32×32 pixels, eight pixels apart. Each
    photograph has 4×5 parts, and each part a left and a right region of 106 by 64 pixels; a crop lies in one region,
    and its class is the photograph and the part. Even crops are of the regions of one colour of a chequerboard, odd
    ones of the other, so the halves ``[::2]`` and ``[1::2]`` have crops of every part, and no pixel in common.
    ``characters`` are 12,000 letters from A to J of 16×16 pixels, each drawn for itself.
    """
    if name == "characters":
        return _characters()
    if name == "digits":
        return _digits()
    return _photographs()


def _characters() -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(0)
    letters = random.integers(len(CHARACTERS), size=DRAWN)
    images = drawn_characters([CHARACTERS[letter] for letter in letters], random, variety=0.5)
    return torch.from_numpy(images.astype(np.float32))[:, None], torch.from_numpy(letters)


def _digits() -> tuple[Tensor, Tensor]:
    pixels, labels = import_extra("sklearn.datasets").load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 8 - 1)
    return images.reshape(-1, 1, 8, 8), torch.from_numpy(np.array(labels, dtype=np.int64))


def _photographs() -> tuple[Tensor, Tensor]:
    # crops and classes of the regions of either colour of the chequerboard
    crops: tuple[list[Tensor], list[Tensor]] = ([], [])
    classes: tuple[list[Tensor], list[Tensor]] = ([], [])
    photographs = import_extra("sklearn.datasets").load_sample_images().images  # each [427, 640, 3]
    for index, photograph in enumerate(photographs):
        pixels = torch.from_numpy(np.asarray(photograph, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
        for row, band in enumerate(pixels.tensor_split(ROWS, dim=1)):
            for column, region in enumerate(band.tensor_split(2 * COLUMNS, dim=2)):
                color = (row + column) % 2
                part = (index * ROWS + row) * COLUMNS + column // 2
                windows = region.unfold(1, SIZE, STRIDE).unfold(2, SIZE, STRIDE)  # [3, rows, columns, 32, 32]
                crops_of_region = windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, SIZE, SIZE)
                crops[color].append(crops_of_region)
                classes[color].append(torch.full((len(crops_of_region),), part))
    return _alternating(crops), _alternating(classes)


def _alternating(halves: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    """Two halves of equal length, joined so that ``[::2]`` is the first and ``[1::2]`` the second."""
    return torch.stack([torch.cat(half) for half in halves], dim=1).flatten(0, 1)


def drawn_characters(
    texts: Sequence[str], random: np.random.Generator, *, variety: float = 1.0
) -> npt.NDArray[np.float64]:
    """Characters ``[n, 16, 16]`` in [−1, 1] in the font that Pillow carries: shifted, turned, between two shades.

    ``variety``, in (0, 1], is how far they may be shifted, turned and shaded, and how much they differ in size.
    """
    fonts = [ImageFont.load_default(size) for size in range(round(32 - 10 * variety), 33, 2)]
    least_contrast = 0.2 + 0.8 * (1 - variety)
    images = np.empty((len(texts), SIDE, SIDE))
    # the order of the draws decides which images these are
    for image, text in zip(images, texts, strict=True):
        canvas = Image.new("L", (2 * SIDE, 2 * SIDE))  # scaled down after it was turned, which smooths edges
        middle = SIDE + random.uniform(-3 * variety, 3 * variety, size=2)
        font = fonts[random.integers(len(fonts))]
        ImageDraw.Draw(canvas).text(tuple(middle), text, fill=255, font=font, anchor="mm")
        turned = canvas.rotate(random.uniform(-25 * variety, 25 * variety), Image.Resampling.BILINEAR)
        dark = random.uniform(-1, -least_contrast)
        light = random.uniform(least_contrast, 1)
        small = turned.resize((SIDE, SIDE), Image.Resampling.BOX)
        image[:] = np.asarray(small) / 255 * (light - dark) + dark
    return images


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of a classifier; the images and the constants above are versioned by :data:`FORMATS`.

    Attributes:
        name: the name of the images; the extractor and the cached file are named after it.
        image_shape: ``[C, H, W]``.
        strides: the strides of the three convolutions.
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
    "characters": _Settings(
        name="characters",
        image_shape=(1, SIDE, SIDE),
        strides=(2, 1, 2),
        classes=len(CHARACTERS),
        dimension=64,
        epochs=12,
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
        positions = (height // stride) * (width // stride)
        self.hidden = nn.Linear(64 * positions, settings.dimension, device="meta")
        self.head = nn.Linear(settings.dimension, settings.classes, device="meta")
        self.to_empty(device="cpu")
        generator = settings.generator("weights")
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
            else:
                nn.init.zeros_(parameter)

    @functools.cached_property
    def name(self) -> str:
        """``<images>-<dimension>-<hash of the weights>``."""
        return f"{self._settings.name}-{self.dimension}-{weights_sha256(self.state_dict())[:12]}"

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of ``[B, C, H, W]`` in [−1, 1].

        Raises:
            MetricError: for images of another shape.
        """
        if tuple(images.shape[1:]) != self._settings.image_shape:
            expected = ", ".join(str(size) for size in self._settings.image_shape)
            raise MetricError(
                f"images: expected [B, {expected}] for {self._settings.name}, got the shape {list(images.shape)}"
            )
        x = images.to(self.hidden.weight)
        for convolution in (self.conv_1, self.conv_2, self.conv_3):
            x = F.silu(convolution(x))
        return F.silu(self.hidden(x.flatten(1)))


def feature_network(name: Bundled, *, second: bool = False, cache: Path | None = None, **changes: Any) -> _Classifier:
    """The classifier of these images: read from the cache, or trained and written there.

    On the same machine, training again gives the same weights with any number of torch's threads. On another kind of
    processor the weights differ by rounding, so the extractor's name differs, too.

    Args:
        name: the name of the images.
        second: another network with other features, which no search uses.
        cache: a folder, created when it does not exist; ``None`` is the user's.
        changes: ``seed``, ``dimension`` or ``epochs`` in place of the defaults.

    Raises:
        MetricError: the cached file cannot be written.
    """
    settings = SETTINGS[name]
    if second:
        settings = dataclasses.replace(settings, seed=SECOND_SEED, dimension=SECOND_DIMENSION)
    settings = dataclasses.replace(settings, **changes)
    text = json.dumps({"format": FORMATS[name], **dataclasses.asdict(settings)}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = (cache or cache_directory()) / f"{name}-network-{digest}.safetensors"
    network = _Classifier(settings)
    if path.exists():
        network.load_state_dict(load_file(path))
    else:
        with torch_threads(1):  # small layers gain nothing from more
            _train(network, settings)
        write_atomically(path, save(network.state_dict(), {"settings": text}), error=MetricError)
    return network.eval().requires_grad_(requires_grad=False)


def _train(network: _Classifier, settings: _Settings) -> None:
    images, classes = bundled_images(settings.name)
    if settings.name == "characters":  # those that models train on, so that no network has seen the other two thirds
        images = images[::3]
        classes = classes[::3]
    order = torch.randperm(len(images), generator=settings.generator("split"))
    trained = order[math.ceil(len(images) * HELD_OUT_FRACTION) :]
    images = images[trained]
    classes = classes[trained]
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
