"""Extra-Merge on letters and digits: the grid ``extrapolated`` against the plain averages of ``EMAGrid``.

    python benchmarks/extra_merge.py [--seeds 3] [--way WORD]

The letters are the 16 checkpoints that come with the demo, and a seed is another group of all noise. The digits are
consistency models with 50 checkpoints, and a seed is another training. Grids evaluate all their points on 1,000 images,
LCSCQuadratic as many as that one. The answer is chosen on other noise, and FID is reported on 5,000 images of
held-out noise, with its 95 % interval. Results that are already in ``results/extra_merge.csv`` are not measured again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, measure_missing, parse

import lcsc_opt
from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.report import HeldOutReport
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.optimizers import ProfileGrid

WAYS = ("EMAGrid", "Grid", "LCSCQuadratic")
LETTERS = "letters"
DIGITS = "digits"
STEPS = {LETTERS: tuple(range(1, 17)), DIGITS: tuple(range(40, 2001, 40))}
STUDY = Path(__file__).parents[1] / "studies/demo.yaml"


def main() -> None:
    """Measure what is missing, and print the table."""
    word = {"default": "", "help": "only ways whose name contains this"}
    arguments = parse(__doc__, seeds=3, way=word)
    keys = []
    for model in STEPS:
        for seed in range(arguments.seeds):
            keys += [(model, way, seed) for way in WAYS if arguments.way in way]
    measured_metrics = ("fid", "low", "high", "evaluations", "window", "extrapolation")
    measure_missing("extra_merge", keys, measured, named=("model", "way", "seed"), metrics=measured_metrics)


def objective_of(model: str, seed: int) -> dict[str, Any]:
    """The objective of one seed, as in a study file."""
    common = {"images": 1000, "loss": "fid", "held_out_metrics": []}
    if model == DIGITS:
        settings = {"training_steps": 2000, "checkpoint_every": 10, "select": {"interval": 40}, "training_seed": seed}
        return {"file": "digits.py", "settings": settings | common}
    demo: dict[str, Any] = parse_yaml(STUDY.read_text())["objective"]
    settings = {**demo["settings"], "noise_seed": seed, **common}
    settings.pop("keep", None)
    return {"file": demo["file"], "settings": settings}


def measured(model: str, way: str, seed: int) -> tuple[float, ...]:
    """Held-out FID, its interval, evaluations; of Extra-Merge the window and the extrapolation, else zero."""
    points = len(ProfileGrid("extrapolated").points(STEPS[model]))
    specification = {
        "name": f"extra-merge-{model}-{seed}",
        "objective": objective_of(model, seed),
        "space": "affine",
        "optimizers": ["EMAGrid", {"Grid": {"profile": "extrapolated"}}, "LCSCQuadratic"],
        "budget": {"evaluations": points},
        "held_out": {"images": 5000, "top": 5},
        "storage": f"sqlite:///{RESULTS / 'extra_merge.db'}",
    }
    (study,) = lcsc_opt.run(specification, optimizers=[way], seeds=[0])
    stored = StoredStudy.open(open_storage(study.storage, write=False), study.name)
    report = HeldOutReport.from_json(stored.attributes.get("held_out"))
    if report is None or report.rows[0].interval is None:
        raise RuntimeError(f"{study.name} has no report with an interval")
    low, high = report.rows[0].interval
    window = 0.0
    extrapolation = 0.0
    if way == "Grid":
        coefficients = np.array(study.coefficients)
        window = int((coefficients > 1e-9).sum())
        extrapolation = abs(coefficients[coefficients < -1e-9].sum())
    return report.loss, low, high, len(study.trials), window, extrapolation


if __name__ == "__main__":
    main()
