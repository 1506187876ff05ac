"""Images through an extractor, and graphs from features back to images."""

import numpy as np
import pytest
import torch
from torch import nn

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import extract
from lcsc_opt.metrics.extractors.base import GRAPHS_ON_CPU, image_gradient


class Network:
    """An extractor of one's own, of 1 × 2 × 2 images; ``cut`` is what its author wrote."""

    name, dimension = "own", 3

    def __init__(self, cut=lambda images: images):
        self.layer = nn.Linear(4, 3, dtype=torch.float64).requires_grad_(False)
        self.cut = cut

    def __call__(self, images):
        return torch.tanh(self.layer(self.cut(images).flatten(1).to(self.layer.weight)))


class InParts(Network):
    graph_bytes = GRAPHS_ON_CPU / 4.5  # four images fit


def images(count=10):
    return torch.rand(count, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def rows(count=10):
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [Network, InParts])
def test_the_gradient_is_that_of_the_features_also_where_gradients_are_switched_off(kind):
    extractor = kind()
    expected = ((1 - extractor(images()) ** 2) * rows()) @ extractor.layer.weight
    with torch.no_grad():
        torch.testing.assert_close(image_gradient(extractor, images(), rows()).flatten(1), expected)


CUTS = {
    "detach": lambda images: images.detach(),
    "bytes": lambda images: (images * 127.5 + 128).to(torch.uint8),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_an_own_extractor_that_cuts_the_graph_is_named(cut):
    with pytest.raises(MetricError, match=r"extractor own: its features have no graph back .*without no_grad"):
        image_gradient(Network(cut), images(), rows())


def test_an_own_extractor_that_returns_nothing_is_named():
    class Forgetful(Network):
        def __call__(self, images):
            super().__call__(images)

    with pytest.raises(MetricError, match=r"^extractor own: returned None; it must return a tensor \[10, 3\]$"):
        extract(Forgetful(), images())


@pytest.mark.parametrize("batch_size", [1, 3, 10, 100])
def test_features_depend_neither_on_the_batch_size_nor_on_parts(batch_size):
    batches = []
    extractor = Network(lambda images: batches.append(len(images)) or images)
    features = extract(extractor, images(), batch_size=batch_size)
    assert features.dtype == np.float64
    np.testing.assert_allclose(features, Network.__call__(extractor, images()), rtol=1e-12)
    assert max(batches[:-1]) == min(batch_size, 10)
    parts = (part for part in images().split([4, 0, 5, 1]))
    np.testing.assert_allclose(extract(extractor, parts, batch_size=3), features, rtol=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(0, 1, 2, 2), "expected at least one"),
        ([], "expected at least one"),
        (torch.full((2, 1, 2, 2), torch.nan), "own: features are not finite"),
    ],
)
def test_what_gives_no_features_is_refused(given, message):
    with pytest.raises(MetricError, match=message):
        extract(Network(), given)


def test_features_of_another_shape_than_promised_are_refused():
    extractor = Network()
    extractor.dimension = 2
    with pytest.raises(MetricError, match=r"shape \[10, 3\], expected \[10, 2\]"):
        extract(extractor, images())


def test_fewer_images_go_through_an_extractor_when_memory_runs_out():
    sizes = []

    def scarce(images):
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError
        return images

    extractor = Network(scarce)
    found = extract(extractor, images())
    assert sizes == [10, 5, 2, 3, 5, 2, 3]
    extractor.cut = lambda part: part
    np.testing.assert_allclose(found, extract(extractor, images()), rtol=1e-12)
    extractor.cut = lambda part: scarce(part.repeat(4, 1, 1, 1))
    with pytest.raises(torch.OutOfMemoryError):
        extract(extractor, images())
