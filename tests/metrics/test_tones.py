"""Tones: one-dimensional distributions of values and of their differences, compared with those of real images."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import Reference
from lcsc_opt.metrics.extractors.base import image_gradient
from lcsc_opt.metrics.leave_out import group_of_each, without_each_group
from lcsc_opt.metrics.tones import Tones, tones
from tests.metrics.examples import build_scores, pixels, write_folder


def photographs(count, channels=1, side=8, seed=0):
    """Smooth images, of which neighbouring pixels are alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=side, mode="bilinear", align_corners=False)


def distance(samples, real):
    extractor = Tones()
    return float(tones(extractor(samples), Reference.of_images(extractor, real)))


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (33, 3), (5, 1), (2, 3)])
def test_images_of_any_size_and_number_of_channels_are_at_no_distance_from_themselves(side, channels):
    real = photographs(60, channels, side)
    assert distance(real, real) < 1e-4
    assert distance(0.5 * real, real) == pytest.approx(0.25, rel=0.2), "(1 - ½)² of the variance, where the mean is 0"


def test_it_is_the_mean_squared_difference_of_sorted_values_over_their_variance():
    real, samples = photographs(100, side=8, seed=1), photographs(100, side=8, seed=2) * 0.7 + 0.2
    found = []
    for scale in (1, 2, 4):
        pooled = [F.avg_pool2d(images, scale) for images in (real, samples)]
        for difference in (lambda x: x, lambda x: x.diff(dim=-1), lambda x: x.diff(dim=-2)):
            of_real, of_samples = (at_nodes(difference(images)) for images in pooled)
            found.append(np.square(np.sort(of_samples) - np.sort(of_real)).mean() / of_real.var())
    assert distance(samples, real) == pytest.approx(np.mean(found), rel=2e-3)  # by 4,096 quantiles of real images


def at_nodes(values):
    """What lies in the middle of 8 × 8 cells, of images that may be smaller."""
    rows, columns = (np.floor(np.arange(0.5, 8) * side / 8).astype(int) for side in values.shape[-2:])
    return values.numpy().astype(float)[:, 0][:, rows][:, :, columns].ravel()


def test_grey_images_are_three_equal_channels_and_units_of_values_do_not_matter():
    real, samples = photographs(50, seed=1), photographs(40, seed=2) * 0.6
    in_colour = distance(samples.expand(-1, 3, -1, -1), real.expand(-1, 3, -1, -1))
    assert in_colour == pytest.approx(distance(samples, real), rel=1e-6)
    assert distance(samples * 5 + 3, real * 5 + 3) == pytest.approx(distance(samples, real), rel=1e-4)


def test_each_channel_is_compared_with_its_own():
    real = photographs(200, channels=3) * torch.tensor([1.0, 0.2, 0.2])[:, None, None]
    swapped = real.flip(1)
    assert distance(swapped, real) > 0.5


def test_constant_distributions_are_left_out_and_pixels_without_neighbours_refused():
    stripes = photographs(50)[:, :, :1].expand(-1, -1, 8, -1)  # no differences downwards
    assert distance(stripes, stripes) < 1e-4
    assert np.isfinite(distance(photographs(50, seed=3), stripes))
    with pytest.raises(MetricError, match="no neighbouring pixels"):
        Tones()(torch.zeros(3, 1, 1, 8))
    with pytest.raises(MetricError, match="are the same"):
        distance(stripes, torch.zeros(5, 1, 8, 8))


def test_values_are_seen_as_the_sampler_gives_them():
    real = photographs(100)
    overshot = real.sign() * 3
    assert distance(overshot, real) > 3 * distance(overshot.clamp(-1, 1), real)
    gradient = image_gradient(Tones(), overshot, torch.ones(100, Tones.dimension))
    assert (gradient[overshot.abs() > 1] != 0).any()


@pytest.mark.usefixtures("few_unseen")
def test_in_a_study_file_it_has_real_images_of_its_own_which_pixels_share(tmp_path):
    real = write_folder(tmp_path / "real", pixels(60, 8, 8, seed=1)[..., 0])
    np.savez(tmp_path / "digits.npz", mu=np.zeros(64), sigma=np.eye(64))
    reference = {"digits": str(tmp_path / "digits.npz"), "tones": {"train": str(real), "held_out_fraction": 0.3}}
    settings = {"loss": "fdr@digits", "reference": reference, "held_out_metrics": ["tones"]}
    scores = build_scores(cache=tmp_path / "cache", **settings)
    assert scores.describe()["loss"] == {"fdr": pytest.approx(dict.fromkeys(("digits", "pixels", "tones"), 1 / 3))}
    tones_of = scores.references["tones"]
    assert tones_of.count + tones_of.selection.count + tones_of.held_out.count == 60
    assert scores.references["pixels"].count == tones_of.count
    assert "tones" in scores.signs


def test_intervals_of_one_sort_are_those_of_a_sort_for_each_group():
    extractor = Tones()
    reference = Reference.of_images(extractor, photographs(100, seed=9))
    samples = extractor(photographs(157) * 0.8)
    labels = group_of_each(len(samples))
    expected = [float(tones(samples[labels != group], reference)) for group in range(10)]
    of_samples, of_real = np.split(without_each_group("tones", samples, reference), 2)
    deviations = np.array(expected) - np.mean(expected)
    np.testing.assert_allclose(of_samples - of_samples.mean(), deviations, atol=0.2 * deviations.std())
    features = reference.features_on("cpu")
    labels = group_of_each(len(features))
    others = [Reference.of_features(extractor, features[labels != group]) for group in range(10)]
    np.testing.assert_allclose(of_real, [float(tones(samples, other)) for other in others], rtol=1e-3)


class FewTones(Tones):
    enough_images = Tones.enough_images // 500


@pytest.mark.usefixtures("few_unseen")
def test_of_many_real_images_a_part_stands_for_all(tmp_path):
    train = write_folder(tmp_path / "real", pixels(200, 8, 8, seed=1)[..., 0])
    held_out = write_folder(tmp_path / "held-out", pixels(100, 8, 8, seed=4)[..., 0])
    few = f"{__name__}:FewTones"
    settings = {"loss": {"fdr": ["digits", few]}, "reference": {"train": str(train), "held_out": str(held_out)}}
    references = build_scores(cache=tmp_path / "cache", **settings).references
    assert 20 < references[few].count < 60
    unseen = references[few].selection.count + references[few].held_out.count
    assert 40 < unseen < 60, "by chance a few more than were wanted"
    assert references["digits"].count == 200
