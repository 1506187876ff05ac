"""Crops of the photographs, and their extractor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch.nn import functional

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FrechetReference, extract
from lcsc_opt.training.classifier import ClassifierExtractor, view_of
from lcsc_opt.training.images import _load_crops, photographs_crops, train_photographs_network


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    return photographs_crops()


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> ClassifierExtractor:
    return train_photographs_network(seed=0, epochs=2, cache=tmp_path_factory.mktemp("photographs"))


def test_crops_are_where_they_should_be(crops: torch.Tensor) -> None:
    assert crops.shape == (7700, 3, 32, 32)
    assert crops.dtype == torch.float32
    assert (float(crops.min()), float(crops.max())) == (-1, 1)
    photographs = load_sample_images().images
    for index in (0, 76, 77, 3849, 3850, 7699, 5000):
        photograph, place = divmod(index, 3850)
        y, x = (8 * part for part in divmod(place, 77))
        expected = photographs[photograph][y : y + 32, x : x + 32]
        found = (crops[index].permute(1, 2, 0).double() + 1) * 127.5
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_parts_are_a_grid_of_four_by_five_on_each_photograph() -> None:
    parts = _load_crops()[1]
    assert parts.unique().tolist() == list(range(40))
    for index in (0, 76, 77 * 25 + 38, 3849, 3850, 7699):
        photograph, place = divmod(index, 3850)
        y, x = (8 * part + 16 for part in divmod(place, 77))  # the crop's centre
        assert int(parts[index]) == photograph * 20 + int(y / (427 / 4)) * 5 + int(x / (640 / 5))


def test_two_epochs_already_tell_parts_apart(extractor: ClassifierExtractor, crops: torch.Tensor) -> None:
    assert extractor.held_out_accuracy > 0.3  # one in forty by chance
    assert extractor.dimension == 64
    assert extractor.name.startswith("photographs-64-")
    right = extractor.logits(crops).argmax(1) == _load_crops()[1]
    assert float(right.double().mean()) == pytest.approx(extractor.held_out_accuracy, abs=0.05)


def test_worse_images_have_a_larger_distance(extractor: ClassifierExtractor, crops: torch.Tensor) -> None:
    seen = view_of(extractor, crops).reference
    assert seen is not None
    reference = FrechetReference(seen.statistics.mean, seen.statistics.cov)
    generator = torch.Generator().manual_seed(0)
    some = crops[torch.randperm(len(crops), generator=generator)[:1500]]
    noise = torch.randn(some.shape, generator=generator)

    def fid(images: torch.Tensor) -> float:
        return reference.distance_from_features(extract(extractor, images))

    noisy = [fid((some + level * noise).clamp(-1, 1)) for level in (0, 0.1, 0.4)]
    assert noisy == sorted(noisy)
    assert fid(functional.interpolate(functional.avg_pool2d(some, 4), scale_factor=4)) > 1.3 * noisy[0]
    assert fid(0.8 * some) > 3 * noisy[0]
    assert fid(some.flip(1)) > 10 * noisy[0]


@pytest.mark.parametrize("shape", [(4, 1, 32, 32), (4, 3, 16, 16), (3, 32, 32)])
def test_images_of_another_shape_are_refused(extractor: ClassifierExtractor, shape: tuple[int, ...]) -> None:
    with pytest.raises(MetricError, match=r"expected \[B, 3, 32, 32\] for photographs"):
        extractor(torch.zeros(shape))
