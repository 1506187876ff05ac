"""The bundled images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from lcsc_opt.metrics.bundled_images import Bundled, bundled_images


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("digits", (1797, 1, 8, 8), 10), ("photographs", (4000, 3, 32, 32), 40), ("mnist", (5000, 1, 16, 16), 10)],
)
def test_images_span_minus_one_to_one(name: Bundled, shape: tuple[int, ...], classes: int) -> None:
    pixels, labels = bundled_images(name)
    assert (pixels.shape, pixels.dtype) == (shape, torch.float32)
    assert (float(pixels.min()), float(pixels.max())) == (-1, 1)
    assert labels.shape == shape[:1]
    assert labels.unique().tolist() == list(range(classes))


def test_every_part_of_mnist_has_digits_of_every_class() -> None:
    pixels, labels = bundled_images("mnist")
    assert len(pixels.flatten(1).unique(dim=0)) > 4_990, "hardly a digit twice"
    for start in range(0, 5_000, 1_250):
        assert int(labels[start : start + 1_250].bincount(minlength=10).min()) > 90


@pytest.mark.parametrize("half", [0, 1])
def test_crops_are_of_regions_of_their_half_which_has_no_pixel_of_the_other(half: int) -> None:
    crops, parts = (found[half::2] for found in bundled_images("photographs"))
    photographs, found = load_sample_images().images, iter(zip(crops, parts, strict=True))
    seen = np.zeros((2, 427, 640), dtype=bool)
    for index, row, column in itertools.product(range(2), range(4), range(10)):
        for top, left in itertools.product(range(0, 75, 8), range(0, 33, 8)) if (row + column) % 2 == half else ():
            (crop, part), y, x = next(found), 107 * row + top, 64 * column + left
            expected = photographs[index][y : y + 32, x : x + 32]
            assert np.abs((crop.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() < 1e-4
            assert int(part) == index * 20 + row * 5 + column // 2
            seen[index, y : y + 32, x : x + 32] = True
    assert next(found, None) is None
    rows, columns = np.arange(427) // 107, np.arange(640) // 64
    assert not seen[:, (rows[:, None] + columns) % 2 != half].any()
