"""``LCSCGradient`` on digits: its options around their defaults.

    python benchmarks/gradient_settings.py [--seeds 3]

A search has 20,000 or 60,000 images, including those of checks. Its recommendation after 2,000 images, 6,000 and so on
is measured on 10,000 held-out images, of a group that no setting was chosen on. Options are varied one at a time. A
seed decides the noise: all searches of one seed begin with the same noise. Every result is written to
``results/gradient_settings.csv`` at once: after an interruption, the same command continues.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import machine, parse, read_csv, write_csv
from nevergrad.optimization.base import Optimizer

from lcsc_opt.base.records import Candidate, Coefficients, Noise
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.optimizers import LCSCGradient, attach_evaluation, candidate_of, coefficient_array, request_of

FIRST_SEED = 10  # settings were chosen with smaller seeds
HELD_OUT, HELD_OUT_IMAGES = Noise("held-out", 1), 10_000  # settings were chosen on group 0
LIMITS = (2_000, 6_000, 20_000, 60_000)
PER_CHECK = 1_000
HEADER = ("row", "seed", *(f"fid_{limit}" for limit in LIMITS), "cross_check_fid", "seconds")
Result = tuple[float, ...]
"""Held-out FID at each limit, that of the cross-check at the end, seconds; NaN where there is none."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to search.

    Attributes:
        name: identifies the row.
        options: of the optimizer.
        window: candidates that are asked before the first of them is told, 1.5 for each worker.
        images: how many a search may sample.
        seeds: how many at most.
    """

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    window: int = 1
    images: int = LIMITS[2]
    seeds: int = 3


ROWS = (
    Row("default"),
    *(Row(f"images {value}", {"images": value}) for value in (50, 200, 400)),
    *(Row(f"growth {value}", {"growth": value}) for value in (0.0, 0.05)),
    *(Row(f"step_size {value}", {"step_size": value}) for value in (0.05, 0.2, 0.5)),
    *(Row(f"checks {value}", {"checks": value}) for value in (0.1, 0.4)),
    *(Row(f"{workers} workers", window=3 * workers // 2, seeds=2) for workers in (2, 8)),
    *(Row(f"to the end, growth {value}", {"growth": value}, images=LIMITS[3], seeds=2) for value in (0.02, 0.0, 0.05)),
)


def main() -> None:
    """Run what is missing, print every search, then the table."""
    arguments = parse(__doc__, seeds=3, row={"action": "append", "help": "only rows whose names begin so"})
    chosen = [row for row in ROWS if row.name.startswith(tuple(arguments.row or [""]))]
    objective = load_objective(ObjectiveSpec(file="digits.py", settings={"images": PER_CHECK}))
    known = read()
    print(machine())
    print(f"start: {measure(objective, default_origin(objective.steps))}")
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        for row in chosen:
            if (row.name, seed) not in known and seed < FIRST_SEED + row.seeds:
                known[row.name, seed] = run(objective, row, seed)
                write(known)
                print(f"seed {seed}  {row.name:28s}", *(f"{value:8.3f}" for value in known[row.name, seed]), flush=True)
    print_table(known)
    print(write(known))


def read() -> dict[tuple[str, int], Result]:
    """The results that exist already."""
    return {
        (name, int(seed)): tuple(float(value or "nan") for value in values)
        for name, seed, *values in read_csv("gradient_settings")
    }


def write(known: Mapping[tuple[str, int], Result]) -> Path:
    """Write all results."""
    rows = [(*key, *("" if math.isnan(value) else value for value in found)) for key, found in known.items()]
    return write_csv("gradient_settings", HEADER, rows)


def run(objective: Objective, row: Row, seed: int) -> Result:
    """Make one search, and measure its recommendation at each limit."""
    start = time.perf_counter()
    array = coefficient_array(AffineSpace(objective.steps, default_origin(objective.steps)), seed=seed)
    optimizer = LCSCGradient(**row.options)(array)
    optimizer.plan_budget(evaluations=None, images=row.images, images_per_evaluation=PER_CHECK)
    limits = [limit for limit in LIMITS if limit <= row.images]
    found = answers(optimizer, objective, limits, row.window)
    fids, crossed = zip(*(measure(objective, coefficients) for coefficients in found), strict=True)
    missing = [math.nan] * (len(LIMITS) - len(limits))
    return (*(round(fid, 4) for fid in fids), *missing, round(crossed[-1], 4), round(time.perf_counter() - start, 1))


def answers(optimizer: Optimizer, objective: Objective, limits: Sequence[int], window: int) -> Iterator[Coefficients]:
    """The recommendation at each limit: before the candidate that would exceed it."""
    left, waiting, spent = deque(limits), deque[Any](), 0
    while True:
        while len(waiting) < window:
            waiting.append(optimizer.ask())
        candidate = waiting.popleft()
        spent += candidate_of(candidate).images or PER_CHECK
        while spent > left[0]:
            yield optimizer.recommend().value
            left.popleft()
            if not left:
                return
        evaluation = objective.evaluate(candidate_of(candidate), gradient=request_of(candidate).gradient)
        attach_evaluation(candidate, evaluation)
        optimizer.tell(candidate, evaluation.loss)


def measure(objective: Objective, coefficients: Coefficients) -> tuple[float, float]:
    """Held-out FID, and that of the cross-check, which is NaN if the objective has none."""
    evaluation = objective.evaluate(Candidate(coefficients, images=HELD_OUT_IMAGES, noise=HELD_OUT))
    return evaluation.metrics["fid"], evaluation.metrics.get("fid@cross_check", math.nan)


def print_table(known: Mapping[tuple[str, int], Result]) -> None:
    """Print the means over seeds, and the sample standard deviation of the last FID."""
    print("\n| | seeds |", " | ".join(f"{limit:,} images" for limit in LIMITS), "| cross-check |")
    print("|---|---|" + "---|" * (len(LIMITS) + 1))
    for name in dict.fromkeys(name for name, _ in known):
        found = [result[:-1] for key, result in known.items() if key[0] == name]
        cells = [f"{statistics.fmean(values):.2f}" for values in zip(*found, strict=True)]
        if len(found) > 1:
            last = max(place for place in range(len(LIMITS)) if not math.isnan(found[0][place]))
            cells[last] += f" ± {statistics.stdev(result[last] for result in found):.2f}"
        print(f"| {name} | {len(found)} |", " | ".join(cells).replace("nan", ""), "|")


if __name__ == "__main__":
    main()
