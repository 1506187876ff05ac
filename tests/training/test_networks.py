"""Small networks, and the weights that they begin with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.training.networks import PatchedUNet, initialize
from tests.training.toy_network import ToyNetwork


class Unchanged(nn.Module):
    """A U-Net that gives back what it gets, and keeps it."""

    def forward(self, x: Tensor, t: Tensor) -> Any:
        self.seen = x
        return SimpleNamespace(sample=x)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_what_becomes_patches_becomes_the_same_image_again(patch: int) -> None:
    network = PatchedUNet((3, 8, 8), (4,), patch=patch)
    network.unet = Unchanged()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(images, torch.zeros(2)), images)
    assert network.unet.seen.shape == (2, 3 * patch**2, 8 // patch, 8 // patch)
    corner = images[0, 1, :patch, patch : 2 * patch]  # one patch of one colour: the channels of one pixel
    assert torch.equal(network.unet.seen[0, patch**2 : 2 * patch**2, 0, 1], corner.flatten())


def test_weights_are_drawn_from_the_generator_only() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        network = ToyNetwork()
        initialize(network, torch.Generator().manual_seed(seed))
        return network.state_dict()

    first, same, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["first.weight"], other["first.weight"])
    assert (first["norm.weight"] == 1).all()
    assert (first["norm.bias"] == 0).all()
