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
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from common import measure_missing, parse
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
    arguments = parse(
        __doc__,
        seeds=3,
        row={"action": "append", "help": "only rows whose names begin so"},
    )
    chosen = {row.name: row for row in ROWS if row.name.startswith(tuple(arguments.row or [""]))}
    objective = load_objective(ObjectiveSpec(file="digits.py", settings={"images": PER_CHECK, "loss": "fid"}))
    print(f"start: {measure(objective, default_origin(objective.steps))}")
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    keys = [(row.name, seed) for seed in seeds for row in chosen.values() if seed < FIRST_SEED + row.seeds]
    named: dict[str, Any] = {
        "named": ("row", "seed"), "metrics": (*(f"fid_{limit}" for limit in LIMITS), "cross_check_fid", "seconds")
    }  # fmt: skip
    measure_missing("gradient_settings", keys, lambda name, seed: run(objective, chosen[name], seed), **named)


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


if __name__ == "__main__":
    main()
