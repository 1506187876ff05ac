"""One row of coefficients and a row for each layer, searched with few real images and with many.

    python benchmarks/overfitting.py [--seeds 3] [--images 20000]

Halves of the digits and metrics are those of ``fidelity.py``; the models come from a shorter training. The loss sees a
random part of half A. The answer's FID, precision and recall are to all of half A; FID is to half B, too, in the
features of the loss (64) and in those of another network. Results that are already in
``results/overfitting.csv`` are not measured again.
"""

from __future__ import annotations

import dataclasses

import torch
from common import measure_missing, parse
from fidelity import REPORTED, TRAINING, answer_of, objective_of
from rows import metrics_of

from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.metrics import Reference
from lcsc_opt.metrics.bundled_images import bundled_images
from lcsc_opt.objective.merge_sample_score import MergeSampleScore

REAL = (50, 100, 200, 400, 898)
SHOWN = ("fid A", "fid B", "fid B2", "precision A", "recall A")


def main() -> None:
    """Measure what is missing, and print the table."""
    arguments = parse(__doc__, seeds=3, images=20_000)
    keys = [
        (str(real), rows, seed, arguments.images)
        for seed in range(arguments.seeds)
        for real in REAL
        for rows in ("one", "layers")
    ]
    named = ("real images", "rows", "seed", "images")
    measure_missing("overfitting", keys, measured, named=named, metrics=("fid seen", *SHOWN))


def measured(real: str, rows: str, seed: int, images: int) -> list[float]:
    """FID to the images that the loss saw, and the metrics of :data:`SHOWN`."""
    objective = seeing(int(real), seed, rows=None if rows == "one" else rows)
    samples = objective.images(answer_of(objective, "LCSCGradient", seed, images), HELD_OUT, REPORTED)
    metrics = objective.scores.image_metrics(len(samples))
    metrics.update(samples)
    return [metrics.compute()[0], *metrics_of(samples, SHOWN)]


def seeing(real: int, seed: int, rows: Rule | None) -> MergeSampleScore:
    """The objective whose loss sees so many images of half A."""
    objective = objective_of(**TRAINING, rows=rows)
    images, _ = bundled_images("digits")
    half = images[::2]
    chosen = half[torch.randperm(len(half), generator=torch.Generator().manual_seed(seed))[:real]]
    (name,) = objective.scores.extractors
    known = objective.scores.references[name]
    seen = Reference.of_images(known.extractor, chosen)
    objective.scores.references[name] = dataclasses.replace(seen, held_out=known.held_out)
    return objective


if __name__ == "__main__":
    main()
