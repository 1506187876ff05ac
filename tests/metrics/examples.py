"""Extractors whose features are pixels, images for them, their scores, features in a random basis, hostile content."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import Candidate, Noise
from lcsc_opt.metrics import Loss, MetricSuite, Reference, SuiteMetrics
from lcsc_opt.metrics.extractors.by_name import find_extractor
from lcsc_opt.metrics.from_settings import ReferenceScoreSettings, ScoreSources

IMAGES = 40


class Pixels:
    """Counts what it sees."""

    name, dimension = "pixels", 16

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images.flatten(1)


class Classifier(Pixels):
    name = "classifier"

    def features_and_logits(self, images):
        features = self(images)
        return features, features[:, :5] * 4


class Doubled(Pixels):
    """Other features of the same images."""

    name = "doubled"

    def __call__(self, batch):
        return 2 * super().__call__(batch).flip(1)


def images(count=IMAGES, seed=0):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def reference(extractor=None, count=60, seed=9):
    return Reference.of_images(extractor or Pixels(), images(count, seed))


def fill(metrics, batch, size=7):
    for part in batch.split(size):
        metrics.update(part)
    return metrics


def image_metrics(scores, total, *, group="search", **asked):
    """The metrics of an evaluation, empty; ``asked`` are fields of its candidate."""
    return scores.image_metrics(Candidate(np.ones(1), noise=Noise(group), **asked), total)


def score(scores, batch=None, *, held_out=False, size=7):
    batch = images() if batch is None else batch
    return fill(image_metrics(scores, len(batch), group="held-out" if held_out else "search"), batch, size).compute()


def both(**settings):
    return suite({"inception": reference(Classifier()), "m:f": reference()}, **settings)


def suite(references, *, loss="fid", keep=None, report_references=dict, real_images=lambda _: None, **settings):
    """Of metrics by their names; rewards are those among the references."""
    metrics = SuiteMetrics.of(Loss.parse(loss, keep), rewards=references, **settings)
    return MetricSuite(references, metrics, report_references=report_references, real_images=real_images)


def features_of(count, dimension=5, *, seed=0, mean=3.0, least=0.1, rank=None, dtype=np.float64):
    """Standard deviations from 1 to ``least``, in a random basis, around ``mean``."""
    generator = np.random.default_rng(seed)
    turn = np.linalg.qr(generator.standard_normal((dimension, dimension)))[0]
    spread = np.geomspace(1, least, dimension)[:rank]
    return (generator.standard_normal((count, len(spread))) * spread @ turn[: len(spread)] + mean).astype(dtype)


def differences(function, at, step=1e-5):
    """The gradient of ``function`` at an array by central differences, entry by entry."""
    found = np.empty_like(at)
    for index in np.ndindex(*at.shape):
        moved = np.zeros_like(at)
        moved[index] = step
        found[index] = (function(at + moved) - function(at - moved)) / (2 * step)
    return found


def mean_and_covariance(features):
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def pixels(count, height=2, width=2, channels=3, seed=0):
    """``[count, height, width, channels]`` uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def write_folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03}.png")
    return path


class Explosive:
    """What a pickle may hold."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the file was executed')",))


def build_scores(*, cache, batch_size=250, device="cpu", **settings):
    given = ReferenceScoreSettings(**{"held_out_metrics": [], **settings})
    return ScoreSources(given, BuildContext(files=cache), device=device, batch_size=batch_size).suite()


made_last: Any = None


def made_here() -> Any:
    return made_last


def found(made: Any) -> Any:
    """An extractor as it is found by the name of a function that makes it."""
    global made_last
    made_last = made
    return find_extractor(f"{__name__}:made_here", weights=None)("cpu")
