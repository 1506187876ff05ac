"""Extractors whose features are pixels, images for them, and their scores."""

import torch

from lcsc_opt.metrics import Reference, Scores
from lcsc_opt.metrics.from_settings import ScoresBuilder

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


def score(scores, batch=None, *, held_out=False, size=7):
    batch = images() if batch is None else batch
    return fill(scores.image_metrics(len(batch), held_out=held_out), batch, size).compute()


def both(**settings):
    return Scores({"inception": reference(Classifier()), "m:f": reference()}, **settings)


def build_scores(*, cache, batch_size=250, device="cpu", **settings):
    return ScoresBuilder(**settings).build(cache=cache, batch_size=batch_size, device=device)
