"""The images that scikit-learn bundles (8×8 digits, crops of two photographs), and a feature extractor for each.

An extractor is a classifier of its images: FID in its features falls when samples look more like them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.base.paths import cache_directory
from lcsc_opt.metrics.loss import View
from lcsc_opt.training.classifier import (
    SECOND_DIMENSION,
    SECOND_SEED,
    ClassifierExtractor,
    ClassifierRecipe,
    train_classifier,
    view_of,
)

CLASSES = 10


def digits_images() -> Tensor:
    """The 1,797 digits that scikit-learn bundles (UCI): ``[1797, 1, 8, 8]`` float32 in [−1, 1]."""
    images, _ = _load_digits()
    return images


def train_digits_network(*, seed: int, cache: Path, dimension: int = 64, epochs: int = 40) -> ClassifierExtractor:
    """The extractor that these settings describe: read from ``cache``, or trained and written there.

    Args:
        seed: of the split, the initial weights and the order of the batches.
        cache: a folder; it is created when it does not exist.
        dimension: D, the number of features.
        epochs: passes over the 80 % of the digits that are trained on.

    Raises:
        MetricError: a setting is out of range, or the cached file is broken or cannot be written.
    """
    recipe = ClassifierRecipe(
        name="digits",
        image_shape=(1, 8, 8),
        strides=(1, 2, 2),
        classes=CLASSES,
        dimension=dimension,
        epochs=epochs,
        seed=seed,
    )
    return train_classifier(recipe, _load_digits, cache=cache)


def second_digits_view(cache: Path) -> View:
    """A second network of the same images, with other features, for ``fid@cross_check``. No search uses it.

    Raises:
        MetricError: its cached file is broken or cannot be written.
    """
    return view_of(train_digits_network(seed=SECOND_SEED, dimension=SECOND_DIMENSION, cache=cache), digits_images())


def digits_extractor() -> ClassifierExtractor:
    """The digits objective's own network, from the cache: ``fid@digits``."""
    return train_digits_network(seed=0, cache=cache_directory())


def second_digits_extractor() -> ClassifierExtractor:
    """A second network of the digits, which no search uses: ``fid@digits2``."""
    return train_digits_network(seed=SECOND_SEED, dimension=SECOND_DIMENSION, cache=cache_directory())


def _load_digits() -> tuple[Tensor, Tensor]:
    pixels, labels = _read_digits()
    images = torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 8 - 1)
    return images.reshape(-1, 1, 8, 8), torch.from_numpy(np.array(labels, dtype=np.int64))


@functools.cache
def _read_digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels ``[1797, 64]`` from 0 to 16, and labels; an objective that is built asks three times."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return pixels, labels


SIZE = 32
STRIDE = 8  # pixels between neighbouring crops
ROWS, COLUMNS = 4, 5  # parts of a photograph


def photographs_crops() -> Tensor:
    """All crops: ``[7700, 3, 32, 32]`` float32 in [−1, 1], for each photograph 50 rows of 77, eight pixels apart."""
    crops, _ = _load_crops()
    return crops


def train_photographs_network(*, seed: int, cache: Path, dimension: int = 64, epochs: int = 20) -> ClassifierExtractor:
    """The extractor that these settings describe: read from ``cache``, or trained and written there.

    Args:
        seed: of the split, the initial weights and the order of the batches.
        cache: a folder; it is created when it does not exist.
        dimension: D, the number of features.
        epochs: passes over the 80 % of the crops that are trained on.

    Raises:
        MetricError: a setting is out of range, or the cached file is broken or cannot be written.
    """
    recipe = ClassifierRecipe(
        name="photographs",
        image_shape=(3, SIZE, SIZE),
        strides=(2, 2, 2),
        classes=2 * ROWS * COLUMNS,
        dimension=dimension,
        epochs=epochs,
        seed=seed,
    )
    return train_classifier(recipe, _load_crops, cache=cache)


def second_photographs_view(cache: Path) -> View:
    """A second network of the same images, with other features, for ``fid@cross_check``. No search uses it.

    Raises:
        MetricError: its cached file is broken or cannot be written.
    """
    return view_of(
        train_photographs_network(seed=SECOND_SEED, dimension=SECOND_DIMENSION, cache=cache), photographs_crops()
    )


def photographs_extractor() -> ClassifierExtractor:
    """The photographs objective's own network, from the cache: ``fid@photographs``."""
    return train_photographs_network(seed=0, cache=cache_directory())


def second_photographs_extractor() -> ClassifierExtractor:
    """A second network of the photographs, which no search uses: ``fid@photographs2``."""
    return train_photographs_network(seed=SECOND_SEED, dimension=SECOND_DIMENSION, cache=cache_directory())


def _load_crops() -> tuple[Tensor, Tensor]:
    """Crops ``[n, 3, 32, 32]`` of both photographs and their parts ``[n]``."""
    from sklearn.datasets import load_sample_images

    photographs = [np.asarray(image, dtype=np.float32) for image in load_sample_images().images]  # [427, 640, 3]
    crops = torch.cat([_crops(image) for image in photographs])
    parts = [index * ROWS * COLUMNS + _parts(image.shape[:2]) for index, image in enumerate(photographs)]
    return crops, torch.cat(parts)


def _crops(photograph: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    """``[H, W, 3]`` from 0 to 255 → ``[n, 3, 32, 32]`` in [−1, 1], row by row."""
    pixels = torch.from_numpy(photograph / 127.5 - 1).permute(2, 0, 1)
    windows = pixels.unfold(1, SIZE, STRIDE).unfold(2, SIZE, STRIDE)  # [3, rows, columns, 32, 32]
    return windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, SIZE, SIZE).contiguous()


def _parts(shape: tuple[int, ...]) -> Tensor:
    """``[n]`` for each crop of a photograph ``[H, W]``, row by row, the part (0 to 19) that holds its centre."""
    height, width = shape
    row = (torch.arange(0, height - SIZE + 1, STRIDE) + SIZE // 2) * ROWS // height
    column = (torch.arange(0, width - SIZE + 1, STRIDE) + SIZE // 2) * COLUMNS // width
    return (row[:, None] * COLUMNS + column[None, :]).flatten()
