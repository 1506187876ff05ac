"""The loss that looks three times: its representations, its units, what clipping hides, and its gradient."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import MetricSuite, Reference
from lcsc_opt.metrics.extractors.base import image_gradient, seen_images
from lcsc_opt.metrics.extractors.pixels import Outside, PixelComponents, Thumbnails, pixel_reference
from lcsc_opt.metrics.extractors.second import SecondFeatures
from lcsc_opt.metrics.loss import Loss, LossSetting
from lcsc_opt.metrics.tones import Tones
from tests.metrics.examples import Pixels, fill, image_metrics, images, suite


def pixel_components(real: Tensor) -> PixelComponents:
    gaussian = Reference.of_images(Thumbnails(), real).frechet
    return PixelComponents(gaussian.mean, gaussian.cov)


def fdr_suite() -> MetricSuite:
    real = images(300, 9)
    references = {
        "inception": Reference.of_images(Pixels(), real),
        "pixels": pixel_reference(Reference.of_images(Thumbnails(), real)),
        "tones": Reference.of_images(Tones(), real),
    }
    return suite(references, loss="fdr")


@pytest.mark.parametrize(
    ("setting", "distances"),
    [
        ("fdr", ["fid", "fid@pixels", "tones"]),
        ("fdr@clip", ["fid@clip", "fid@pixels", "tones"]),
        ({"fdr": ["inception", "dinov2", "pixels"]}, ["fid", "fid@dinov2", "fid@pixels"]),
        ({"fdr": ["tones", "clip"]}, ["fid@clip", "tones"]),  # features of a network come first
    ],
)
def test_each_representation_has_the_same_share(setting, distances):
    weights = Loss.parse(setting).weights
    assert [str(metric) for metric in weights] == distances
    assert list(weights.values()) == [pytest.approx(1 / len(distances))] * len(distances)


@pytest.mark.parametrize(
    "setting", [{"fdr": []}, {"fdr": -1.0}, {"fdr": "clip"}, {"fdr": ["clip"], "is": 1}, {"fdr": ["clip", "clip"]}]
)
def test_what_is_no_list_of_different_extractors_is_refused(setting):
    with pytest.raises(MetricError, match="fdr"):
        Loss.parse(setting)


def test_a_reward_counts_as_much_as_all_of_fdr_beside_it() -> None:
    """What people with prompts want: real images in several representations, and a score of their own."""
    loss = Loss.parse({"reward": -1, "fdr@clip": 2})
    assert {str(metric): weight for metric, weight in loss.weights.items()} == pytest.approx(
        {"fid@clip": 2 / 3, "fid@pixels": 2 / 3, "tones": 2 / 3, "reward": 1.0}
    )
    assert loss.describe() == {"fdr": pytest.approx(dict.fromkeys(("clip", "pixels", "tones"), 2 / 3)), "reward": 1.0}
    measured = {"fid@clip": 4.0, "fid@pixels": 0.5, "tones": 9.0, "reward": 0.2}
    in_units = loss.relative_to(loss.yardstick(measured, 100))
    assert in_units.value({metric: measured[str(metric)] for metric in loss.weights}) == pytest.approx(2 - 1)
    with pytest.raises(MetricError, match="each metric of a sum is divided by that of an average"):
        loss.yardstick({**measured, "reward": 0.0}, 100)
    with pytest.raises(MetricError, match="at no distance from the real images"):
        loss.yardstick({**measured, "tones": 0.0}, 100)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"fdr": ["clip"], "reward": -1}, "beside other metrics, fdr has a weight, as {fdr: 1, reward: -1}"),
        ({"fdr@clip": ["clip"]}, "stands alone"),
        ({"fdr": 1, "fdr@clip": 1}, "names fdr twice"),
        ({"fdr": 1, "fid": 1}, "fid is named twice"),
        ({"fdr": 0, "reward": -1}, "a reward alone collapses diversity"),
        ({"fdr": 0}, "names no metric"),
    ],
)
def test_what_cannot_stand_beside_fdr_is_refused_with_what_can(setting: LossSetting, message: str) -> None:
    with pytest.raises(MetricError, match=re.escape(message)):
        Loss.parse(setting)


def test_the_terms_of_a_sum_are_in_units_of_the_yardstick_and_a_reward_may_be_negative() -> None:
    """A share of one metric counts as much as the same share of another, whatever their own units are."""
    loss = Loss.parse({"reward": -1, "fid": 2})
    measured = {"reward": -0.17, "fid": 8.0}
    in_units = loss.relative_to(loss.yardstick(measured, 100))
    reward, fid = (next(name for name in loss.weights if str(name) == text) for text in ("reward", "fid"))
    at_average = in_units.value({reward: -0.17, fid: 8.0})
    assert in_units.value({reward: -0.17 * 0.9, fid: 8.0}) == pytest.approx(at_average - 0.1), "a tenth better"
    assert in_units.value({reward: -0.17, fid: 8.0 * 0.95}) == pytest.approx(at_average - 0.1), "weighted twice"
    assert Loss.parse("fid").relative_to(loss.yardstick(measured, 100)) == Loss.parse("fid"), "one metric has its own"
    for nothing in (0.0, float("nan")):
        with pytest.raises(MetricError, match="each metric of a sum is divided by that of an average"):
            loss.yardstick({**measured, "reward": nothing}, 100)


def test_units_divide_and_one_that_is_nothing_beside_the_others_is_refused() -> None:
    loss = Loss.parse({"fdr": ["inception", "pixels"]})
    yardstick = loss.yardstick({"fid": 2.0, "fid@pixels": 4.0}, 100)
    assert list(loss.relative_to(yardstick).weights.values()) == [0.25, 0.125]
    for unit in (0.0, 1e-13):
        with pytest.raises(MetricError, match="at no distance from the real images"):
            loss.yardstick({"fid": unit, "fid@pixels": 4.0}, 100)


def test_overshoot_that_clipping_hides_is_seen_by_pixels_alone():
    scores = fdr_suite()
    real = images(300, 9)
    overshot = real.sign() * 3  # saved as images, they are black and white
    values = fill(image_metrics(scores, 300), overshot).compute()[1]
    clipped = fill(image_metrics(scores, 300), overshot.clamp(-1, 1)).compute()[1]
    assert values["fid"] == clipped["fid"]
    assert values["fid@pixels"] > 3 * clipped["fid@pixels"]
    assert fill(image_metrics(scores, 300, group="held-out"), overshot).compute()[1]["outside"] == pytest.approx(255)


def test_outside_is_how_many_levels_clipping_changes_a_value_on_average():
    level = 2 / 255
    batch = torch.tensor([[1 + 3 * level, -1 - 5 * level, 1.0, 0.0], [-1.0, 1 + level, 0.5, -0.5]])
    assert Outside()(batch.reshape(2, 1, 2, 2)).flatten().tolist() == pytest.approx([2, 0.25], rel=1e-4)


def test_components_hold_most_of_the_variance_and_are_as_many_as_that_takes():
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(500, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    components = pixel_components(few.reshape(500, 1, 8, 8) / 10)
    assert components.dimension <= 3
    assert pixel_components(images(300)).dimension <= 16, "thumbnails of 4 x 4 pixels have no more directions"
    features = components(few.reshape(500, 1, 8, 8) / 10).double().numpy()
    assert np.abs(np.cov(features.T) - np.diag(np.var(features, axis=0, ddof=1))).max() < 1e-3 * features.var()


def test_gradients_are_zero_where_clipping_cuts_and_only_there_for_networks():
    batch = torch.tensor([0.5, 3.0, -3.0, 0.1] * 4).reshape(1, 1, 4, 4)
    gradient = image_gradient(Pixels(), batch, torch.ones(1, 16))
    assert ((gradient != 0) == (batch.abs() <= 1)).all()
    raw = pixel_components(images(300))
    assert (image_gradient(raw, batch, torch.ones(1, raw.dimension)) != 0).any(dim=0).flatten()[1]
    assert seen_images(raw, batch) is batch


DIGITS, RANDOM = "a second network trained on mnist", "convolutions with random weights"


@pytest.mark.parametrize(
    ("shape", "network"),
    [((1, 28, 28), DIGITS), ((3, 32, 32), RANDOM), ((1, 64, 64), RANDOM)],
)
def test_second_features_are_for_images_of_any_size_and_tell_them_apart(shape, network):
    generator = torch.Generator().manual_seed(1)
    batch = torch.rand(6, *shape, generator=generator) * 2 - 1
    extractor = SecondFeatures(shape)
    features = extractor(batch)
    assert features.shape == (6, SecondFeatures.dimension)
    assert torch.pdist(features).min() > 0
    torch.testing.assert_close(extractor(batch[2:4]), features[2:4])
    assert extractor.in_words.startswith(network)
    assert extractor.name.startswith("second-mnist-48-" if network == DIGITS else "random-convolutions-48")


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_samples_and_real_images_in_colour_are_seen_by_one_network(channels):
    grey = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    extractor = SecondFeatures((channels, 16, 16))
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))


def test_a_reference_in_components_is_that_of_the_images_whatever_sign_an_eigenvector_has(monkeypatch):
    real, other = images(300, 9), images(200, 3)
    thumbnails = dataclasses.replace(
        Reference.of_images(Thumbnails(), real), held_out=Reference.of_images(Thumbnails(), other)
    )
    found = pixel_reference(thumbnails)
    direct = Reference.of_images(found.extractor, real)
    np.testing.assert_allclose(found.frechet.cov, direct.frechet.cov, atol=1e-5)
    np.testing.assert_allclose(found.known_features, direct.known_features, atol=1e-4)
    assert found.held_out is not None
    unseen = Reference.of_images(found.extractor, other)
    np.testing.assert_allclose(found.held_out.frechet.mean, unseen.frechet.mean, atol=1e-5)

    eigh = np.linalg.eigh

    def other_signs(matrix):
        values, vectors = eigh(matrix)
        return values, -vectors

    monkeypatch.setattr(np.linalg, "eigh", other_signs)
    torch.testing.assert_close(pixel_reference(thumbnails).extractor(other), found.extractor(other))


@pytest.mark.parametrize("loss", ["fid", "tones"])
def test_an_answer_is_chosen_by_distances_to_real_images_that_a_search_sees_and_to_others(loss):
    real, unseen = images(300, 9), images(300, 5) * 0.5
    references = {
        name: dataclasses.replace(
            Reference.of_images(extractor, real), selection=Reference.of_images(extractor, unseen)
        )
        for name, extractor in (("inception", Pixels()), ("tones", Tones()))
    }
    scores = suite(references, loss=loss, metrics=["precision"])
    samples = images(200, 1) * 0.5
    searched = fill(image_metrics(scores, 200), samples)
    chosen = fill(image_metrics(scores, 200, group="selection", error=True), samples)
    assert chosen.compute() == searched.compute()
    assert chosen.unseen() == searched.unseen() < searched.compute()[0] / 5
    without = chosen.without_each_group()
    assert np.mean(without["loss"]) == pytest.approx(chosen.compute()[0], rel=0.2)
    assert np.mean(without["unseen"]) == pytest.approx(chosen.unseen(), rel=0.5)
