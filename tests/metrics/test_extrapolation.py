"""Distances without the bias of few samples: their weights, and what they do to a step."""

import numpy as np
import pytest

from lcsc_opt.metrics import FrechetReference
from lcsc_opt.metrics.extrapolation import weighted_subsets
from tests.metrics.examples import features_of
from tests.metrics.examples import mean_and_covariance as moments
from tests.metrics.test_gradients import filled, images, scores


@pytest.mark.parametrize("count", [4, 5, 9, 100])
def test_a_constant_stays_and_a_bias_in_the_inverse_of_the_count_cancels(count):
    subsets = weighted_subsets(count)
    assert sum(weight for weight, _ in subsets) == pytest.approx(1)
    assert sum(weight / len(rows) for weight, rows in subsets) == pytest.approx(0)
    (_, everything), (_, half), (_, other_half) = subsets
    assert everything.tolist() == list(range(count))
    assert sorted([*half, *other_half]) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_samples_that_cannot_be_halved_are_taken_as_they_are(count):
    [(weight, rows)] = weighted_subsets(count)
    assert (weight, rows.tolist()) == (1.0, list(range(count)))


def distance_and_slope(reference, samples, subsets):
    """The distance, and its derivative in a factor of the samples' contrast, at 1."""
    value = 0.0
    slope = 0.0
    deviations = samples - reference.mean
    for weight, rows in subsets:
        distance, gradient = reference.distance_and_gradient(samples[rows])
        value += weight * distance
        slope += weight * float((gradient * deviations[rows]).sum())
    return value, slope


def test_few_real_images_are_far_from_all_of_them_and_pull_towards_grey_but_not_extrapolated():
    everything = features_of(20_000 + 40 * 60, 20, seed=1)
    reference = FrechetReference(*moments(everything[:20_000]))
    plain = []
    without_bias = []
    for samples in everything[20_000:].reshape(40, 60, 20):
        plain.append(distance_and_slope(reference, samples, [(1.0, np.arange(60))]))
        without_bias.append(distance_and_slope(reference, samples, weighted_subsets(60)))
    plain_value, plain_slope = np.mean(plain, axis=0)
    value, slope = np.mean(without_bias, axis=0)
    assert abs(value) < plain_value / 5, "no distance is less than theirs to themselves"
    assert plain_slope > 0, "less contrast than that of real images has a lower distance"
    assert abs(slope) < plain_slope / 4


def test_with_fewer_samples_than_directions_a_part_of_the_pull_is_left():
    # D = 300, whose variances fall as i^-½ (24 effective dimensions), and N = 100
    generator = np.random.default_rng(0)
    spread = np.arange(1, 301) ** -0.25
    reference = FrechetReference(np.zeros(300), np.diag(spread**2))
    slopes = []
    for _ in range(20):
        samples = generator.standard_normal((100, 300)) * spread
        plain = distance_and_slope(reference, samples, [(1.0, np.arange(100))])
        corrected = distance_and_slope(reference, samples, weighted_subsets(100))
        slopes.append((plain[1], corrected[1]))
    plain_slope, slope = np.mean(slopes, axis=0)
    assert 0.3 * plain_slope < slope < 0.7 * plain_slope


def test_value_with_and_without_the_gradient_is_the_same_and_kid_has_no_bias_to_lose():
    made, batch = scores({"fid": 0.3, "kid": 7, "tones": 2}), images(20)
    plain = filled(made, batch).compute()[1]
    found = filled(made, batch, unbiased=True).compute()[1]
    with_gradient = filled(made, batch, gradient=True, unbiased=True)
    with_gradient.gradients()
    assert with_gradient.compute()[1] == pytest.approx(found, rel=1e-9)
    assert found["kid"] == plain["kid"]
    assert found["fid"] < plain["fid"]
    assert found["tones"] < plain["tones"]
