"""The networks whose features score samples of the bundled images."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lcsc_opt.metrics.bundled_images import Bundled
from lcsc_opt.metrics.extractors import bundled
from lcsc_opt.metrics.extractors.bundled import feature_network
from objectives.weights.train import classifier


@pytest.mark.parametrize("name", list(bundled.SETTINGS))
@pytest.mark.parametrize("second", [False, True])
def test_the_networks_ship(name: Bundled, second: bool) -> None:
    network = feature_network(name, second=second)
    assert network.name.startswith(f"{name}-{network.dimension}-")


def test_the_seed_alone_decides_the_weights() -> None:
    def name(seed: int) -> str:
        return classifier(dataclasses.replace(bundled.SETTINGS["digits"], dimension=8, epochs=1, seed=seed)).name

    state = torch.random.get_rng_state()
    names = [name(0), name(1)]
    torch.set_num_threads(2)
    with torch.no_grad():
        names.append(name(0))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert names[0] == names[2] != names[1]
    assert torch.equal(torch.random.get_rng_state(), state)
