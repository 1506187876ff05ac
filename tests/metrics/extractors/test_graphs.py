"""Graphs from features back to images: own extractors that cut them, parts, and rounding that they lead through."""

import pytest
import torch
from torch import nn

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.extractors.base import features_with_graph, image_gradient


class Network:
    """An extractor of one's own, of 1 × 2 × 2 images; ``cut`` is what its author wrote."""

    name, dimension = "own", 3

    def __init__(self, cut=lambda images: images):
        self.layer = nn.Linear(4, 3, dtype=torch.float64).requires_grad_(False)
        self.cut = cut

    def __call__(self, images):
        return torch.tanh(self.layer(self.cut(images).flatten(1).to(self.layer.weight)))


class InParts(Network):
    images_with_graph = 4


def images(count=10):
    return torch.rand(count, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def rows(count=10):
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [Network, InParts])
@pytest.mark.parametrize("leaf", [True, False])
def test_features_are_those_without_a_graph_and_lead_back(kind, leaf):
    extractor, given = kind(), images().requires_grad_()
    batch = given if leaf else given * 1
    features = features_with_graph(extractor, batch)
    assert torch.equal(features, torch.cat([extractor(part) for part in batch.detach().split(4)]))
    (gradient,) = torch.autograd.grad(features, given, rows())
    weights = extractor.layer.weight
    expected = ((1 - features.detach() ** 2) * rows()) @ weights
    torch.testing.assert_close(gradient.flatten(1), expected)
    torch.testing.assert_close(image_gradient(extractor, images(), rows()), gradient)


def test_graphs_are_made_even_where_gradients_are_switched_off():
    with torch.no_grad():
        assert features_with_graph(Network(), images().requires_grad_()).requires_grad
        assert image_gradient(InParts(), images(), rows()).shape == images().shape


CUTS = {
    "detach": lambda images: images.detach(),
    "bytes": lambda images: (images * 127.5 + 128).to(torch.uint8),
    "numpy": lambda images: torch.from_numpy(images.detach().numpy()),
    "rounding to integers": lambda images: (images * 127).long(),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_an_own_extractor_that_cuts_the_graph_is_named(cut):
    with pytest.raises(MetricError, match=r"extractor own: its features have no graph back .*without no_grad"):
        image_gradient(Network(cut), images(), rows())
