"""Where the score is no FID: a classifier and a language model, and all ways to combine their checkpoints.

    python benchmarks/any_weights.py [--seeds 5] [--evaluations 100] [--only WORD]

Each seed is a training of its own of ``studies/any_weights`` (about two minutes), with a search by every optimizer on
it. Grids end when they are through. Answers are chosen on other data than they were searched on,
and reported on data that decided nothing. Results that are already in ``results/any_weights.csv`` are not measured
again; trainings and studies are kept in ``results/any_weights/``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, markdown, measure_missing, parse, read_csv

import lcsc_opt
from lcsc_opt.base.records import HELD_OUT, Candidate
from lcsc_opt.base.settings import parse_yaml

EXAMPLES = Path(__file__).parents[1] / "studies/any_weights"
KEPT = RESULTS / "any_weights"
LAST, LAYERS = "last checkpoint", "LCSCGradient, layers"
OPTIMIZERS = ("EMAGrid", "LCSC", "CMA", "LCSCQuadratic", "LCSCGradient")
SECOND = {"characters": "accuracy", "text": "perplexity"}


def main() -> None:
    """Measure what is missing, and print the table."""
    only = {"default": "", "help": "only examples whose name contains this"}
    arguments = parse(__doc__, seeds=5, evaluations=100, only=only)
    examples = [name for name in SECOND if arguments.only in name]
    keys = [
        (example, way, seed, 0 if way == LAST else arguments.evaluations)
        for seed in range(arguments.seeds)
        for example in examples
        for way in (LAST, *OPTIMIZERS, LAYERS)
    ]
    named = ("example", "way", "seed", "budget")
    measure_missing("any_weights", keys, measured, named=named, metrics=("cross-entropy", "second", "evaluations"))
    against_ema()


def against_ema() -> None:
    """Print how much lower the cross-entropy is than EMA*'s of the same training."""
    found = {(example, way, seed): float(value) for example, way, seed, _, value, *_ in read_csv("any_weights")}
    table = [["example", "way", "EMA*'s cross-entropy minus its own: mean over trainings, range"]]
    for example, way in dict.fromkeys(key[:2] for key in found):
        of = [(known, found[example, "EMAGrid", key[2]]) for key, known in found.items() if key[:2] == (example, way)]
        gains = [ema - own for own, ema in of]
        table.append([example, way, f"{statistics.fmean(gains):+.4f} ({min(gains):+.4f} to {max(gains):+.4f})"])
    print(*markdown(table), sep="\n")


def measured(example: str, way: str, seed: int, budget: int) -> tuple[float, float, float]:
    """Held-out cross-entropy, accuracy or perplexity, and how many evaluations the search took."""
    specification = specification(example, seed)
    checkpoints = Path(specification["objective"]["settings"]["checkpoints"])
    if not checkpoints.exists():
        script = [sys.executable, str(EXAMPLES / f"{example}.py"), "--folder", str(checkpoints), "--seed", str(seed)]
        subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
    if way == LAST:
        objective = lcsc_opt.load_objective(specification)
        coefficients, evaluations = np.eye(len(objective.steps))[-1], 0
    else:
        optimizer = way.partition(",")[0]
        specification |= {"budget": {"evaluations": budget}} | ({"space": {"rows": "layers"}} if way == LAYERS else {})
        specification["name"] += "-layers" * (way == LAYERS)
        (study,) = lcsc_opt.run(specification, optimizers=[optimizer], seeds=[seed])
        objective, coefficients, evaluations = study.objective, study.coefficients, len(study.trials)
    size = specification["held_out"]["images"]
    metrics = objective.evaluate(Candidate(coefficients, images=size, noise=HELD_OUT)).metrics
    return metrics["cross-entropy"], metrics[SECOND[example]], evaluations


def specification(example: str, seed: int) -> dict[str, Any]:
    """The example's study file, for the training with this seed."""
    specification: dict[str, Any] = parse_yaml((EXAMPLES / f"{example}.yaml").read_text())
    folder = KEPT / f"{example}-{seed}"
    settings = specification["objective"]["settings"]
    settings["checkpoints"] = str(folder)
    settings["model"] = settings["model"].replace(f"runs/{example}", str(folder))
    return specification | {"name": f"{example}-{seed}", "storage": f"sqlite:///{KEPT / 'studies.db'}"}


if __name__ == "__main__":
    KEPT.mkdir(parents=True, exist_ok=True)
    os.chdir(EXAMPLES)  # where the objective's functions are looked for
    main()
