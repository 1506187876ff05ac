"""FID of infinitely many images, by extrapolation from parts of them."""

from __future__ import annotations

import numpy as np
import pytest

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FrechetReference, MetricSuite
from lcsc_opt.metrics.grouped_fid import GroupedFid
from tests.metrics.examples import features_of, images, reference, score

DIMENSION = 16
FACTOR = features_of(DIMENSION, DIMENSION, least=0.3, mean=0.0)
EXACT = FrechetReference(np.zeros(DIMENSION), FACTOR @ FACTOR.T)


def samples_of_the_reference(count, seed):
    return np.random.default_rng(seed).standard_normal((count, DIMENSION)) @ FACTOR.T


def test_a_perfect_model_has_none_though_its_fid_is_above_zero():
    fids = []
    extrapolated = []
    for seed in range(30):
        samples = samples_of_the_reference(800, seed)
        fids.append(EXACT.distance_from_features(samples))
        extrapolated.append(GroupedFid(EXACT, samples).extrapolated())
    assert np.mean(fids) > 0.3
    assert abs(np.mean(extrapolated)) < 0.05 * np.mean(fids)
    assert np.std(extrapolated) < 1.5 * np.std(fids), "averages over parts keep the noise of the line down"


def test_the_line_is_fitted_to_the_images_their_halves_and_their_fifths():
    samples = samples_of_the_reference(1000, 1)
    grouped = GroupedFid(EXACT, samples)
    labels = grouped._labels
    points = []
    for parts in (1, 2, 5):
        fids = [EXACT.distance_from_features(samples[labels * parts // 10 == part]) for part in range(parts)]
        points.append((parts / 1000, np.mean(fids)))
    inverse_counts, fids = np.array(points).T
    slope, at_zero = np.polyfit(inverse_counts, fids, 1)
    assert slope > 0
    assert grouped.extrapolated() == pytest.approx(at_zero, rel=1e-9)


def test_without_a_group_it_is_that_of_the_other_images():
    samples = samples_of_the_reference(400, 2)
    grouped = GroupedFid(EXACT, samples)
    expected = [EXACT.distance_from_features(samples[grouped._labels != group]) for group in range(10)]
    np.testing.assert_allclose(grouped.without_each_group(), expected, rtol=1e-9)


def test_fewer_images_than_features_go_through_the_smaller_matrix():
    samples = samples_of_the_reference(40, 3)  # 8 of a fifth, 16 features
    assert np.isfinite(GroupedFid(EXACT, samples).extrapolated_without_each_group()).all()


def test_it_is_of_reports_only():
    for settings in ({"loss": {"fid": 1, "fid_infinity": 1}}, {"metrics": ["fid_infinity"]}):
        with pytest.raises(MetricError, match="fid_infinity is for reports only"):
            MetricSuite({"inception": reference()}, **settings)
    scores = MetricSuite({"inception": reference()}, held_out_metrics=["fid_infinity"])
    assert "fid_infinity" not in score(scores)[1]
    loss, metrics = score(scores, images(400), held_out=True)
    assert metrics["fid_infinity"] < loss


def test_nineteen_images_are_refused():
    scores = MetricSuite({"inception": reference()}, held_out_metrics=["fid_infinity"])
    with pytest.raises(MetricError, match="at least 20 images, got 19"):
        score(scores, images(19), held_out=True)
