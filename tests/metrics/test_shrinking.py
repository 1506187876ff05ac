"""Targets of few real images, shrunk towards an average of the checkpoints."""

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import Reference
from lcsc_opt.metrics.extractors.pixels import Thumbnails, pixel_reference
from lcsc_opt.metrics.shrinking import shrinkage_of
from lcsc_opt.metrics.tones import Tones
from tests.metrics.examples import Pixels, features_of, fill, image_metrics, images, suite

DARKER = 0.8 * images(1000, seed=4) - 0.2


def state_of_average(scores, batch):
    return fill(scores.metrics_of_average(len(batch)), batch, size=500).state


def shrunk_suite(*, count=30, average=None, **settings):
    """A suite whose real images are few, shrunk towards images that are a little darker."""
    scores = suite({"inception": Reference.of_images(Pixels(), images(count, seed=3))}, **settings)
    scores.shrink(state_of_average(scores, DARKER if average is None else average), is_probe=False)
    return scores


def test_weights_are_those_of_ledoit_and_wolf():
    real, average = features_of(60), features_of(1000, seed=1, mean=3.1, least=0.3)
    found = shrinkage_of("fid", Reference.of_features(FivePixels(), real), average)

    def errors(rows):
        deviations = rows - rows.mean(0)
        products = deviations[:, :, None] * deviations[:, None]
        scatter = np.square(products - products.mean(0)).sum((1, 2)).mean()
        return np.square(deviations).sum(1).mean() / len(rows), scatter / len(rows)

    (mean, covariance), (of_mean, of_covariance) = errors(real), errors(average)
    mean_distance = np.square(real.mean(0) - average.mean(0)).sum() - of_mean
    covariance_distance = np.square(np.cov(real.T) - np.cov(average.T)).sum() - of_covariance
    assert found.of_mean == pytest.approx(mean / mean_distance, rel=0.05)
    assert found.of_covariance == pytest.approx(covariance / covariance_distance, rel=0.05)
    assert 0.01 < found.of_mean < 1
    assert 0.01 < found.of_covariance < 1


class FivePixels(Pixels):
    dimension = 5


@pytest.mark.parametrize("formula", ["fid", "tones"])
def test_the_weights_fall_as_one_over_the_number_of_real_images_and_are_one_where_the_average_is_the_truth(formula):
    extractor = Tones() if formula == "tones" else Pixels()
    darker = extractor(DARKER[:300]).numpy()
    weights = {}
    for count in (20, 80, 600):
        reference = Reference.of_images(extractor, images(count, seed=6))
        weights[count] = shrinkage_of(formula, reference, darker).of_mean
    assert 1 > weights[20] > weights[80] > weights[600]
    assert weights[600] < 0.1
    alike = extractor(images(300)).numpy()
    assert shrinkage_of(formula, Reference.of_images(extractor, images(40, seed=6)), alike).of_mean > 0.5
    few = darker[:100]
    found, doubted = (shrinkage_of(formula, reference, few, doubt=doubt).of_mean for doubt in (1.0, 2.0))
    assert doubted > found, "as those of a probe are"


def test_the_target_of_many_real_images_is_the_plain_one():
    scores = shrunk_suite(count=5000)
    batch = images(100, seed=8)
    loss, metrics = fill(image_metrics(scores, 100), batch).compute()
    assert metrics == {"fid": loss}


def test_the_loss_is_the_distance_to_the_shrunk_target_and_what_is_reported_is_plain():
    scores = shrunk_suite()
    plain = suite({"inception": scores.references["inception"]})
    batch = images(100, seed=8)
    [(_, expected)] = fill(image_metrics(plain, 100), batch).compute()[1].items()
    loss, metrics = fill(image_metrics(scores, 100), batch).compute()
    assert metrics == {"fid_shrunk": loss, "fid": expected}
    assert loss < expected
    reference = scores.references["inception"]
    shrinkage = shrinkage_of("fid", reference, DARKER.flatten(1).numpy())
    target = reference.shrunk(shrinkage)
    assert loss == pytest.approx(target.frechet.distance_from_features(batch.flatten(1).numpy()), rel=1e-6)
    held_out, reported = fill(image_metrics(scores, 100, group="held-out"), batch).compute()
    assert held_out == reported["fid"] == expected
    assert fill(image_metrics(scores, 100, rehearsal=True), batch).compute()[1] == {"fid": expected}


def test_few_real_images_are_named_with_their_weights(caplog):
    with caplog.at_level("INFO", logger="lcsc_opt"):
        shrunk_suite()
    [line] = caplog.messages
    assert "30 real images, weights of the average of the checkpoints: fid 0." in line
    assert "(mean), 0." in line


def test_nothing_is_searched_where_the_average_says_as_much_as_the_real_images():
    with pytest.raises(MetricError, match=r"nothing to search for: .*30 real images"):
        shrunk_suite(average=images(30, seed=3).repeat(70, 1, 1, 1))


def test_a_probe_shrinks_nothing():
    scores = suite({"inception": Reference.of_images(Pixels(), images(30, seed=3))})
    assert scores.shrink(state_of_average(scores, DARKER[:200]), is_probe=True)
    assert list(fill(image_metrics(scores, 40), images()).compute()[1]) == ["fid"]


FDR = {"fdr": ["m:f", "pixels", "tones"]}


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_gradient_is_that_of_the_shrunk_loss(unbiased):
    real = images(30, seed=3)
    thumbnails = pixel_reference(Reference.of_images(Thumbnails(), real))
    references = {"m:f": Reference.of_images(Pixels(), real), "pixels": thumbnails}
    references["tones"] = Reference.of_images(Tones(), real)
    scores = suite(references, loss=FDR)
    scores.shrink(state_of_average(scores, DARKER), is_probe=False)
    _, named = fill(image_metrics(scores, 100), DARKER[:100]).compute()
    assert list(named) == ["fid_shrunk@m:f", "fid_shrunk@pixels", "tones_shrunk", "fid@m:f", "fid@pixels", "tones"]
    yardstick = scores.loss.yardstick(named, 100)
    batch = images(12, seed=8).double()

    def collected(pixels):
        asked = {"yardstick": yardstick, "gradient": True, "unbiased": unbiased}
        return fill(image_metrics(scores, 12, **asked), torch.from_numpy(pixels).reshape(12, 1, 4, 4))

    metrics = collected(batch.numpy())
    rows = {name: torch.from_numpy(gradient) for name, gradient in metrics.gradients().items()}
    _, named = metrics.compute()
    assert set(named) >= {"fid_shrunk@m:f", "fid_shrunk@pixels", "tones_shrunk"}
    assert ("fid@pixels" in named) is not unbiased
    gradient = scores.image_gradient(batch, rows).numpy()

    def value(pixels):
        again = collected(pixels)
        again.gradients()
        return again.compute()[0]

    direction = np.random.default_rng(0).normal(size=batch.shape)
    ahead, behind = (value(batch.numpy() + step * direction) for step in (1e-3, -1e-3))
    assert (gradient * direction).sum() == pytest.approx((ahead - behind) / 2e-3, rel=1e-2)


def test_errors_leave_groups_of_real_images_out_of_the_real_part_alone():
    scores = shrunk_suite()
    batch = images(100, seed=8)
    without = fill(image_metrics(scores, 100, group="selection", error=True), batch).without_each_group()
    spread = {name: np.std(values[10:]) for name, values in without.items()}
    assert 0 < spread["loss"] < spread["fid"], "the average's part has no error"
    assert without["loss"] == without["fid_shrunk"]
