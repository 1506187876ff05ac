"""The cost of a gradient: an evaluation with it against a plain evaluation of as many images, and its memory.

    python benchmarks/gradient.py [--pairs 15]

Seconds: digits with K = 200 checkpoints, sampled in one step, and ``digits_ddpm``, sampled in ten. Plain evaluations
and gradients take turns, and the ratio is the median over the pairs. In theory a backward pass costs two forward
passes, so one batch in one step costs 3. Every further batch is sampled once more (4). Of several steps, all but the
last are computed once more.

Memory: the growth of a fresh process's largest resident size (as Linux reports it) in the first evaluation, for growing
numbers of images and steps, in batches of 500. It includes free memory that malloc keeps between the few images that
stay. So with more steps it grows by more than the peak of allocated memory, which torch's profiler finds.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine, parse, write_csv

from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_file import ObjectiveSpec
from lcsc_opt.coefficients.profiles import ema_coefficients
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective

PARTS = ("merge", "sample", "features", "metric")
CASES: Sequence[tuple[str, dict[str, Any]]] = (
    ("digits.py", {"images": 200}),
    ("digits.py", {"images": 500}),
    ("digits.py", {"images": 1000}),
    ("digits.py", {"images": 5000}),
    ("digits_ddpm.py", {"images": 200}),
    ("digits_ddpm.py", {"images": 1000}),
)
GROWING: Sequence[tuple[str, dict[str, Any]]] = (
    *(("digits.py", {"images": images}) for images in (500, 1000, 2000, 8000)),
    *(("digits_ddpm.py", {"images": images}) for images in (500, 1000, 2000)),
    *(("digits_ddpm.py", {"images": 500, "nfe": steps}) for steps in (5, 20)),
)
LIMIT = 4.0  # times a plain evaluation, for a gradient on digits


def main() -> None:
    """Measure and print a line for each case."""
    arguments = parse(__doc__, pairs=15)
    print(machine())
    print(f"milliseconds, median of {arguments.pairs}; ratio: median over pairs, asked of digits: at most {LIMIT:g}")
    rows: list[tuple[Any, ...]] = []
    for file, settings in CASES:
        objective, candidate = build(file, settings)
        nfe = objective.evaluate(candidate).cost.model_calls // settings["images"]
        plain, gradient, ratio, parts = compare(objective, candidate, arguments.pairs)
        split = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in parts.items())
        row = (file, settings["images"], nfe, round(1e3 * plain, 1), round(1e3 * gradient, 1), round(ratio, 2), "", "")
        print(*row[:6], split, flush=True)
        rows.append(row)
    print("MB that the largest resident size grows by: plain, gradient")
    for file, settings in GROWING:
        nfe = settings.get("nfe", 10 if "ddpm" in file else 1)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
            plain_mb, gradient_mb = (fresh.apply(growth, (file, settings, wanted)) / 1e6 for wanted in (False, True))
        rows.append((file, settings["images"], nfe, "", "", "", round(plain_mb), round(gradient_mb)))
        print(*rows[-1], flush=True)
    header = ("objective", "images", "nfe", "plain_ms", "gradient_ms", "ratio", "plain_mb", "gradient_mb")
    print(write_csv("gradient", header, rows))


def build(file: str, settings: dict[str, Any]) -> tuple[Objective, Candidate]:
    """The objective, and an EMA to evaluate."""
    objective = load_objective(ObjectiveSpec(file=file, settings={"loss": "fid", **settings}))
    return objective, Candidate(ema_coefficients(objective.steps, 0.99))


def compare(objective: Objective, candidate: Candidate, pairs: int) -> tuple[float, float, float, dict[str, float]]:
    """Median seconds of a plain evaluation and of a gradient, their ratio, and the parts of the gradient."""
    times: dict[bool, list[float]] = {False: [], True: []}
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for pair in range(pairs + 1):
        for wanted in (False, True):
            start = time.perf_counter()
            cost = objective.evaluate(candidate, gradient=wanted).cost
            seconds = time.perf_counter() - start
            if pair == 0:  # the first of each warms up
                continue
            times[wanted].append(seconds)
            if wanted:
                for part in PARTS:
                    parts[part].append(getattr(cost, f"{part}_seconds"))
    ratio = statistics.median(g / p for p, g in zip(times[False], times[True], strict=True))
    middle = {part: statistics.median(seconds) for part, seconds in parts.items()}
    return statistics.median(times[False]), statistics.median(times[True]), ratio, middle


def growth(file: str, settings: dict[str, Any], gradient: bool) -> int:
    """How many bytes the largest resident size grows by in one evaluation, after a small one."""
    objective, candidate = build(file, settings)
    objective.evaluate(Candidate(candidate.coefficients, images=70), gradient=gradient)
    process = Path("/proc/self")
    process.joinpath("clear_refs").write_text("5")  # the largest size so far becomes the present one

    def resident(entry: str) -> int:
        lines = process.joinpath("status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(entry)) * 1024

    before = resident("VmRSS")
    objective.evaluate(candidate, gradient=gradient)
    return resident("VmHWM") - before


if __name__ == "__main__":
    main()
