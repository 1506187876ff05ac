"""``LCSCGradient`` on digits: its options around their defaults, one at a time.

    python benchmarks/gradient_settings.py [--seeds 3]

A search has 20,000 or 60,000 images, including those of checks. Its recommendation after 2,000 images, 6,000 and so on
is measured on 10,000 held-out images, of a group that no setting was chosen on. A seed decides the noise: all searches
of one seed begin with the same noise. Every result is written to ``results/gradient_settings.csv`` at once: after an
interruption, the same command continues. Rows with 1,024 or 2,048 features are searched and measured in the features
of another network. ``--row NAME`` runs only the rows whose names begin so.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import RESULTS, machine, write_csv
from nevergrad.optimization.base import Optimizer

from lcsc_opt.base.records import Candidate, Coefficients, Noise
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.metrics import Reference, Scores
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.optimizers.gradient import LCSCGradient
from lcsc_opt.optimizers.parametrization import coefficient_array
from lcsc_opt.optimizers.requests import attach_evaluation, candidate_of, request_of
from lcsc_opt.training.images import bundled_images, feature_network

FIRST_SEED = 10  # settings were chosen with smaller seeds
HELD_OUT, HELD_OUT_IMAGES = Noise("held-out", 1), 10_000  # settings were chosen on group 0
LIMITS = (2_000, 6_000, 20_000, 60_000)
PER_CHECK = 1_000
HEADER = ("row", "seed", *(f"fid_{limit}" for limit in LIMITS), "cross_check_fid", "seconds")
Array = npt.NDArray[np.float64]
Result = tuple[float, ...]
"""Held-out FID at each limit, that of the cross-check at the end, seconds; NaN where there is none."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to search. Everything else is as in ``LCSCGradient``.

    Attributes:
        name: identifies the row.
        options: of the optimizer.
        features: how many features that network has.
        window: candidates that are asked before the first of them is told, 1.5 for each worker.
        images: how many a search may sample.
        seeds: how many at most.
    """

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    features: int = 64
    window: int = 1
    images: int = LIMITS[2]
    seeds: int = 3


def rescored(objective: MergeSampleScore, scores: Scores) -> MergeSampleScore:
    """The same model and sampler with other scores."""
    return MergeSampleScore(objective.trajectory, objective.sampler, scores, images=PER_CHECK)


ROWS = (
    Row("default"),
    *(Row(f"images {value}", {"images": value}) for value in (50, 200, 400)),
    *(Row(f"growth {value}", {"growth": value}) for value in (0.0, 0.05)),
    *(Row(f"step_size {value}", {"step_size": value}) for value in (0.05, 0.2, 0.5)),
    *(Row(f"checks {value}", {"checks": value}) for value in (0.1, 0.4)),
    *(Row(f"{workers} workers", window=3 * workers // 2, seeds=2) for workers in (2, 8)),
    *(Row(f"1,024 features, images {n}", {"images": n}, features=1024, seeds=1) for n in (50, 100, 200, 400)),
    *(Row(f"2,048 features, images {n}", {"images": n}, features=2048, seeds=2) for n in (100, 200, 400)),
    *(Row(f"to the end, growth {value}", {"growth": value}, images=LIMITS[3], seeds=2) for value in (0.02, 0.0, 0.05)),
)
NAMES = [row.name for row in ROWS]


def main() -> None:
    """Run what is missing, print every search, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--row", action="append", help="only rows whose names begin so")
    arguments = parser.parse_args()
    chosen = [row for row in ROWS if row.name.startswith(tuple(arguments.row or [""]))]
    plain = load_objective(ObjectiveSpec(file="digits.py", settings={"images": PER_CHECK}))
    assert isinstance(plain, MergeSampleScore)
    known = read()
    print(machine())
    print(f"start: {measure(plain, default_origin(plain.steps))}")
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        for row in chosen:
            if (row.name, seed) not in known and seed < FIRST_SEED + row.seeds:
                known[row.name, seed] = run(plain, row, seed)
                write(known)
                print(f"seed {seed}  {row.name:28s}", *(f"{value:8.3f}" for value in known[row.name, seed]), flush=True)
    print_table(known)
    print(write(known))


def read() -> dict[tuple[str, int], Result]:
    """The results that exist already. A row that was renamed is measured again."""
    path = RESULTS / "gradient_settings.csv"
    if not path.exists():
        return {}
    with path.open() as file:
        rows = list(csv.reader(line for line in file if not line.startswith("#")))[1:]
    return {
        (name, int(seed)): tuple(float(value or "nan") for value in values)
        for name, seed, *values in rows
        if name in NAMES
    }


def write(known: Mapping[tuple[str, int], Result]) -> Path:
    """Write all results, in the order of the rows."""
    keys = sorted(known, key=lambda key: (NAMES.index(key[0]), key[1]))
    rows = [(*key, *("" if value != value else value for value in known[key])) for key in keys]
    return write_csv("gradient_settings", HEADER, rows)


def run(plain: MergeSampleScore, row: Row, seed: int) -> Result:
    """Make one search, and measure its recommendation at each limit."""
    start = time.perf_counter()
    reference = reference_of_digits(row.features)
    measured = plain if row.features == Row.features else rescored(plain, Scores({"inception": reference}))
    array = coefficient_array(AffineSpace(plain.steps, default_origin(plain.steps)), seed=seed)
    optimizer = LCSCGradient(**row.options)(array)
    optimizer.plan_budget(evaluations=None, images=row.images, images_per_evaluation=PER_CHECK)
    limits = [limit for limit in LIMITS if limit <= row.images]
    found = list(answers(optimizer, rescored(plain, Scores({"inception": reference})), limits, row.window))
    fids, seconds = zip(*(measure(measured, coefficients) for coefficients in found), strict=True)
    missing = [math.nan] * (len(LIMITS) - len(limits))
    return (*(round(fid, 4) for fid in fids), *missing, round(seconds[-1], 4), round(time.perf_counter() - start, 1))


def answers(optimizer: Optimizer, objective: MergeSampleScore, limits: Sequence[int], window: int) -> Iterator[Array]:
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


@functools.cache
def reference_of_digits(dimension: int) -> Reference:
    """The network that digits are searched in (64 features), or another one, with the features of the real images."""
    extractor = feature_network("digits", dimension=dimension)
    return Reference.of_images(extractor, bundled_images("digits")[0])


def measure(objective: MergeSampleScore, coefficients: Coefficients) -> tuple[float, float]:
    """Held-out FID, and that of the cross-check, which is NaN if the objective has none."""
    evaluation = objective.evaluate(Candidate(coefficients, images=HELD_OUT_IMAGES, noise=HELD_OUT))
    return evaluation.metrics["fid"], evaluation.metrics.get("fid@cross_check", math.nan)


def print_table(known: Mapping[tuple[str, int], Result]) -> None:
    """Print the means over seeds, and the sample standard deviation of the last FID, as in docs/gradient.md."""
    print("\n| | seeds |", " | ".join(f"{limit:,} images" for limit in LIMITS), "| cross-check |")
    print("|---|---|" + "---|" * (len(LIMITS) + 1))
    for name in NAMES:
        found = [result[:-1] for key, result in known.items() if key[0] == name]
        cells = [f"{statistics.fmean(values):.2f}" for values in zip(*found, strict=True)]
        if len(found) > 1:
            last = max(place for place in range(len(LIMITS)) if found[0][place] == found[0][place])
            cells[last] += f" ± {statistics.stdev(result[last] for result in found):.2f}"
        if found:
            print(f"| {name} | {len(found)} |", " | ".join(cells).replace("nan", ""), "|")


if __name__ == "__main__":
    main()
