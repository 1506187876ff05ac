"""The digits extractor."""

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FeatureStatistics, FrechetReference, extract
from lcsc_opt.testing import check_extractor
from lcsc_opt.training.images import _load_digits, digits_images, train_digits_network


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def extractor(cache):
    return train_digits_network(seed=0, epochs=3, cache=cache)


def test_images_span_minus_one_to_one():
    images, labels = _load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert labels.shape == (1797,)
    assert set(labels.tolist()) == set(range(10))


def test_a_few_epochs_already_classify(extractor):
    right = extractor.logits(digits_images()).argmax(1) == _load_digits()[1]
    assert extractor.held_out_accuracy > 0.7
    assert float(right.double().mean()) == pytest.approx(extractor.held_out_accuracy, abs=0.08)


def test_extractor_keeps_its_contract(extractor):
    check_extractor(extractor, digits_images()[:7])
    assert extractor.dimension == 64
    assert extractor.name.startswith("digits-64-")
    assert extractor.to("cpu") is extractor


def test_gradient_reaches_the_images_but_not_the_weights(extractor):
    images = digits_images()[:3].requires_grad_()
    extractor(images).square().sum().backward()
    assert bool((images.grad.abs().sum(dim=(1, 2, 3)) > 0).all())


def test_all_features_vary(extractor):
    assert extract(extractor, digits_images()).std(axis=0).min() > 1e-3


def test_worse_images_have_a_larger_distance(extractor):
    images = digits_images()
    statistics = FeatureStatistics.from_features(extract(extractor, images[:900]))
    reference = FrechetReference(statistics.mean, statistics.covariance)
    noise = torch.randn(images[900:].shape, generator=torch.Generator().manual_seed(0))
    fids = [reference.distance_from_features(extract(extractor, images[900:] + level * noise)) for level in (0, 0.3, 1)]
    assert fids == sorted(fids)
    assert fids[2] > 3 * fids[0]


def test_second_call_reads_the_cache(cache, extractor, monkeypatch):
    monkeypatch.setattr("lcsc_opt.training.classifier._train", lambda *data: pytest.fail("trained again"))
    again = train_digits_network(seed=0, epochs=3, cache=cache)
    assert again.name == extractor.name
    assert again.held_out_accuracy == extractor.held_out_accuracy
    images = digits_images()[:20]
    np.testing.assert_array_equal(extract(again, images), extract(extractor, images))


def test_training_repeats_and_leaves_the_global_generators_alone(tmp_path):
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    names = [
        train_digits_network(seed=seed, dimension=8, epochs=1, cache=tmp_path / folder).name
        for seed, folder in [(0, "a"), (0, "b"), (1, "a")]
    ]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("digits-8-")
    assert len(list((tmp_path / "a").iterdir())) == 2
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_training_does_not_depend_on_the_number_of_threads(tmp_path):
    names = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        names.add(train_digits_network(seed=0, dimension=8, epochs=1, cache=tmp_path / str(threads)).name)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert len(names) == 1


def test_training_works_inside_no_grad(tmp_path):
    with torch.no_grad():
        trained = train_digits_network(seed=0, dimension=8, epochs=1, cache=tmp_path / "inside")
    assert trained.name == train_digits_network(seed=0, dimension=8, epochs=1, cache=tmp_path / "outside").name


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_broken_cache_is_named(tmp_path, content):
    train_digits_network(seed=0, dimension=2, epochs=1, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    with pytest.raises(MetricError, match="delete it") as caught:
        train_digits_network(seed=0, dimension=2, epochs=1, cache=tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("setting", ["dimension", "epochs"])
def test_settings_out_of_range_are_refused(tmp_path, setting):
    with pytest.raises(MetricError, match=f"{setting}: expected at least 1, got 0"):
        train_digits_network(seed=0, cache=tmp_path, **{setting: 0})


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 1, 16, 16), (4, 64)])
def test_images_of_another_shape_are_refused(extractor, shape):
    with pytest.raises(MetricError, match=r"expected \[B, 1, 8, 8\]"):
        extractor(torch.zeros(shape))


@pytest.mark.slow
def test_default_recipe_generalizes(tmp_path):
    assert train_digits_network(seed=0, cache=tmp_path).held_out_accuracy > 0.95
