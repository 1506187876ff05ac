"""What a trial costs beside sampling and features: merge, FID, optimizer, database, progress bar.

    python benchmarks/overhead.py [--evaluations 300]

Runs digits studies with K = 200 and K = 500 checkpoints in a fresh SQLite database in the current folder, as
``lcsc run`` does, and divides the whole wall-clock time of the search, from the first ask to the last tell.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from common import machine, write_csv

from lcsc_opt.database import open_storage
from lcsc_opt.experiment import Experiment
from lcsc_opt.plan import plans
from lcsc_opt.study_spec import parse_study
from lcsc_opt.study_store import StoredStudy

PARTS = ("merge", "sample", "features", "metric")
LIMITS = {200: 20.0, 500: 30.0}  # milliseconds a trial, asked of ourselves
CHECKPOINT_EVERY = {200: 20, 500: 8}


def main() -> None:
    """Measure and print one line for each K and optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=300)
    arguments = parser.parse_args()
    print(machine())
    print("milliseconds a trial, mean; rest = merge + metric + everything that is not in the objective")
    print("   K  optimizer   merge  sample  features  metric  optimizer+database     rest  limit")
    rows = []
    for checkpoints, limit in LIMITS.items():
        for optimizer in ("LCSC", "CMA"):
            parts, other = measure(checkpoints, optimizer, arguments.evaluations)
            rest = parts["merge"] + parts["metric"] + other
            numbers = [*(parts[part] for part in PARTS), other, rest, limit]
            rows.append((checkpoints, optimizer, *(round(number, 2) for number in numbers)))
            print(
                "{:4d}  {:9s} {:7.1f} {:7.1f}   {:7.1f} {:7.1f}             {:7.1f}  {:7.1f}  {:5.0f}".format(
                    checkpoints, optimizer, *numbers
                ),
                flush=True,
            )
    header = ("checkpoints", "optimizer", *PARTS, "optimizer_and_database", "rest", "limit")
    print(write_csv("overhead", header, rows))


def measure(checkpoints: int, optimizer: str, evaluations: int) -> tuple[dict[str, float], float]:
    """Milliseconds a trial of each part of the objective, and of everything else."""
    settings = {"images": 1000, "checkpoint_every": CHECKPOINT_EVERY[checkpoints]}
    content = {
        "name": "overhead",
        "objective": {"file": "digits.py", "settings": settings},
        "optimizers": [optimizer],
        "budget": {"evaluations": evaluations},
    }
    (plan,) = plans(parse_study(content, source="benchmark"), None)
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        storage = open_storage(f"sqlite:///{Path(folder) / 'overhead.db'}", write=True)
        experiment = Experiment(storage, plan)
        assert len(experiment.objective.steps) == checkpoints
        start = time.perf_counter()
        experiment.run(plan)
        seconds = time.perf_counter() - start
        costs = [trial.user_attrs["cost"] for trial in StoredStudy.open(storage, plan.name).trials()]
    parts = {part: 1e3 * sum(cost[f"{part}_seconds"] for cost in costs) / evaluations for part in PARTS}
    return parts, 1e3 * seconds / evaluations - sum(parts.values())


if __name__ == "__main__":
    main()
