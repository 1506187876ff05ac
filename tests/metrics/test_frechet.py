"""The Fréchet distance: properties, and agreement with scipy and torch-fidelity."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FrechetReference, Moments
from lcsc_opt.metrics.frechet import effective_dimension
from tests.metrics.examples import features_of
from tests.metrics.examples import mean_and_covariance as moments

seeds = st.integers(0, 2**32 - 1)
dimensions = st.integers(1, 12)


def correlated_features(count, dimension, seed):
    return features_of(count, dimension, seed=seed, mean=np.linspace(-1, 2, dimension), least=0.05)


def random_moments(dimension, seed):
    return moments(correlated_features(4 * dimension + 2, dimension, seed))


def torch_fidelity_distance(features_1, features_2):
    from torch_fidelity import metric_fid

    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (features_1, features_2)]
    return metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]


def scipy_distance(features_1, features_2):
    """The formula of pytorch-fid."""
    from scipy import linalg

    (mean_1, cov_1), (mean_2, cov_2) = moments(features_1), moments(features_2)
    root = linalg.sqrtm(cov_1 @ cov_2).real
    return np.square(mean_1 - mean_2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * np.trace(root)


def nuclear_norm_distance(features_1, features_2):
    """Through singular values of the centred features themselves: no root of a rounded eigenvalue anywhere.

    With Σᵢ = Xᵢᵀ Xᵢ, tr (Σ₁ Σ₂)^½ is the sum of the singular values of X₁ X₂ᵀ.
    """
    x_1, x_2 = (
        (features - features.mean(axis=0)) / np.sqrt(len(features) - 1) for features in (features_1, features_2)
    )
    shift = np.square(features_1.mean(axis=0) - features_2.mean(axis=0)).sum()
    between = np.linalg.svd(x_1 @ x_2.T, compute_uv=False).sum()
    return shift + np.square(x_1).sum() + np.square(x_2).sum() - 2 * between


@settings(deadline=None)
@given(dimensions, seeds, seeds)
def test_distance_is_symmetric_not_negative_and_zero_to_itself(dimension, seed_1, seed_2):
    first, second = random_moments(dimension, seed_1), random_moments(dimension, seed_2)
    there, back = FrechetReference(*first).distance(*second), FrechetReference(*second).distance(*first)
    assert there >= 0
    assert there == pytest.approx(back, rel=1e-8, abs=1e-8)
    assert FrechetReference(*first).distance(*first) <= 1e-10 * np.trace(first[1])


@settings(deadline=None)
@given(dimensions, seeds)
def test_distance_does_not_change_when_both_sets_are_rotated(dimension, seed):
    (mean_1, cov_1), (mean_2, cov_2) = random_moments(dimension, seed), random_moments(dimension, seed + 1)
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))[0]
    before = FrechetReference(mean_1, cov_1).distance(mean_2, cov_2)
    after = FrechetReference(turn @ mean_1, turn @ cov_1 @ turn.T).distance(turn @ mean_2, turn @ cov_2 @ turn.T)
    assert after == pytest.approx(before, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("dimension", [1, 3, 64, 200])
def test_full_rank_agrees_with_scipy_and_torch_fidelity(dimension):
    ours, theirs = correlated_features(700, dimension, 1), correlated_features(900, dimension, 2)
    distance = FrechetReference(*moments(theirs)).distance_from_features(ours)
    assert distance == pytest.approx(scipy_distance(ours, theirs), rel=1e-6)
    if dimension > 1:  # torch-fidelity's np.cov of one feature is no matrix
        assert distance == pytest.approx(torch_fidelity_distance(ours, theirs), rel=1e-6)


@pytest.mark.parametrize(
    ("ours_count", "theirs_count", "dimension"),
    [(100, 2000, 256), (2000, 100, 256), (100, 80, 256), (290, 900, 300), (700, 900, 300)],
)
def test_rank_deficient_covariances_and_those_in_blocks_are_as_exact(ours_count, theirs_count, dimension):
    ours, theirs = correlated_features(ours_count, dimension, 1), correlated_features(theirs_count, dimension, 2)
    expected = nuclear_norm_distance(ours, theirs)
    reference = FrechetReference(*moments(theirs))
    assert reference.distance_from_features(ours) == pytest.approx(expected, rel=1e-9)
    assert reference.distance(*moments(ours)) == pytest.approx(expected, rel=1e-9)
    assert reference.distance_from_moments(Moments.of(ours)) == pytest.approx(expected, rel=1e-9)
    rounded = FrechetReference(*(array.astype(np.float32) for array in moments(theirs)))
    assert rounded.distance_from_features(ours) == pytest.approx(expected, rel=1e-3), "float32 is accepted"


GOOD_MEAN, GOOD_COV = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((5, 4)), r"expected the shape \[(any from 1, )?3\], got .*; use one extractor"),
        (np.zeros((1, 3)), "at least 2 images"),
        (np.full((5, 3), np.nan), "NaN or infinity"),
    ],
)
def test_features_without_a_distance_have_no_gradient_either(features, message):
    reference = FrechetReference(GOOD_MEAN, GOOD_COV)
    for compute in (reference.distance_from_features, reference.distance_and_gradient):
        with pytest.raises(MetricError, match=message):
            compute(features)
    with pytest.raises(MetricError, match=message):
        reference.distance_from_moments(Moments.of(features))


def test_without_features_the_number_of_images_is_what_is_wrong():
    with pytest.raises(MetricError, match="at least 2 images, got 0"):
        FrechetReference(GOOD_MEAN, GOOD_COV).distance_from_moments(Moments())


@pytest.mark.parametrize(
    ("mean", "cov", "message"),
    [
        (
            GOOD_MEAN,
            np.eye(2),
            r"expected the shape \[3, 3\], got \[2, 2\]; mean and covariance have to be of the same",
        ),
        (["a", "b", "c"], GOOD_COV, "real numbers"),
        ([[0, 0], [0]], GOOD_COV, "expected real numbers in one shape"),
        ([], GOOD_COV, r"expected the shape \[(any from 1|3)\], got \[0\]"),
    ],
)
def test_what_is_no_mean_or_covariance_is_refused(mean, cov, message):
    for arguments in ((mean, cov, GOOD_MEAN, GOOD_COV), (GOOD_MEAN, GOOD_COV, mean, cov)):
        with pytest.raises(MetricError, match=message):
            FrechetReference(*arguments[:2]).distance(*arguments[2:])


def test_the_effective_dimension_counts_the_directions_in_which_features_vary() -> None:
    assert effective_dimension(np.eye(7)) == pytest.approx(7)
    assert effective_dimension(np.diag([3.0, 3.0, 0.0, 0.0])) == pytest.approx(2)
    assert effective_dimension(np.diag([2.0, 1.0])) == pytest.approx(9 / 5)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    variances = np.diag([4.0, 2.0, 1.0, 0.5])
    assert effective_dimension(1e-9 * rotation @ variances @ rotation.T) == pytest.approx(7.5**2 / 21.25)
    assert effective_dimension(np.zeros((3, 3))) == 0
