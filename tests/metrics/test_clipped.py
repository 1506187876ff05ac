"""Clipped Density and Clipped Coverage: the authors' numbers, their calibration, and outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics.names import Formula
from tests.metrics.examples import features_of
from tests.metrics.test_fidelity import distance, drawn, reference_of

# Printed by the authors' class ClippedDensityCoverage(real_data, K=5) of
# https://github.com/nicolassalvy/ClippedDensityCoverage, commit 9920dae0, for `made(...)` with scikit-learn 1.9.
THEIRS = [
    # real, samples, features, scale, shift, bad, outliers → density, coverage
    ((200, 200, 8, 1.0, 0.0, 0.0, 0), 1.0, 1.0),
    ((300, 200, 8, 1.0, 0.0, 0.0, 0), 1.0, 0.9900497512437811),
    ((200, 300, 8, 1.0, 0.0, 0.0, 0), 0.9038929440389295, 0.9601328903654485),
    ((500, 500, 32, 1.0, 0.0, 0.0, 0), 0.9922555663117132, 0.9221556886227545),
    ((400, 400, 8, 1.0, 0.5, 0.0, 0), 0.7291280148423005, 0.5336658354114713),
    ((400, 400, 8, 0.5, 0.0, 0.0, 0), 1.0, 0.8728179551122195),
    ((400, 400, 8, 1.0, 0.0, 0.3, 0), 0.6595547309833023, 0.6683291770573566),
    ((400, 400, 8, 1.0, 0.0, 0.7, 0), 0.26623376623376627, 0.26932668329177056),
    ((400, 400, 8, 1.0, 0.0, 0.2, 20), 0.8357348703170029, 0.942643391521197),
    ((401, 399, 2, 1.0, 0.0, 0.0, 0), 1.0, 0.96),
    ((60, 7, 4, 1.0, 0.0, 0.0, 0), 0.816326530612245, 0.875),
]


def made(real_count, count, dimension, scale, shift, bad, outliers):
    """Real and sampled features: normal ones, ``bad`` of the samples and some real ones far away."""
    generator = np.random.default_rng([real_count, count, dimension, outliers])
    real = generator.standard_normal((real_count, dimension)).astype(np.float32)
    samples = (generator.standard_normal((count, dimension)) * scale + shift).astype(np.float32)
    samples[: int(bad * count)] *= 10
    real[:outliers] *= 20
    return torch.from_numpy(real), torch.from_numpy(samples)


@pytest.mark.parametrize(("case", "density", "coverage"), THEIRS)
def test_these_are_the_authors_numbers(case, density, coverage):
    real, samples = made(*case)
    reference = reference_of(real)
    assert distance("clipped_density", samples, reference) == pytest.approx(density, abs=1e-6)
    assert distance("clipped_coverage", samples, reference) == pytest.approx(coverage, abs=1e-6)


@pytest.mark.parametrize("bad", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_both_fall_linearly_with_the_share_of_bad_samples(bad):
    real, samples = made(2000, 2000, 8, 1.0, 0.0, bad, 0)
    reference = reference_of(real)
    assert distance("clipped_density", samples, reference) == pytest.approx(1 - bad, abs=0.05)
    assert distance("clipped_coverage", samples, reference) == pytest.approx(1 - bad, abs=0.05)


def test_real_images_are_perfect_samples():
    real = drawn(300)
    reference = reference_of(real)
    assert distance("clipped_density", real, reference) == 1.0
    assert distance("clipped_coverage", real, reference) == 1.0


def test_copies_of_one_good_image_are_faithful_and_cover_next_to_nothing():
    real = drawn(300, 3)
    centre = real.mean(dim=0).expand(300, -1) + 1e-3 * drawn(300, 3, seed=1)
    reference = reference_of(real)
    assert distance("clipped_density", centre, reference) == 1.0
    assert distance("clipped_coverage", centre, reference) < 0.1


def test_real_outliers_do_not_make_bad_samples_good():
    """With the radius of precision, each outlier's sphere holds every sample."""
    real, samples = made(400, 400, 8, 1.0, 0.0, 0.5, 20)
    reference = reference_of(real)
    assert distance("precision", samples, reference) > 0.9
    assert distance("clipped_density", samples, reference) < 0.55


def test_blocks_of_distances_change_nothing(monkeypatch):
    real, samples = made(90, 70, 4, 1.0, 0.3, 0.0, 0)
    formulas: tuple[Formula, ...] = ("clipped_density", "clipped_coverage")
    at_once = [distance(formula, samples, reference_of(real)) for formula in formulas]
    monkeypatch.setattr("lcsc_opt.metrics.distances.BLOCK", 1000)
    assert [distance(formula, samples, reference_of(real)) for formula in formulas] == at_once


def test_five_real_images_or_four_samples_are_refused():
    five = reference_of(torch.from_numpy(features_of(5)))
    with pytest.raises(MetricError, match="more than 5 reference images"):
        distance("clipped_density", drawn(20), five)
    with pytest.raises(MetricError, match="at least 5 images, got 4"):
        distance("clipped_coverage", drawn(4), reference_of(drawn(20)))
