"""The networks whose features score samples of the bundled images."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import extract
from lcsc_opt.metrics.bundled_images import Bundled, bundled_images
from lcsc_opt.metrics.extractors import bundled
from lcsc_opt.metrics.extractors.bundled import feature_network
from objectives.weights.train import classifier
from tests.contracts import check_extractor


@pytest.mark.parametrize(("name", "right"), [("digits", 0.7), ("photographs", 0.2)])  # by chance 0.1 and 0.025
def test_a_few_epochs_already_classify(name: Bundled, right: float) -> None:
    epochs = {"digits": 3, "photographs": 2}[name]
    extractor = classifier(dataclasses.replace(bundled.SETTINGS[name], epochs=epochs))
    pixels, labels = bundled_images(name)
    assert float((extractor.head(extractor(pixels)).argmax(1) == labels).double().mean()) > right
    assert (extractor.dimension, extractor.name.rpartition("-")[0]) == (64, f"{name}-64")
    check_extractor(extractor, pixels[:7])
    for shape in ((4, 3, 8, 8), (4, 1, 16, 16), (4, 64)) if name == "digits" else ():
        with pytest.raises(MetricError, match=r"^loss: the network digits takes images of 1×8×8, .*mnist 1×16×16"):
            extractor(torch.zeros(shape))
    assert extract(extractor, pixels[:1000]).std(axis=0).min() > 1e-3


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
