"""One row of coefficients against a row for each layer, with equal images, on several models.

    python benchmarks/rows.py [--seeds 3] [--only WORD] [--images N]

Searches by ``LCSCGradient`` see half A of the real images through one network. Their answers are measured on held-out
noise: FID to half A and to half B, which no search saw, in the features of that network and of another one (2), and
precision and recall to half A. One model is searched with the 2,048 features of InceptionV3 with random weights, and
measured with the small networks, which then no search saw. Results that are already in ``results/rows.csv`` are not
measured again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from common import measure_missing, parse
from fidelity import COLUMNS, REPORTED, MetricsOfHalves, answer_of, best_ema, objective_of
from torch import Tensor

from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.metrics import MetricSuite, Reference
from lcsc_opt.metrics.bundled_images import Bundled, bundled_images
from lcsc_opt.metrics.extractors.published import RandomInception
from lcsc_opt.metrics.names import INCEPTION

SHOWN = ("fid A", "fid B", "fid A2", "fid B2", "precision A", "recall A", "near A")
EMA = "EMA*"
DIGITS: Mapping[str, Any] = {"training_steps": 2000, "checkpoint_every": 10}
DDPM: Mapping[str, Any] = {"training_steps": 1000, "checkpoint_every": 10}
PHOTOGRAPHS: Mapping[str, Any] = {"training_steps": 3000, "checkpoint_every": 15}


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model, and how it is searched: with how many images, with how many to choose the answer."""

    name: str
    file: str
    settings: Mapping[str, Any]
    images: int
    dataset: Bundled = "digits"
    selected: int = 10_000
    inception: bool = False
    bound: float | None = None  # on precision; 0.01 above the best one that one row has


MODELS = (
    Model("digits, K = 50", "digits.py", {**DIGITS, "select": {"interval": 40}}, 20_000),
    Model("digits, K = 200", "digits.py", DIGITS, 20_000),
    Model("digits, another training", "digits.py", {**DIGITS, "training_seed": 1, "select": {"interval": 20}}, 20_000),
    Model("digits, a third training", "digits.py", {**DIGITS, "training_seed": 2, "select": {"interval": 20}}, 20_000),
    Model("DDPM, 6 steps", "digits_ddpm.py", {**DDPM, "nfe": 6}, 8_000, selected=3_000, bound=0.71),
    Model("DDPM, another training", "digits_ddpm.py", {**DDPM, "nfe": 6, "training_seed": 1}, 8_000, selected=3_000),
    Model("DDPM, a third training", "digits_ddpm.py", {**DDPM, "nfe": 6, "training_seed": 2}, 8_000, selected=3_000),
    Model("DDPM, 8 steps", "digits_ddpm.py", {**DDPM, "nfe": 8}, 8_000, selected=3_000, bound=0.71),
    Model("DDPM, 10 steps", "digits_ddpm.py", {**DDPM, "nfe": 10}, 8_000, selected=3_000, bound=0.71),
    Model("photographs, K = 200", "photographs.py", PHOTOGRAPHS, 10_000, dataset="photographs", selected=3_000),
    Model(
        "photographs, random Inception",
        "photographs.py",
        {**PHOTOGRAPHS, "batch_size": 25, "images": 500},
        3_000,
        dataset="photographs",
        selected=500,
        inception=True,
    ),
)


def main() -> None:
    """Measure what is missing, and print the table."""
    images = {"type": int, "help": "of each search, in place of the model's own number"}
    arguments = parse(
        __doc__, seeds=3, images=images, only={"default": "", "help": "only searches whose MODEL: WAY contains this"}
    )
    models = {model.name: model for model in MODELS}
    keys = [
        (model.name, way, seed, 0 if way == EMA else arguments.images or model.images)
        for model in models.values()
        for way, seed in ways(model, arguments.seeds)
        if arguments.only in f"{model.name}: {way}"
    ]
    named = ("model", "way", "seed", "images")
    measure_missing("rows", keys, lambda model, *of: measured(models[model], *of), named=named, metrics=SHOWN)


def ways(model: Model, seeds: int) -> Iterator[tuple[str, int]]:
    """Name and seed of each search."""
    if not model.inception:
        yield EMA, 0
    for seed in range(1 if model.inception else seeds):
        ends = ("", *([] if model.inception else [", keep"]), *([] if model.bound is None else [", bound"]))
        for end in ends:
            yield from ((f"{rows}{end}", seed) for rows in ("one row", "layers"))


def measured(model: Model, way: str, seed: int, images: int) -> list[float]:
    """The metrics of :data:`SHOWN` of one answer."""
    kept: Mapping[str, Any] = {"keep": "precision", "bound": {"precision": model.bound}}
    end = way.partition(", ")[2]
    settings = {**model.settings, **({"keep": kept[end]} if end else {})}
    objective = objective_of(model.file, rows="layers" if way.startswith("layers") else None, **settings)
    if model.inception:
        real = bundled_images(model.dataset)[0][::2]
        objective.scores = MetricSuite({INCEPTION: Reference.of_images(RandomInception(), real)})
    if way == EMA:
        found = best_ema(objective)
    else:
        found = answer_of(objective, "LCSCGradient", seed, images, selected_on=model.selected)
    return metrics_of(objective.images(np.asarray(found), HELD_OUT, REPORTED), SHOWN, model.dataset)


def metrics_of(images: Tensor, names: Sequence[str], dataset: Bundled = "digits") -> list[float]:
    """The named metrics of images, to both halves in both networks' features."""
    values = MetricsOfHalves(dataset).of_images(images)
    known = dict(zip(COLUMNS, values, strict=True))
    return [known[name] for name in names]


if __name__ == "__main__":
    main()
