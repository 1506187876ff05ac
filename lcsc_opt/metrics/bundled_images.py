"""Images without a download: scikit-learn's 8×8 digits and photographs, and drawn letters."""

from __future__ import annotations

import functools
import string
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lcsc_opt.base.imports import import_extra

Bundled = Literal["digits", "photographs", "characters"]

# of images, and of the training and the cached file of their feature networks; raise on a change
FORMATS: dict[Bundled, int] = {"digits": 3, "photographs": 4, "characters": 1}

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
