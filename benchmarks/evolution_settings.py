"""Settings of Algorithm 1 that the paper does not give, on digits: varied one after the other, keeping the best.

    python benchmarks/evolution_settings.py [--seeds 3] [--evaluations 300]

First ``max_parents`` is varied around the starting point, then, with its best value, ``mutation``, and so on. The best
has the lowest held-out FID, mean over seeds. Every line is a set of studies in ``results/evolution_settings.db``: after
an interruption, the same command continues.
"""

from __future__ import annotations

import statistics
from typing import Any

from common import RESULTS, machine, parse, write_csv

from lcsc_opt.base.study_file import StudySpec, parse_studies
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.search.plan import plans
from lcsc_opt.search.study import StudyRunner

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
    print("max_parents  mutation  crossover  generation_size        searched         held-out")
    best, rows = dict(START), []
    for name, values in VARIATIONS.items():
        found = {value: run({**best, name: value}, arguments.seeds, arguments.evaluations) for value in values}
        for value, studies in found.items():
            print_line({**best, name: value}, studies)
            rows += [(*{**best, name: value}.values(), s.seed, s.searched, s.held_out_loss) for s in studies]
        best[name] = min(values, key=lambda value: mean_held_out(found[value]))
        print(f"best {name}: {best[name]}", flush=True)
    print(write_csv("evolution_settings", (*START, "seed", "searched_fid", "held_out_fid"), rows))


def run(options: dict[str, Any], seeds: int, evaluations: int) -> list[StudyHistory]:
    """The studies of one line; unfinished ones are run first."""
    storage = open_storage(f"sqlite:///{RESULTS / 'evolution_settings.db'}", write=True)
    studies = []
    for plan in plans([study(options, evaluations)], None, seeds=range(seeds)):
        StudyRunner(storage).run(plan)
        studies.append(HistoryReader(storage).read_study(plan.name))
    return studies


def study(options: dict[str, Any], evaluations: int) -> StudySpec:
    """The study file of one line."""
    settings = "p{max_parents}-m{mutation}-c{crossover}-g{generation_size}".format(**options)
    content = {
        "name": f"evolution-{settings}-e{evaluations}",
        "objective": {"file": "digits.py", "settings": {"images": 1000}},
        "optimizers": [{"LCSC": options}],
        "budget": {"evaluations": evaluations},
        "held_out": {"images": 10000, "top": 5},
    }
    return parse_studies(content, source="benchmark")[0]


def mean_held_out(studies: list[StudyHistory]) -> float:
    """The mean held-out loss, by which settings are judged."""
    return statistics.fmean(study.held_out_loss for study in studies if study.held_out_loss is not None)


def print_line(options: dict[str, Any], studies: list[StudyHistory]) -> None:
    """Print the settings, and mean and spread over seeds."""
    searched, held_out = (spread([getattr(study, name) for study in studies]) for name in ("searched", "held_out_loss"))
    line = "{max_parents:11d}  {mutation:8g}  {crossover:9g}  {generation_size:15d}".format(**options)
    print(f"{line}  {searched}  {held_out}", flush=True)


def spread(values: list[float | None]) -> str:
    """Mean and sample standard deviation."""
    known = [value for value in values if value is not None]
    deviation = statistics.stdev(known) if len(known) > 1 else float("nan")
    return f"{statistics.fmean(known):6.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
