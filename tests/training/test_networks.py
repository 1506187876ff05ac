"""The networks that the shipped recipes train."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcsc_opt.training.networks import PatchedUNet, initialize, small_unet


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


def test_an_image_does_not_depend_on_the_rest_of_its_batch() -> None:
    network = small_unet((1, 8, 8), (4, 8)).eval()
    initialize(network, torch.Generator().manual_seed(0))
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(-100, 100, 5)
    with torch.no_grad():
        whole = network(images, times).sample
        alone = torch.cat([network(images[i : i + 1], times[i : i + 1]).sample for i in range(5)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    assert whole.shape == images.shape
