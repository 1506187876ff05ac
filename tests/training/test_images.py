"""The bundled images, and the networks whose features judge samples of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import extract
from lcsc_opt.testing import check_extractor
from lcsc_opt.training import images
from lcsc_opt.training.images import Bundled, bundled_images, feature_network


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def network(name: Bundled, cache: Path) -> Any:
    return feature_network(name, epochs={"digits": 3, "photographs": 2}[name], cache=cache)


@pytest.mark.parametrize(
    ("name", "shape", "classes"), [("digits", (1797, 1, 8, 8), 10), ("photographs", (4000, 3, 32, 32), 40)]
)
def test_images_span_minus_one_to_one(name: Bundled, shape: tuple[int, ...], classes: int) -> None:
    pixels, labels = bundled_images(name)
    assert (pixels.shape, pixels.dtype) == (shape, torch.float32)
    assert (float(pixels.min()), float(pixels.max())) == (-1, 1)
    assert labels.shape == shape[:1]
    assert labels.unique().tolist() == list(range(classes))


def test_characters_are_as_many_as_asked_for_and_no_two_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "DRAWN", 200)
    pixels, letters = bundled_images.__wrapped__("characters")
    assert (pixels.shape, pixels.dtype) == ((200, 1, 16, 16), torch.float32)
    assert len(pixels.flatten(1).unique(dim=0)) == 200
    assert -1 <= pixels.min() < -0.9 < 0.9 < pixels.max() <= 1
    assert letters.unique().tolist() == list(range(10))
    assert torch.equal(bundled_images.__wrapped__("characters")[0], pixels)


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


@pytest.mark.parametrize(("name", "right"), [("digits", 0.7), ("photographs", 0.2)])  # by chance 0.1 and 0.025
def test_a_few_epochs_already_classify(name: Bundled, right: float, cache: Path) -> None:
    extractor = network(name, cache)
    pixels, labels = bundled_images(name)
    assert float((extractor.head(extractor(pixels)).argmax(1) == labels).double().mean()) > right
    assert (extractor.dimension, extractor.name.rpartition("-")[0]) == (64, f"{name}-64")
    check_extractor(extractor, pixels[:7])
    for shape in ((4, 3, 8, 8), (4, 1, 16, 16), (4, 64)) if name == "digits" else ():
        with pytest.raises(MetricError, match=r"expected \[B, 1, 8, 8\]"):
            extractor(torch.zeros(shape))
    assert extract(extractor, pixels[:1000]).std(axis=0).min() > 1e-3


def test_a_second_call_reads_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = network("digits", cache)
    monkeypatch.setattr(images, "_train", lambda *_: pytest.fail("trained again"))
    assert network("digits", cache).name == digits.name  # with the hash of the weights


def test_the_seed_alone_decides_the_weights(tmp_path: Path) -> None:
    def name(seed: int, place: str) -> str:
        return feature_network("digits", dimension=8, epochs=1, seed=seed, cache=tmp_path / place).name

    state = torch.random.get_rng_state()
    names = [name(0, "zero"), name(1, "one")]
    torch.set_num_threads(2)
    with torch.no_grad():
        names.append(name(0, "again"))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert names[0] == names[2] != names[1]
    assert torch.equal(torch.random.get_rng_state(), state)
