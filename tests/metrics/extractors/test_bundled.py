"""The networks whose features score samples of the bundled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import extract
from lcsc_opt.metrics.bundled_images import Bundled, bundled_images
from lcsc_opt.metrics.extractors import bundled
from lcsc_opt.metrics.extractors.bundled import feature_network
from tests.contracts import check_extractor


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def network(name: Bundled, cache: Path) -> Any:
    return feature_network(name, epochs={"digits": 3, "photographs": 2}[name], cache=cache)


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


def test_a_second_call_reads_the_cache_unless_it_is_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = network("digits", cache)
    [file] = cache.glob("digits-network-*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    assert network("digits", cache).name == digits.name
    assert file.read_bytes() == whole
    monkeypatch.setattr(bundled, "_train", lambda *_: pytest.fail("trained again"))
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
