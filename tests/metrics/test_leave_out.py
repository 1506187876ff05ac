"""Metrics without a group of images are the metrics of the other images; their intervals hold what they promise."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.base.jackknife import GROUPS, group_of_each, half_width, standard_error
from lcsc_opt.metrics import Reference
from lcsc_opt.metrics.feature_metrics import MOST_KEPT, FeatureMetrics, MetricPlan, scores_of_splits
from lcsc_opt.metrics.names import Formula
from tests.metrics.examples import Classifier, fill, image_metrics, images, reference, suite
from tests.metrics.test_fidelity import drawn, reference_of

COUNT = 137  # groups are of 13 or 14
EXACT: tuple[Formula, ...] = ("fid", "fid_held_out", "precision", "near", "hinge", "reward")


def metrics_of(samples: Tensor, real: Reference) -> FeatureMetrics:
    metrics = FeatureMetrics(real, MetricPlan(len(samples), intervals=True))
    metrics.update(samples)
    return metrics


def without(metrics: FeatureMetrics, formula: Formula) -> Any:
    """Without each group of samples."""
    values = metrics.without_each_group(formula)
    assert values is not None
    return values[:GROUPS]


@pytest.mark.parametrize("formula", EXACT)
@pytest.mark.usefixtures("blocks")
def test_it_is_the_metric_of_the_other_images(formula):
    real = dataclasses.replace(reference_of(drawn(60, seed=1)), held_out=reference_of(drawn(50, seed=2)))
    samples = drawn(COUNT, shift=0.3)
    labels = group_of_each(COUNT)
    expected: Any = []
    for group in range(GROUPS):
        others = FeatureMetrics(real, MetricPlan())
        others.update(samples[torch.from_numpy(labels != group)])
        expected.append(others.compute(formula))
    values = without(metrics_of(samples, real), formula)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-9)


def test_kid_without_a_group_is_that_of_the_other_images():
    """With as many samples as real images, its one subset is all of them."""
    real = reference_of(drawn(COUNT, seed=5))
    samples = drawn(COUNT, shift=0.2)
    values = without(metrics_of(samples, real), "kid")
    y = drawn(COUNT, seed=5).float().double()
    labels = group_of_each(COUNT)
    for group in range(GROUPS):
        x = samples[torch.from_numpy(labels != group)]
        inside = (x @ x.T / 5 + 1) ** 3
        inside_real = (y @ y.T / 5 + 1) ** 3
        within = (inside.sum() - inside.trace()) / (len(x) * (len(x) - 1))
        within_real = (inside_real.sum() - inside_real.trace()) / (COUNT * (COUNT - 1))
        across = ((x @ y.T / 5 + 1) ** 3).mean()
        assert values[group] == pytest.approx(float(within + within_real - 2 * across), rel=1e-6)


@pytest.mark.usefixtures("blocks")
def test_recall_without_a_group_is_that_of_the_others_spheres_among_all() -> None:
    real, samples = drawn(60, seed=1), drawn(COUNT, shift=0.3)
    radii = torch.cdist(samples, samples).sort(dim=1).values[:, 3]
    inside = torch.cdist(real, samples) <= radii
    labels = group_of_each(COUNT)
    expected = []
    for group in range(GROUPS):
        of_others = inside[:, torch.from_numpy(labels != group)]
        expected.append(float(of_others.any(dim=1).double().mean()))
    values = without(metrics_of(samples, reference_of(real)), "recall")
    np.testing.assert_allclose(values, expected)
    assert len(set(expected)) > 1


def test_fewer_images_than_features_go_through_the_smaller_matrix() -> None:
    real, samples = reference_of(drawn(400, 150, seed=1)), drawn(COUNT, 150, shift=0.3)
    labels = group_of_each(COUNT)
    expected = [real.frechet.distance_from_features(samples[torch.from_numpy(labels != g)]) for g in range(GROUPS)]
    np.testing.assert_allclose(without(metrics_of(samples, real), "fid"), expected, rtol=1e-9)


def test_the_error_of_the_inception_score_is_that_of_the_mean_of_its_parts():
    logits = torch.randn(203, 7, generator=torch.Generator().manual_seed(0)) * 3
    metrics = FeatureMetrics(Reference(Classifier()), MetricPlan(intervals=True), {"is"})
    metrics.update(None, logits)
    error = standard_error(without(metrics, "is"))
    assert error == pytest.approx(scores_of_splits(logits.numpy()).std(ddof=1) / np.sqrt(10))


@pytest.mark.parametrize(("real_images", "dimension", "samples"), [(4000, 8, 500), (2000, 8, 6)])
def test_without_a_group_of_real_images_fid_is_close_to_that_to_the_others(
    real_images: int, dimension: int, samples: int
) -> None:
    features = drawn(real_images, dimension, seed=3)
    real, shifted = reference_of(features), drawn(samples, dimension, shift=0.4)
    labels = torch.from_numpy(group_of_each(real_images))
    expected = [reference_of(features[labels != g]).frechet.distance_from_features(shifted) for g in range(GROUPS)]
    found = real.frechet.distances_to_others(shifted.numpy(), others_of(features))
    assert standard_error(found.tolist()) == pytest.approx(standard_error(expected), rel=0.05)


def test_values_without_a_group_of_real_images_follow_those_without_a_group_of_samples() -> None:
    features, samples = drawn(300, seed=3).float(), drawn(200, shift=0.4)
    real = reference_of(features)
    values = metrics_of(samples, real).without_each_group("fid")
    assert values is not None
    expected = real.frechet.distances_to_others(samples.numpy(), others_of(features))
    np.testing.assert_allclose(values[GROUPS:], expected, rtol=1e-5)


def test_with_many_features_it_is_linear_in_the_samples_too(monkeypatch: pytest.MonkeyPatch) -> None:
    real, samples = reference_of(drawn(4000, 8, seed=3)), drawn(3000, 8, shift=0.4)
    exact = without(metrics_of(samples, real), "fid")
    monkeypatch.setattr("lcsc_opt.metrics.leave_out.MANY_FEATURES", 4)
    linear = without(metrics_of(samples, real), "fid")
    assert not np.array_equal(linear, exact)
    np.testing.assert_allclose(linear, exact, rtol=1e-3)
    assert standard_error(linear) == pytest.approx(standard_error(exact), rel=0.02)


def others_of(features: Tensor) -> list[tuple[Any, Any]]:
    labels = torch.from_numpy(group_of_each(len(features)))
    parts = [features[labels != group].numpy() for group in range(GROUPS)]
    return [(part.mean(axis=0), np.cov(part.T)) for part in parts]


def test_the_error_of_a_difference_holds_what_other_real_images_would_have_given() -> None:
    """Two models are compared by many sets of real images: the difference scatters as the jackknife of one set says."""
    one, other = drawn(2000, 4, seed=1, shift=0.6), drawn(2000, 4, seed=1, shift=0.3)
    differences, errors = [], []
    for seed in range(60):
        features = drawn(100, 4, seed=1000 + seed).float()
        real = reference_of(features).frechet
        differences.append(real.distance_from_features(one) - real.distance_from_features(other))
        others = others_of(features)
        columns = real.distances_to_others(one, others) - real.distances_to_others(other, others)
        errors.append(standard_error(columns.tolist()))
    assert 0.7 < np.median(errors) / np.std(differences) < 1.4


@pytest.mark.parametrize("formula", ["fid", "kid", "precision", "recall"])
def test_intervals_hold_the_mean_of_repeated_sampling(formula):
    """Of 95 %, at least 88 % of 100 repetitions: by chance, less happens once in 300 times. Ten groups widen them."""
    real = reference_of(drawn(150, 4, seed=10_000))
    values = []
    halves = []
    for seed in range(100):
        metrics = metrics_of(drawn(150, 4, seed=seed, shift=0.8).float(), real)
        values.append(metrics.compute(formula))
        halves.append(half_width(standard_error(without(metrics, formula)), GROUPS - 1))
    is_inside = np.abs(np.array(values) - np.mean(values)) <= halves
    assert is_inside.mean() >= 0.88
    assert np.median(halves) < 4 * np.std(values), "and they are no wider than they must be"


def test_evaluations_that_are_asked_for_them_have_them_with_the_loss():
    real = reference(Classifier(), count=200)
    scores = suite({"inception": real}, loss={"fid": 1, "precision": 3}, report_references=lambda: {"inception": real})
    searched = fill(image_metrics(scores, 120), images(120))
    assert searched.without_each_group() == {}
    reported = fill(image_metrics(scores, 120, group="held-out", error=True), images(120))
    loss, metrics = reported.compute()
    assert (loss, metrics) == fill(image_metrics(scores, 120, group="held-out"), images(120)).compute(), "bit for bit"
    columns = reported.without_each_group()
    assert set(columns) == {"loss", *metrics}
    combined = np.array(columns["fid"]) - 3 * np.array(columns["precision"])
    asked = fill(image_metrics(scores, 120, error=True), images(120))
    np.testing.assert_allclose(asked.without_each_group()["loss"], combined)
    np.testing.assert_allclose(columns["loss"], combined)


def test_parts_of_an_evaluation_merge_with_their_groups():
    scores = suite({"inception": reference()}, held_out_metrics=["recall"])
    batch = images(150)
    at_once = fill(image_metrics(scores, 150, group="held-out", error=True), batch).without_each_group()
    merged = image_metrics(scores, 150, group="held-out", error=True)
    for part in (batch[:40], batch[40:]):
        merged.merge(fill(image_metrics(scores, 150, group="held-out", error=True), part).state)
    for name, column in merged.without_each_group().items():
        np.testing.assert_allclose(column, at_once[name], rtol=1e-9)


@pytest.mark.parametrize(("count", "total"), [(99, 99), (150, MOST_KEPT // 16 + 1)], ids=["few", "large"])
def test_too_few_images_or_too_many_numbers_have_none(count, total):
    scores = suite({"inception": reference()}, held_out_metrics=[])
    metrics = fill(image_metrics(scores, total, group="held-out", error=True), images(count))
    assert metrics.compute()[0] > 0
    assert metrics.without_each_group().keys() <= {"outside"}
