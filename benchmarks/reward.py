"""What a reward does to a search, with and without its guard.

    python benchmarks/reward.py [--seeds 3] [--images 20000]

The model is that of ``overfitting.py``. The reward of an image is the logarithm of the probability that it is a 3, by a
classifier of half A of the digits. The share of threes is counted by a classifier of half B, which no search sees; FID,
precision and recall are to all of half B, and to its threes. The last search has no reward: it takes the threes of half
A for its reference. Results that are already in ``results/reward.csv`` are not measured again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from common import measure_missing, parse
from fidelity import REPORTED, TRAINING, answer_of, best_ema, objective_of
from torch import Tensor, nn

from lcsc_opt.base.descent import descend
from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.metrics import Reference, extract
from lcsc_opt.metrics.bundled_images import bundled_images
from lcsc_opt.metrics.extractors.bundled import feature_network
from lcsc_opt.metrics.feature_metrics import FeatureMetrics

WANTED = 3
ALONE: Mapping[str, Any] = {"reward": "reward:log_probability", "unguarded": True}
GUARDED = {f"FID, {weight} reward": {**ALONE, "loss": {"fid": 1, "reward": -weight}} for weight in (0.1, 0.3, 1, 10)}
SEARCHES: Mapping[str, Mapping[str, Any]] = {
    "FID": {},
    "reward alone": {**ALONE, "loss": {"reward": -1}},
    "near, 1 reward": {**ALONE, "loss": {"near": 1, "reward": -1}},
    **GUARDED,
    "FID to threes": {},
}
COLUMNS = ("share", "spread", "FID", "precision", "recall", "FID threes", "precision threes", "recall threes")


def main() -> None:
    """Measure what is missing, and print the table."""
    arguments = parse(__doc__, seeds=3, images=20_000)
    keys = [(name, seed, arguments.images) for seed in range(arguments.seeds) for name in SEARCHES]
    images, classes = half(0)
    baseline = {"real half A": figures(images), "real threes of half A": figures(images[classes == WANTED])}
    plain = objective_of(**TRAINING)
    baseline["EMA*"] = figures(plain.images(best_ema(plain), HELD_OUT, REPORTED))
    measure_missing("reward", keys, measured, named=("loss", "seed", "images"), metrics=COLUMNS, baseline=baseline)


def measured(name: str, seed: int, images: int) -> tuple[float, ...]:
    """The figures of 10,000 held-out images of one search's answer."""
    objective = objective_of(**TRAINING, **SEARCHES[name])
    if name == "FID to threes":
        (alias,) = objective.scores.extractors
        real, classes = half(0)
        known = objective.scores.references[alias]
        chosen = Reference.of_images(known.extractor, real[classes == WANTED])
        objective.scores.references[alias] = dataclasses.replace(chosen, held_out=known.held_out)
    return figures(objective.images(answer_of(objective, "LCSCGradient", seed, images), HELD_OUT, REPORTED))


def figures(images: Tensor) -> tuple[float, ...]:
    """The values of :data:`COLUMNS` of images ``[N, 1, 8, 8]``."""
    share = float((classifier(1)(images).argmax(1) == WANTED).float().mean())
    found = [share, float(images.double().var(dim=0, correction=0).mean().sqrt())]
    (real, classes), network = half(1), feature_network("digits")
    for some in (real, real[classes == WANTED]):
        metrics = FeatureMetrics(Reference.of_images(network, some))
        metrics.update(torch.from_numpy(extract(network, images).astype(np.float32)))
        found += [metrics.compute("fid"), metrics.compute("precision"), metrics.compute("recall")]
    return tuple(found)


def half(number: int) -> tuple[Tensor, Tensor]:
    """Images and classes of half A (0) or B (1)."""
    images, classes = bundled_images("digits")
    return images[number::2], classes[number::2]


@functools.cache
def classifier(number: int) -> nn.Module:
    """A classifier of one half, trained in some seconds."""
    images, classes = half(number)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(number)
        layers = (nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU(), nn.Flatten())
        network = nn.Sequential(*layers, nn.Linear(512, 10))
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        descend(
            lambda _: nn.functional.cross_entropy(network(images), classes),
            optimizer,
            steps=200,
            description="classifier",
        )
    return network.requires_grad_(requires_grad=False)


def log_probability(images: Tensor) -> Tensor:
    """``[N]``: the reward that is searched."""
    scores: Tensor = classifier(0)(images.cpu()).log_softmax(dim=1)[:, WANTED]
    return scores


if __name__ == "__main__":
    main()
