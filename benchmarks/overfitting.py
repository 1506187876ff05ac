"""One row of coefficients and a row for each layer, searched with few real images and with many.

    python benchmarks/overfitting.py [--seeds 3] [--images 20000]

Models, halves of the digits and metrics are those of ``refine.py``. The loss sees a random part of half A. The answer's
FID, precision and recall are to all of half A; FID is to half B, too, in the features of the loss (64) and in those of
another network. Results that are already in ``results/overfitting.csv`` are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from common import machine, read_csv, write_csv
from fidelity import METRICS, REPORTED, SPACES, MetricsOfHalves, answer_of, cell, objective_of
from refine import TRAINING

from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.metrics import Reference
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.training.images import bundled_images

REAL = (50, 100, 200, 400, 898)
SHOWN = ("fid A", "fid B", "fid B2", "precision A", "recall A")
COLUMNS = ("rows", "real", "seed", "images", "fid seen", *SHOWN)

Key = tuple[str, int, int, int]


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=20_000)
    arguments = parser.parse_args()
    print(machine())
    evaluator = MetricsOfHalves()
    known: dict[Key, tuple[float, ...]] = {
        (rows, int(real), int(seed), int(images)): tuple(map(float, values))
        for rows, real, seed, images, *values in read_csv("overfitting")
    }
    for seed in range(arguments.seeds):
        for real in REAL:
            for rows in ("one", "layers"):
                key = (rows, real, seed, arguments.images)
                if key not in known:
                    known[key] = measured(*key, evaluator)
                    write_csv("overfitting", COLUMNS, [(*key, *(round(v, 4) for v in known[key])) for key in known])
                    print(*key, *(f"{value:.3g}" for value in known[key]), flush=True)
    print(table(known))


def measured(rows: str, real: int, seed: int, images: int, evaluator: MetricsOfHalves) -> tuple[float, ...]:
    """FID to the images that the loss saw, and the metrics of :data:`SHOWN`."""
    objective = seeing(real, seed, rows=None if rows == "one" else rows)
    answer = answer_of(objective, "LCSCGradient", seed, images)
    samples = objective.images(answer, HELD_OUT, REPORTED)
    names = [f"{metric} {space}" for space in SPACES for metric in METRICS]
    values = dict(zip(names, evaluator.of_images(samples), strict=True))
    metrics = objective.scores.image_metrics(len(samples))
    metrics.update(samples)
    return (metrics.compute()[0], *(values[name] for name in SHOWN))


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


def table(known: dict[Key, tuple[float, ...]]) -> str:
    """A table of means over seeds, with their standard deviations."""
    columns = ("fid seen", *SHOWN)
    lines = [f"| real images | rows | images | seeds | {' | '.join(columns)} |", "|---|---|---|---|" + "---|" * 6]
    for rows, real, images in sorted({(rows, real, images) for rows, real, _, images in known}, key=lambda it: it[1:]):
        found = [values for key, values in known.items() if (key[0], key[1], key[3]) == (rows, real, images)]
        cells = [cell([values[place] for values in found]) for place in range(len(columns))]
        lines.append(f"| {real} | {rows} | {images:,} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
