"""Moments of features: all at once, batch by batch, and merged."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import Moments
from lcsc_opt.metrics.frechet import BLOCK
from tests.metrics.examples import features_of

seeds = st.integers(0, 2**32 - 1)


def updated(features, sizes):
    moments = Moments()
    for part in torch.from_numpy(features).split(sizes):
        moments.update(part)
    return moments


def assert_same(found, expected, *, atol=1e-9):
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.scatter, expected.scatter, rtol=1e-9, atol=atol)


def test_covariance_is_that_of_numpy():
    features = features_of(20)
    moments = Moments.of(features)
    np.testing.assert_allclose(moments.mean, features.mean(axis=0))
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False))
    with pytest.raises(MetricError, match="at least 2 images"):
        _ = Moments.of(features[:1]).covariance


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.lists(st.integers(0, 30), min_size=1, max_size=8), seeds)
def test_batches_of_any_size_give_the_moments_of_all_features(dimension, sizes, seed):
    sizes = [*sizes, 2]
    features = features_of(sum(sizes), dimension, seed=seed)
    assert_same(updated(features, sizes), Moments.of(features))


@settings(deadline=None)
@given(st.tuples(*[st.integers(1, 30)] * 3), seeds)
def test_parts_merge_into_the_whole_in_any_order(counts, seed):
    features = features_of(sum(counts), seed=seed)
    a, b, c = (Moments.of(part) for part in np.split(features, np.cumsum(counts)[:-1]))
    whole = Moments.of(features)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(b).merge(a), Moments().merge(a).merge(b.merge(c))):
        assert_same(merged, whole)
    assert_same(pickle.loads(pickle.dumps(updated(features, 7))).merge(Moments()), whole)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_features_far_from_the_origin_lose_no_digits(mean, dtype):
    features = features_of(400, 20, mean=mean, dtype=dtype)
    wide = features.astype(np.longdouble)  # in extended precision, through no BLAS
    deviations = wide - wide.mean(axis=0)
    scatter = np.einsum("ni,nj->ij", deviations, deviations)
    # a float64 near `mean` is known to 1e-16 of it, whatever is done with it: so are its deviations
    rounding = 1e-15 * max(1.0, mean)
    halves = [Moments.of(part) for part in np.split(features, 2)]
    for found in (updated(features, 50), halves[0].merge(halves[1])):
        np.testing.assert_allclose(found.mean, wide.mean(axis=0).astype(float), rtol=1e-15, atol=1e-15)
        np.testing.assert_allclose(found.scatter, scatter.astype(float), rtol=0, atol=3 * rounding * np.trace(scatter))


@pytest.mark.parametrize("dimension", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 30])
def test_blocks_of_the_scatter_fit_together_and_more_can_be_added_after_a_look(dimension):
    features, moments = features_of(60, dimension), Moments()
    for part in torch.from_numpy(features).split(25):
        moments.update(part)
        _ = moments.scatter
    assert_same(moments, Moments.of(features))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_features_of_any_type_are_summed_in_float64_with_and_without_inference_mode(dtype):
    features, moments = torch.from_numpy(features_of(60)).to(dtype), Moments()
    before = features.clone()
    with torch.inference_mode():
        moments.update(features[:30] + 0)
    moments.update(features[30:].requires_grad_())
    with torch.inference_mode():
        assert_same(moments, Moments.of(features.detach().double().numpy()))
    assert torch.equal(features, before)
