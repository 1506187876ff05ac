"""Images without a download: scikit-learn's 8×8 digits and photographs, MNIST's digits at 16×16."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.paths import BUNDLED_WEIGHTS

Bundled = Literal["digits", "photographs", "mnist"]

# Versions of the images and of the training of their feature networks. Raise one when either changes: files of weights
# are named after it, so that those of other images or of another training are not found.
FORMATS: dict[Bundled, int] = {"digits": 3, "photographs": 4, "mnist": 1}

SIZE = 32  # pixels, of a photograph's crops
STRIDE = 8  # pixels between neighbouring crops
ROWS = 4  # parts of a photograph, of two regions each
COLUMNS = 5

SIDE = 16  # pixels, of MNIST's digits
MNIST = BUNDLED_WEIGHTS / "mnist.npz"
MNIST_TRAINED_ON = slice(0, 2_500)
"""Of MNIST's digits, those that the shipped model and the shipped networks were trained on. No network saw the rest."""


@functools.cache
def bundled_images(name: Bundled) -> tuple[Tensor, Tensor]:
    """Images ``[n, C, H, W]`` float32 in [−1, 1] and their classes ``[n]``. Both are cached: do not write to them.

    ``digits`` are the 1,797 of UCI. ``photographs`` are 4,000 crops of 32×32 pixels, eight pixels apart. Each
    photograph has 4×5 parts, and each part a left and a right region of 106 by 64 pixels; a crop lies in one region,
    and its class is the photograph and the part. Even crops are of the regions of one colour of a chequerboard, odd
    ones of the other, so the halves ``[::2]`` and ``[1::2]`` have crops of every part, and no pixel in common.
    ``mnist`` are 5,000 of MNIST's digits, 500 of each class, at 16×16 pixels and in random order.
    """
    if name == "mnist":
        with np.load(MNIST) as shipped:
            images = torch.from_numpy(shipped["images"].astype(np.float32) / 127.5 - 1)
            return images[:, None], torch.from_numpy(shipped["classes"].astype(np.int64))
    if name == "digits":
        pixels, labels = import_extra("sklearn.datasets").load_digits(return_X_y=True)
        images = torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 8 - 1)  # levels from 0 to 16
        return images.reshape(-1, 1, 8, 8), torch.from_numpy(np.array(labels, dtype=np.int64))
    return _photographs()


def _photographs() -> tuple[Tensor, Tensor]:
    """The crops of photographs and their classes, as of :func:`bundled_images`."""
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
