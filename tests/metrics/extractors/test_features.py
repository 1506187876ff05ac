"""Images through an extractor."""

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import extract


class Doubled:
    """Two features an image: twice its first two pixels."""

    name = "doubled-0"
    dimension = 2

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        self.batches.append(len(images))
        return 2 * images.flatten(1)[:, :2]


def images_of(count):
    return torch.linspace(-1, 1, count * 4).reshape(count, 1, 2, 2)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 100])
def test_features_do_not_depend_on_the_batch_size(batch_size):
    extractor, images = Doubled(), images_of(10)
    features = extract(extractor, images, batch_size=batch_size)
    assert features.dtype == np.float64
    np.testing.assert_array_equal(features, 2 * images.flatten(1)[:, :2].numpy())
    assert max(extractor.batches) == min(batch_size, 10)


def test_parts_of_any_size_are_taken_in_order():
    images = images_of(10)
    parts = (part for part in images.split([4, 0, 5, 1]))
    np.testing.assert_array_equal(extract(Doubled(), parts, batch_size=3), extract(Doubled(), images))


def test_no_images_are_refused():
    for nothing in (torch.zeros(0, 1, 2, 2), []):
        with pytest.raises(MetricError, match="there are none"):
            extract(Doubled(), nothing)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(MetricError, match="doubled-0: features are not finite"):
        extract(Doubled(), torch.full((2, 1, 2, 2), torch.nan))


def test_features_of_another_shape_than_promised_are_refused():
    extractor = Doubled()
    extractor.dimension = 3
    with pytest.raises(MetricError, match=r"shape \[2, 2\], expected \[2, 3\]"):
        extract(extractor, images_of(2))
