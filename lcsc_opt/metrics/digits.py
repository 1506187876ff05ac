"""A feature extractor for 8×8 digits: a classifier of scikit-learn's bundled digits.

FID in its features falls when samples look more like digits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lcsc_opt.metrics.classifier import (
    SECOND_DIMENSION,
    SECOND_SEED,
    ClassifierExtractor,
    ClassifierRecipe,
    train_classifier,
    view_of,
)
from lcsc_opt.metrics.scores import View

CLASSES = 10


def digits_images() -> Tensor:
    """The 1,797 digits that scikit-learn bundles (UCI): ``[1797, 1, 8, 8]`` float32 in [−1, 1]."""
    images, _ = _load_digits()
    return images


def digits_labels() -> Tensor:
    """Which digit each of :func:`digits_images` is: ``[1797]`` int64, 0 to 9."""
    _, labels = _load_digits()
    return labels


def train_digits_network(*, seed: int, cache: Path, dimension: int = 64, epochs: int = 40) -> ClassifierExtractor:
    """The extractor that these settings describe: read from ``cache``, or trained and written there.

    Args:
        seed: of the split, the initial weights and the order of the batches.
        cache: a folder; it is created when it does not exist.
        dimension: D, the number of features.
        epochs: passes over the 80 % of the digits that are trained on.

    Raises MetricError when a setting is out of range, or when the cached file is broken or cannot be written.
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
    """Another network of the same images, with other features, at which no search looks: for ``fid@second``.

    Raises MetricError when its cached file is broken or cannot be written.
    """
    return view_of(train_digits_network(seed=SECOND_SEED, dimension=SECOND_DIMENSION, cache=cache), digits_images())


def _load_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # [1797, 64], 0 to 16
    images = torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 8 - 1)
    return images.reshape(-1, 1, 8, 8), torch.from_numpy(np.asarray(labels, dtype=np.int64))
