"""Settings of Algorithm 1 that the paper does not give, on digits: varied one after the other, keeping the best.

    python benchmarks/evolution_settings.py [--seeds 3] [--evaluations 300]

First ``max_parents`` is varied around the starting point, then, with its best value, ``mutation``, and so on. The best
has the lowest held-out FID, mean over seeds. Every line is a set of studies in ``results/evolution_settings.db``: after
an interruption, the same command continues.
"""

from __future__ import annotations

import statistics
from typing import Any

from common import RESULTS, cell, machine, parse, write_csv

from lcsc_opt.base.study_file import StudySpec, parse_studies
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.search.execution import Executor
from lcsc_opt.search.plan import plans

START = {"max_parents": 10, "mutation": 0.005, "crossover": 0.5, "generation_size": 10}
VARIATIONS: dict[str, tuple[Any, ...]] = {
    "max_parents": (2, 3, 5, 10, 20, 40),
    "mutation": (0.0025, 0.0035, 0.005, 0.007, 0.01, 0.014, 0.02),
    "crossover": (0.0, 0.25, 0.5, 0.75, 1.0),
    "generation_size": (1, 5, 10, 20, 50),
}


def main() -> None:
    """Run what is missing, print the table, write the CSV."""
    arguments = parse(__doc__, seeds=3, evaluations=300)
    RESULTS.mkdir(exist_ok=True)
    print(machine())
    print(f"{arguments.evaluations} evaluations of 1,000 images, held out on 10,000, {arguments.seeds} seeds")
    print(*START, "searched", "held-out", sep="  ")
    best, rows = dict(START), []
    for name, values in VARIATIONS.items():
        found = {value: run({**best, name: value}, arguments.seeds, arguments.evaluations) for value in values}
        for value, studies in found.items():
            losses = ([getattr(study, loss) for study in studies] for loss in ("searched", "held_out_loss"))
            print(*({**best, name: value}.values()), *map(cell, losses), sep="  ", flush=True)
            rows += [(*{**best, name: value}.values(), s.seed, s.searched, s.held_out_loss) for s in studies]
        best[name] = min(values, key=lambda value: statistics.fmean(s.held_out_loss or 0 for s in found[value]))
        print(f"best {name}: {best[name]}", flush=True)
    print(write_csv("evolution_settings", (*START, "seed", "searched_fid", "held_out_fid"), rows))


def run(options: dict[str, Any], seeds: int, evaluations: int) -> list[StudyHistory]:
    """The studies of one line; unfinished ones are run first."""
    storage = open_storage(f"sqlite:///{RESULTS / 'evolution_settings.db'}", write=True)
    studies = []
    for plan in plans([study(options, evaluations)], None, seeds=range(seeds)):
        Executor(storage).run(plan)
        studies.append(HistoryReader(storage).read_study(plan.name))
    return studies


def study(options: dict[str, Any], evaluations: int) -> StudySpec:
    """The study file of one line."""
    settings = "p{max_parents}-m{mutation}-c{crossover}-g{generation_size}".format(**options)
    content = {
        "name": f"evolution-{settings}-e{evaluations}",
        "objective": {"file": "digits.py", "settings": {"images": 1000, "loss": "fid"}},
        "optimizers": [{"LCSC": options}],
        "budget": {"evaluations": evaluations},
        "held_out": {"images": 10000, "top": 5},
    }
    return parse_studies(content, source="benchmark")[0]


if __name__ == "__main__":
    main()
