"""Algorithm 1's settings that the paper does not give: one at a time around the defaults, on digits.

    python benchmarks/evolution_settings.py [--seeds 3] [--evaluations 300]

Every line is a set of studies in ``results/evolution_settings.db``: interrupted, the same command continues. The
winner is judged by held-out FID, mean over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from common import RESULTS, machine, write_csv

from lcsc_opt.analysis.comparison import summarize
from lcsc_opt.experiment import Experiment, plans
from lcsc_opt.optimizers import LCSC
from lcsc_opt.study_spec import parse_study
from lcsc_opt.study_store import StoredStudy, open_storage

VARIATIONS: dict[str, tuple[Any, ...]] = {
    "max_parents": (3, 5, 20, 40),
    "mutation": (0.0025, 0.0035, 0.007, 0.01, 0.02),
    "crossover": (0.0, 0.25, 0.75, 1.0),
    "generation_size": (1, 5, 20, 50),
}
CENTER = {"max_parents": 10, "mutation": 0.005, "crossover": 0.5, "generation_size": 10}


def main() -> None:
    """Run what is missing, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=300)
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    storage = open_storage(f"sqlite:///{RESULTS / 'evolution_settings.db'}", write=True)
    defaults = LCSC().config()
    print(machine())
    print(f"defaults: {', '.join(f'{name} {defaults[name]}' for name in VARIATIONS)}")
    print("setting            searched         held-out")
    rows: list[tuple[Any, ...]] = []
    experiment: Experiment | None = None
    for name, options in settings():
        found = []
        for plan in plans(study(name, options, arguments.evaluations), None, seeds=range(arguments.seeds)):
            experiment = experiment or Experiment(storage, plan)
            experiment.run(plan)
            summary = summarize(StoredStudy.open(storage, plan.name))
            found.append((summary.searched, summary.held_out))
            rows.append((name, *options.values(), plan.seed, summary.searched, summary.held_out))
        print(f"{name:20s}{spread([pair[0] for pair in found])}   {spread([pair[1] for pair in found])}", flush=True)
    header = ("setting", *VARIATIONS, "seed", "searched_fid", "held_out_fid")
    print(write_csv("evolution_settings", header, rows))


def settings() -> list[tuple[str, dict[str, Any]]]:
    """Name and options of every line: the center, then one setting changed at a time."""
    changed = [(f"{key}={value}", {**CENTER, key: value}) for key, values in VARIATIONS.items() for value in values]
    return [("center", dict(CENTER)), *changed]


def study(name: str, options: dict[str, Any], evaluations: int) -> Any:
    """The study file of one line."""
    content = {
        "name": f"evolution-{name.replace('=', '-')}-{evaluations}",
        "objective": {"file": "digits.py", "settings": {"images": 1000}},
        "optimizers": [{"LCSC": options}],
        "budget": {"evaluations": evaluations},
        "held_out": {"images": 10000, "top": 5},
    }
    return parse_study(content, source="benchmark")


def spread(values: list[float | None]) -> str:
    """Mean and sample standard deviation."""
    known = [value for value in values if value is not None]
    deviation = statistics.stdev(known) if len(known) > 1 else float("nan")
    return f"{statistics.fmean(known):6.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
