"""Features to count, mean and scatter, batch by batch: as exact as all at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcsc_opt.metrics import FeatureStatistics, FrechetReference
from lcsc_opt.metrics.accumulator import BLOCK, Reduction, double_device


def features_of(count, dimension, *, mean=0.0, seed=0, dtype=np.float64):
    """Standard deviations from 1 to 0.1, in a random basis, around ``mean``."""
    generator = np.random.default_rng(seed)
    turn = np.linalg.qr(generator.standard_normal((dimension, dimension)))[0]
    spread = np.geomspace(1, 0.1, dimension)
    return (generator.standard_normal((count, dimension)) * spread @ turn + mean).astype(dtype)


def reduced(features, sizes):
    reduction = Reduction()
    for part in torch.from_numpy(features).split(sizes):
        reduction.add(part)
    return reduction.statistics()


def exact_moments(features):
    """In extended precision, through no BLAS."""
    wide = features.astype(np.longdouble)
    mean = wide.mean(axis=0)
    deviations = wide - mean
    return mean, np.einsum("ni,nj->ij", deviations, deviations)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_batches_of_any_size_give_the_statistics_of_all_features(dimension, sizes, seed):
    sizes = [*sizes, 2]
    features = features_of(sum(sizes), dimension, mean=3, seed=seed)
    found, expected = reduced(features, sizes), FeatureStatistics.from_features(features)
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.scatter, expected.scatter, rtol=1e-10, atol=1e-12 * np.trace(expected.scatter))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_features_far_from_the_origin_lose_no_digits(mean, dtype):
    features = features_of(400, 20, mean=mean, dtype=dtype)
    found, (expected_mean, expected) = reduced(features, 50), exact_moments(features)
    # a float64 near `mean` is known to 1e-16 of it, whatever is done with it: so are its deviations
    rounding = 1e-15 * max(1.0, mean)
    np.testing.assert_allclose(found.mean, expected_mean.astype(float), rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(found.scatter, expected.astype(float), rtol=0, atol=rounding * np.trace(expected))


@pytest.mark.parametrize("sizes", [1, 17, 500])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_fid_of_reduced_features_is_that_of_all_at_once(mean, sizes):
    real, samples = (features_of(500, 32, mean=mean, seed=seed, dtype=np.float32) for seed in (1, 2))
    reference = FrechetReference(real.mean(0, dtype=np.float64), np.cov(real, rowvar=False, dtype=np.float64))
    expected = reference.distance_from_features(samples)
    assert reference.distance_from_statistics(reduced(samples, sizes)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dimension", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 30])
def test_blocks_of_the_scatter_fit_together(dimension):
    features = np.random.default_rng(0).normal(2, 1, (60, dimension))
    found, expected = reduced(features, 25), FeatureStatistics.from_features(features)
    np.testing.assert_allclose(found.scatter, expected.scatter, rtol=1e-10, atol=1e-10)


def test_more_can_be_added_after_statistics_were_asked_for():
    features, reduction = torch.from_numpy(features_of(60, 300)), Reduction()
    for part in features.split(20):
        reduction.add(part)
        reduction.statistics()
    np.testing.assert_allclose(
        reduction.statistics().scatter, FeatureStatistics.from_features(features.numpy()).scatter, atol=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_features_of_any_type_are_summed_in_float64_and_left_as_they_are(dtype):
    features = torch.from_numpy(features_of(60, 5)).to(dtype)
    before, reduction = features.clone(), Reduction()
    reduction.add(features)
    expected = FeatureStatistics.from_features(features.double().numpy())
    np.testing.assert_allclose(reduction.statistics().scatter, expected.scatter, rtol=1e-12, atol=1e-12)
    assert torch.equal(features, before)


def test_batches_with_and_without_inference_mode_go_together():
    features, reduction = torch.from_numpy(features_of(60, 5)), Reduction()
    with torch.inference_mode():
        reduction.add(features[:30] + 0)
    reduction.add(features[30:].requires_grad_())
    with torch.inference_mode():
        found = reduction.statistics()
    np.testing.assert_allclose(
        found.scatter, FeatureStatistics.from_features(features.detach().numpy()).scatter, rtol=1e-12, atol=1e-12
    )


def test_a_device_without_float64_is_replaced_by_the_cpu(monkeypatch):
    assert double_device.__wrapped__(torch.device("cpu")) == torch.device("cpu")

    def refuse(*_, **__):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    monkeypatch.setattr(torch, "zeros", refuse)
    assert double_device.__wrapped__(torch.device("mps")) == torch.device("cpu")


@pytest.mark.gpu
def test_features_on_a_gpu_are_reduced_there():
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
    features, reduction = torch.from_numpy(features_of(600, 300)), Reduction()
    for part in features.cuda().split(100):
        reduction.add(part)
    expected = FeatureStatistics.from_features(features.numpy())
    np.testing.assert_allclose(reduction.statistics().scatter, expected.scatter, rtol=1e-10, atol=1e-10)
