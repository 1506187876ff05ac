"""One row of coefficients against a row for each layer, with equal images, on several models.

    python benchmarks/rows.py [--seeds 3] [--only WORD] [--images N]

Searches by ``LCSCGradient`` see half A of the real images through one network. Their answers are measured on held-out
noise: FID to half A and to half B, which no search saw, in the features of that network and of another one (2), and
precision and recall to half A. Results that are already in ``results/rows.csv`` are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from common import machine, read_csv, write_csv
from fidelity import METRICS, REPORTED, SPACES, MetricsOfHalves, answer_of, best_ema, cell, objective_of

from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.training.images import Bundled

SHOWN = ("fid A", "fid B", "fid A2", "fid B2", "precision A", "recall A", "near A")
COLUMNS = ("model", "way", "seed", "images", *SHOWN)
EMA = "EMA*"
DIGITS: Mapping[str, Any] = {"training_steps": 2000, "checkpoint_every": 10}
DDPM: Mapping[str, Any] = {"training_steps": 1000, "checkpoint_every": 10}

Key = tuple[str, str, int, int]


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model, and how it is searched: with how many images, with how many to choose the answer."""

    name: str
    file: str
    settings: Mapping[str, Any]
    images: int
    dataset: Bundled = "digits"
    selected: int = 10_000
    keeps: bool = True


MODELS = (
    Model("digits, K = 50", "digits.py", {**DIGITS, "select": {"interval": 40}}, 20_000),
    Model("digits, K = 200", "digits.py", DIGITS, 20_000),
    Model("digits, another training", "digits.py", {**DIGITS, "training_seed": 1, "select": {"interval": 20}}, 20_000),
    Model("DDPM, 6 steps", "digits_ddpm.py", {**DDPM, "nfe": 6}, 8_000, selected=3_000),
    Model("DDPM, 8 steps", "digits_ddpm.py", {**DDPM, "nfe": 8}, 8_000, selected=3_000, keeps=False),
    Model("DDPM, 10 steps", "digits_ddpm.py", {**DDPM, "nfe": 10}, 8_000, selected=3_000, keeps=False),
    Model(
        "photographs, K = 200",
        "photographs.py",
        {"training_steps": 3000, "checkpoint_every": 15},
        10_000,
        dataset="photographs",
        selected=3_000,
    ),
)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="of each search, in place of the model's own number")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    arguments = parser.parse_args()
    print(machine())
    known: dict[Key, tuple[float, ...]] = {
        (model, way, int(seed), int(images)): tuple(map(float, values))
        for model, way, seed, images, *values in read_csv("rows")
    }
    for model in [model for model in MODELS if arguments.only in model.name]:
        evaluator = MetricsOfHalves(model.dataset)
        for way, seed in ways(model, arguments.seeds):
            key = (model.name, way, seed, 0 if way == EMA else arguments.images or model.images)
            if key not in known:
                known[key] = measured(model, way, seed, key[-1], evaluator)
                write_csv("rows", COLUMNS, [(*one, *(round(value, 4) for value in known[one])) for one in known])
                print(*key, *(f"{value:.3g}" for value in known[key]), flush=True)
    print(table(known))


def ways(model: Model, seeds: int) -> Iterator[tuple[str, int]]:
    """Name and seed of each search."""
    yield EMA, 0
    for seed in range(seeds):
        for end in ("", ", keep") if model.keeps else ("",):
            yield from ((f"{rows}{end}", seed) for rows in ("one row", "layers"))


def measured(model: Model, way: str, seed: int, images: int, evaluator: MetricsOfHalves) -> tuple[float, ...]:
    """The metrics of :data:`SHOWN` of one answer."""
    settings = {**model.settings, **({"keep": "precision"} if way.endswith("keep") else {})}
    objective = objective_of(model.file, rows="layers" if way.startswith("layers") else None, **settings)
    if way == EMA:
        found = best_ema(objective)
    else:
        found = answer_of(objective, "LCSCGradient", seed, images, selected_on=model.selected)
    names = [f"{metric} {space}" for space in SPACES for metric in METRICS]
    values = evaluator.of_images(objective.images(np.asarray(found), HELD_OUT, REPORTED))
    return tuple(dict(zip(names, values, strict=True))[name] for name in SHOWN)


def table(known: Mapping[Key, tuple[float, ...]]) -> str:
    """A table of means over seeds, with their standard deviations."""
    lines = [f"| model | way | images | seeds | {' | '.join(SHOWN)} |", "|---|---|---|---|" + "---|" * len(SHOWN)]
    for model, way, images in dict.fromkeys((model, way, images) for model, way, _, images in known):
        found = [values for key, values in known.items() if (key[0], key[1], key[3]) == (model, way, images)]
        cells = [cell([values[place] for values in found]) for place in range(len(SHOWN))]
        lines.append(f"| {model} | {way} | {images:,} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
