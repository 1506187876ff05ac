"""A metric that may not get worse than at the yardstick: its bound, its penalty, and both gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.base.records import PENALTY, Yardstick
from lcsc_opt.metrics import MetricSuite, Reference
from lcsc_opt.metrics.extractors.rewards import Reward
from lcsc_opt.metrics.image_metrics import ImageMetrics
from lcsc_opt.metrics.loss import Loss
from tests.metrics.examples import Pixels, differences, fill, image_metrics, suite


class FourPixels(Pixels):
    dimension = 4


def drawn(count: int, *, seed: int, spread: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64)


def scores(keep: str | None = "precision") -> MetricSuite:
    return suite({"inception": Reference.of_images(FourPixels(), drawn(60, seed=0))}, keep=keep)


def seen(made: MetricSuite, images: torch.Tensor, yardstick: Yardstick | None = None) -> ImageMetrics:
    metrics: ImageMetrics = fill(image_metrics(made, len(images), gradient=True, yardstick=yardstick), images)
    return metrics


def yardstick(keep: str, loss: float, bound: float, deviation: float, guide: float, sign: int = 1) -> Yardstick:
    """Of an average with this FID, and this value of what guides the kept metric."""
    guided = "hinge" if keep == "precision" else keep
    metrics = {"fid": loss, keep: bound, guided: guide}
    return Yardstick(metrics, kept=keep, sign=sign, bound=bound, deviation=deviation, loss=loss)


@pytest.mark.parametrize(
    ("text", "loss", "metric", "guide"),
    [
        ("precision", "fid", "precision", "hinge"),
        ("precision@clip", "fid@m:f", "precision@clip", "hinge@clip"),
        ("precision@inception", "fid@m:f", "precision", "hinge"),
        ("near", {"kid@m:f": 1.0, "fid": 1.0}, "near@m:f", "near@m:f"),
    ],
)
def test_what_is_kept_is_in_the_features_of_the_loss_and_has_a_guide_with_a_gradient(
    text: str, loss: Any, metric: str, guide: str
) -> None:
    kept = Loss.parse(loss, text).keep
    assert kept is not None
    assert [str(kept), str(kept.guide)] == [metric, guide]


def test_the_yardstick_is_measured_without_a_penalty() -> None:
    made, images = scores(), drawn(50, seed=1, spread=0.5)
    plain, metrics = seen(scores(None), images).compute()
    loss, measured = seen(made, images).compute()
    found = made.loss.yardstick(measured, 50)
    assert loss == plain == metrics["fid"]
    value = measured["precision"]
    assert (found.kept, found.sign, found.bound) == ("precision", -1, value)
    assert found.deviation == pytest.approx((value * (1 - value)) ** 0.5)
    assert {**found.metrics} == {name: measured[name] for name in ("fid", "precision", "hinge")}
    assert 0 < value < 1
    assert seen(made, images, found).compute()[0] == plain, "it is within its own bound"


def test_the_loss_to_unseen_images_has_their_fid_and_the_same_penalty() -> None:
    images, other = drawn(50, seed=1, spread=0.5), drawn(60, seed=2, spread=0.4)
    made, swapped = scores(), suite({"inception": Reference.of_images(FourPixels(), other)})
    tight = yardstick("precision", 2.0, 0.9, 0.1, 1.0, -1)
    assert seen(made, images, tight).unseen() is None
    unseen = Reference.of_images(FourPixels(), other)
    made.references["inception"] = dataclasses.replace(made.references["inception"], selection=unseen)
    found = seen(made, images, tight)
    loss, metrics = found.compute()
    assert loss > metrics["fid"]
    assert found.unseen() == pytest.approx(seen(swapped, images).compute()[0] + loss - metrics["fid"])


@pytest.mark.parametrize(("keep", "sign"), [("hinge", 1), ("precision", -1)])
def test_what_is_beyond_the_bound_costs_and_what_is_within_does_not(keep: str, sign: int) -> None:
    made, images = scores(keep), drawn(50, seed=1, spread=0.5)
    plain, metrics = seen(made, images).compute()
    value = metrics[keep]
    loose = yardstick(keep, plain, value * (1 + 0.1 * sign), value, 1.0, sign)
    assert seen(made, images, loose).compute()[0] == plain
    assert seen(made, images, loose).violation() == pytest.approx(-0.1 * 50**0.5)
    bound = value * (1 - 0.5 * sign)
    tight = yardstick(keep, plain, bound, value / 100, 1.0, sign)
    assert seen(made, images, tight).compute()[0] == pytest.approx(plain + PENALTY * plain * value / 2 / bound)


@pytest.mark.parametrize(
    ("keep", "keep_weight"), [("hinge", None), ("hinge", 0.7), ("precision", 0.0), ("precision", 0.7)]
)
def test_gradient_is_that_of_the_loss_with_its_penalty_or_with_the_weight_that_is_asked(
    keep: str, keep_weight: float | None
) -> None:
    made, images = scores(keep), drawn(12, seed=1, spread=0.3).clamp(-0.99, 0.99)  # clipping cuts gradients
    bounded = yardstick(keep, 3.0, 0.2, 0.01, 0.2)

    def value(at: Any) -> float:
        loss, metrics = seen(made, torch.from_numpy(at), bounded).compute()
        if keep_weight is None:
            return loss
        return metrics["fid"] + keep_weight * 3.0 / 0.2 * metrics["hinge"]

    gradient = seen(made, images, bounded).gradients(keep_weight)["inception"].reshape(12, 1, 2, 2)
    assert gradient == pytest.approx(differences(value, images.numpy(), 1e-6), rel=1e-4, abs=1e-7)


def rewarded(keep: Any = "reward", zero: float = 0.0) -> MetricSuite:
    """Scores with a reward, the mean brightness of an image less its ``zero``."""
    references = {
        "inception": Reference.of_images(FourPixels(), drawn(60, seed=0)),
        "reward": Reference(Reward("reward", lambda batch: batch.mean(dim=(1, 2, 3)) - zero)),
    }
    return suite(references, keep=keep)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("zero", [-2.0, 2.0])
def test_a_reward_of_either_sign_may_not_fall(zero: float, with_gradient: bool) -> None:
    made, images = rewarded(zero=zero), drawn(50, seed=1).clamp(-0.7, 0.99)  # rewards see clipped images
    plain, measured = fill(image_metrics(made, 50, gradient=with_gradient), images).compute()
    rewards = images.mean(dim=(1, 2, 3)) - zero
    found = made.loss.yardstick(measured, 50)
    assert (found.kept, found.sign, found.bound) == ("reward", -1, pytest.approx(float(rewards.mean())))
    assert found.deviation == pytest.approx(float(rewards.std()))
    assert seen(made, images, found).compute()[0] == pytest.approx(plain, rel=1e-12), "it is within its own bound"
    excess = 0.25
    darker = seen(made, images - excess, found)
    expected = PENALTY * plain * excess / abs(found.bound)
    loss, metrics = darker.compute()
    assert loss == pytest.approx(metrics["fid"] + expected)
    assert darker.violation() == pytest.approx(excess / (found.deviation / 50**0.5))
    of_one_image = seen(made, images - excess, found).gradients(0.7)["reward"]
    assert of_one_image == pytest.approx(-0.7 * plain / abs(found.bound) / 50), "the reward is to rise"


@pytest.mark.parametrize(("bound", "is_one"), [(-3.0, True), (0.0, True), (0.8, True), (float("nan"), False)])
def test_any_number_bounds_a_reward(bound: float, is_one: bool) -> None:
    if is_one:
        assert Loss.parse("fid", {"reward": bound}).bound == bound
    else:
        with pytest.raises(MetricError, match="cannot be kept"):
            Loss.parse("fid", {"reward": bound})


def test_a_reward_that_is_kept_needs_its_function() -> None:
    with pytest.raises(MetricError, match="give reward: module:function"):
        suite({"inception": Reference.of_images(FourPixels(), drawn(60, seed=0))}, keep="reward")
