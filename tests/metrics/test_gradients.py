"""The gradient of FID, KID and their weighted sums in the features, and in the images behind these."""

import numpy as np
import pytest
import torch

from lcsc_opt.base.errors import MetricError
from lcsc_opt.metrics import FeatureExtractor, FrechetReference, Reference, extract
from lcsc_opt.metrics.distances import kernel_distance
from lcsc_opt.metrics.extractors.rewards import Reward
from lcsc_opt.metrics.tones import Tones
from tests.metrics.examples import differences, features_of, fill, image_metrics, suite
from tests.metrics.examples import mean_and_covariance as moments


def features(count, dimension, seed, rank=None):
    return features_of(count, dimension, seed=seed, mean=0.5, least=0.2, rank=rank)


def assert_equal(gradient, expected, relative=1e-5):
    assert np.linalg.norm(gradient - expected) <= relative * np.linalg.norm(expected)


SETS = [
    (40, 6, 200, None),  # more images than features
    (7, 6, 200, None),
    (6, 6, 200, None),  # as many: the samples' covariance is singular
    (5, 9, 200, None),  # fewer
    (2, 4, 200, None),
    (30, 8, 5, None),  # a singular reference, of four dimensions
    (30, 8, 100, 3),  # features that are constant in the reference
    (30, 1, 20, None),
]


@pytest.mark.parametrize(("count", "dimension", "real", "rank"), SETS)
def test_gradient_of_fid_is_that_of_central_differences(count, dimension, real, rank):
    reference = FrechetReference(*moments(features(real, dimension, 1, rank)))
    samples = 0.7 * features(count, dimension, 2) + 0.3
    distance, gradient = reference.distance_and_gradient(samples)
    assert distance == pytest.approx(reference.distance_from_features(samples), rel=1e-10)
    assert gradient.shape == samples.shape
    assert gradient.dtype == np.float64
    assert_equal(gradient, differences(reference.distance_from_features, samples))


@pytest.mark.parametrize("count", [4, 20])
def test_images_that_are_all_alike_have_the_gradient_of_their_mean(count):
    mean, cov = moments(features(50, 8, 1))
    samples = np.tile((mean + 1).astype(np.float32), (count, 1))
    gradient = FrechetReference(mean, cov).distance_and_gradient(samples)[1]
    np.testing.assert_allclose(gradient, np.full((count, 8), 2 / count), atol=1e-6)


@pytest.mark.parametrize("real", [6, 4], ids=["all", "subsets of the samples"])
def test_gradient_of_kid_is_that_of_central_differences(real):
    samples, others = features(6, 2, 0), torch.from_numpy(features(real, 2, 1))

    def value(at):
        return kernel_distance(torch.from_numpy(at), others)[0]

    distance, gradient = kernel_distance(torch.from_numpy(samples), others, gradient=True)
    assert distance == value(samples)
    assert_equal(gradient.numpy(), differences(value, samples))


class Smooth:
    """A differentiable extractor of 1 × 3 × 3 images, without parameters that ask for a gradient."""

    def __init__(self, dimension, seed):
        generator = torch.Generator().manual_seed(seed)
        self.name, self.dimension = f"smooth-{dimension}", dimension
        self.weights = torch.randn(9, dimension, generator=generator, dtype=torch.float64)

    def __call__(self, images):
        return torch.tanh(images.flatten(1).to(self.weights) @ self.weights)


def images(count, seed=0):
    return torch.rand(count, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def scores(loss, **settings):
    networks: dict[str, FeatureExtractor] = {"inception": Smooth(5, 0), "clip": Smooth(30, 1), "tones": Tones()}
    references = {name: Reference.of_images(network, images(60, seed=9)) for name, network in networks.items()}
    references["reward"] = Reference(Reward("reward", lambda batch: batch.square().mean(dim=(1, 2, 3))))
    return suite(references, loss=loss, **settings)


def filled(made, batch, **options):
    return fill(image_metrics(made, len(batch), **options), batch, len(batch))


def image_gradient(made, batch, gradients):
    return made.image_gradient(batch, {name: torch.from_numpy(rows) for name, rows in gradients.items()})


ALL = {"fid": 0.3, "kid": 7, "fid@clip": 1, "tones": 2, "reward": -3}


@pytest.mark.parametrize("loss", ["fid@clip", "tones", ALL], ids=str)
@pytest.mark.parametrize(("count", "unbiased"), [(20, False), (12, True), (21, True)])
def test_gradient_of_the_loss_in_the_images_is_that_of_central_differences(loss, count, unbiased):
    made, batch = scores(loss), images(count)
    gradient = image_gradient(made, batch, filled(made, batch, gradient=True, unbiased=unbiased).gradients())
    for seed in range(3):
        step = 1e-5 * images(count, seed=100 + seed)
        ahead, behind = (filled(made, batch + sign * step, unbiased=unbiased).compute()[0] for sign in (1, -1))
        assert float((gradient * step).sum()) == pytest.approx((ahead - behind) / 2, rel=2e-4)


def test_other_metrics_need_no_gradient():
    made = scores("fid", metrics=["precision", "fid@clip"])
    metrics = filled(made, images(20), gradient=True)
    assert list(metrics.gradients()) == ["inception"]
    assert metrics.compute()[1] == pytest.approx(filled(made, images(20)).compute()[1], rel=1e-10)


def test_a_loss_without_a_gradient_names_its_metric():
    made = scores({"fid": 1, "recall@clip": 1})
    with pytest.raises(MetricError, match=r"recall@clip in the loss has no gradient, only fid, kid, .* have one"):
        filled(made, images(20)).gradients()


def test_what_an_extractor_keeps_from_its_first_images_is_used_in_later_graphs():
    class Keeps(Smooth):
        kept = None

        def __call__(self, images):
            if self.kept is None:
                self.kept = torch.ones(9, dtype=torch.float64) / 2
            return super().__call__(images * self.kept.reshape(3, 3))

    extractor = Keeps(5, 0)
    extract(extractor, images(3))
    for first in (extractor, Keeps(5, 0)):
        made = suite({"inception": Reference.of_images(first, images(60, seed=9))})
        gradients = filled(made, images(20), gradient=True).gradients()
        assert image_gradient(made, images(20), gradients).abs().sum() > 0
