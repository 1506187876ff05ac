"""Autoguidance on class-conditional digits: a weak model that stays as it is, and one whose coefficients are searched.

    python benchmarks/autoguidance.py [--trainings 1] [--seeds 1] [--images 3000] [--tables]

The models, the numbers of steps and the halves of the real images are those of ``guidance.py``. LCSCGradient searches a
row of coefficients for each layer: without guidance, with the weak model of step 200 (of 1,000), and with a row for the
weak model, too, that begins there. The scale of guidance is searched together with them, from 1.5. The answer of the
five best checks is chosen on 2,000 images of selection noise, and measured on 5,000 of held-out noise; no search saw
half B. ``EMA`` is where searches begin, with the weak model of step 200. Results that are already in
``results/autoguidance.csv`` are not measured again. ``--tables`` only prints what is known.
"""

from __future__ import annotations

import statistics

import numpy as np
from common import cell, markdown, measure_missing, parse, read_csv
from guidance import HIGH, METRICS, RECIPES, REPORTED, chosen, objective_of_model, searched
from rows import metrics_of

from lcsc_opt.base.records import HELD_OUT, Candidate
from lcsc_opt.coefficients.layer_groups import WEAK
from lcsc_opt.coefficients.profiles import default_origin, effective_count, sum_abs
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace
from lcsc_opt.coefficients.tuning import TunedNumber, TunedSpace

START = 200  # the step of the weak model
SCALE = 1.5  # of guidance, where searches begin
LOW = 1.0
EMA, UNGUIDED, FIXED, SEARCHED = "EMA", "no guidance", "weak model stays", "weak model searched"
WEAK_OF = {EMA: START, UNGUIDED: None, FIXED: START, SEARCHED: {"search": START}}
NAMED = ("recipe", "training", "way", "seed", "images")
COLUMNS = (*METRICS, "scale", "weak Σ|a|", "weak effective", "weak mean step")


def main() -> None:
    """Measure what is missing, and print the tables."""
    arguments = parse(
        __doc__, trainings=1, seeds=1, images=3000, tables={"action": "store_true", "help": "measure nothing"}
    )
    keys = []
    for seed in range(arguments.seeds):
        for training in range(arguments.trainings):
            for recipe in RECIPES:
                if seed == 0:
                    keys.append((recipe, training, EMA, 0, 0))
                keys += [(recipe, training, way, seed, arguments.images) for way in (FIXED, SEARCHED, UNGUIDED)]
    if arguments.tables:
        keys = []
    measure_missing("autoguidance", keys, measured, named=NAMED, metrics=COLUMNS)
    print_ratios()


def measured(recipe: str, training: int, way: str, seed: int, images: int) -> list[float]:
    """The metrics of one answer, its guidance, and what its weak model's coefficients look like."""
    guidance = 1.0 if way == UNGUIDED else SCALE
    objective = objective_of_model(
        recipe, training, rows=None if way == EMA else "layers", guidance=guidance, weak=WEAK_OF[way]
    )
    steps = np.array(objective.steps)
    origin = default_origin(objective.steps)
    answer = Candidate(origin)
    weak = (steps == START).astype(float)
    if way != EMA:
        groups = objective.layer_groups
        assert groups is not None
        space: CoefficientSpace = AffineSpace(objective.steps, groups.in_rows(origin))
        if way != UNGUIDED:
            space = TunedSpace(space, (TunedNumber("guidance", LOW, HIGH, SCALE),))
        checks, _ = searched(objective, space, seed, images, None)
        answer = chosen(objective, checks)
        if WEAK in groups.names:
            weak = answer.coefficients[-1]
    sampled = objective.images(answer.coefficients, HELD_OUT, REPORTED, tuned=answer.tuned)
    scale = answer.tuned.get("guidance", guidance)
    return [*metrics_of(sampled, METRICS), scale, sum_abs(weak), effective_count(weak), float(weak @ steps)]


def print_ratios() -> None:
    """FID B with a weak model that is searched, divided by that with the others, of the same training and seed."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for recipe, training, way, seed, images, *values in read_csv("autoguidance"):
        found[recipe, training, seed, images, way] = dict(zip(COLUMNS, map(float, values), strict=True))
    table = [["recipe", "images", "FID B, divided by that of", "pairs", "ratio", "each", "precision", "of the other"]]
    for recipe in RECIPES:
        for images in sorted({key[3] for key in found if key[3] != "0"}):
            for other in (FIXED, UNGUIDED):
                pairs = []
                for key, mine in found.items():
                    theirs = found.get((*key[:4], other))
                    if (key[0], key[3], key[4]) == (recipe, images, SEARCHED) and theirs is not None:
                        pairs.append((mine, theirs))
                if not pairs:
                    continue
                ratios = [mine["fid B"] / theirs["fid B"] for mine, theirs in pairs]
                precisions = [cell([pair[place]["precision A"] for pair in pairs]) for place in (0, 1)]
                each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
                mean = f"{statistics.geometric_mean(ratios):.3f}"
                table.append([recipe, images, other, str(len(pairs)), mean, each, *precisions])
    print(*markdown(table), sep="\n")


if __name__ == "__main__":
    main()
