"""Distances of single samples: by hand, and their gradients by differences."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import Reference
from lcsc_opt.metrics.distances import EACH
from lcsc_opt.metrics.feature_metrics import FeatureMetrics, MetricPlan
from lcsc_opt.metrics.names import Formula
from tests.metrics.examples import differences

FORMULAS = list(EACH)


def reference_of(features: Tensor) -> Reference:
    extractor: Any = SimpleNamespace(name="test", dimension=features.shape[1])
    return Reference.of_features(extractor, features.float().numpy())


def metrics_of(samples: Tensor, reference: Reference) -> FeatureMetrics:
    metrics = FeatureMetrics(reference, MetricPlan())
    metrics.update(samples)
    return metrics


def distance(formula: Formula, samples: Tensor, reference: Reference) -> float:
    return metrics_of(samples, reference).compute(formula)


def distance_and_gradient(formula: Formula, samples: Tensor, reference: Reference) -> tuple[float, Tensor]:
    metrics = metrics_of(samples, reference)
    return metrics.compute(formula), torch.from_numpy(metrics.gradient(formula))


def drawn(count: int, dimension: int = 5, *, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) + shift


LINE = reference_of(torch.tensor([[0.0], [1.0], [3.0], [7.0], [20.0]]))
RADII = {0: 7.0, 1: 6.0, 3: 4.0, 7: 7.0, 20: 19.0}  # to the third nearest other


def test_near_by_hand() -> None:
    assert distance("near", torch.tensor([[0.5], [5.0], [-4.0]]), LINE) == pytest.approx((0.5 + 2 + 4) / 3)


def test_hinge_by_hand_is_zero_inside_of_the_spheres_that_precision_counts() -> None:
    assert distance("hinge", torch.tensor([[0.5], [14.0], [30.0]]), LINE) == 0
    outside = torch.tensor([[-14.0], [50.0], [2.0]], dtype=torch.float64)
    expected = [min((x - r) ** 2 / radius**2 for r, radius in RADII.items()) - 1 for x in (-14, 50)]
    assert distance("hinge", outside, LINE) == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(("count", "real"), [(4, 50), (13, 9)])
def test_gradient_is_that_of_central_differences(formula: Formula, count: int, real: int) -> None:
    reference, samples = reference_of(drawn(real)), 0.8 * drawn(count, seed=3, shift=0.6)
    value, gradient = distance_and_gradient(formula, samples, reference)
    assert value == pytest.approx(distance(formula, samples, reference), rel=1e-12)
    assert gradient.dtype == torch.float64
    expected = differences(lambda at: distance(formula, torch.from_numpy(at), reference), samples.numpy(), 1e-7)
    assert np.linalg.norm(gradient.numpy() - expected) <= 1e-5 * max(float(np.linalg.norm(expected)), 1e-3)


@pytest.mark.parametrize("formula", FORMULAS)
def test_real_images_that_are_there_several_times_and_samples_on_top_of_them(formula: Formula) -> None:
    real = drawn(20).repeat_interleave(5, dim=0)
    value, gradient = distance_and_gradient(formula, real[:10].float().double(), reference_of(real))
    assert math.isfinite(value)
    assert torch.isfinite(gradient).all()
    with pytest.raises(MetricError, match="more than 3 reference images"):
        distance(formula, drawn(5), reference_of(drawn(3)))
