"""The gain of several worker processes: two on this machine's cores, and eight simulated ones.

    python benchmarks/workers.py [--evaluations 60] [--rounds 3] [--quick]

``digits``: searches of the demo with one worker on one core; with two workers, each on a core of its own; with two
workers that share the images of each candidate; and in the searching process, which uses all cores. In each round all
run in turns, after the workers are up. Trials per second are compared, as medians of the rounds.

``simulated``: eight workers whose evaluations sleep for half a second ± 5 %, and the share of the time in which they
are busy.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, parse, trained, write_json

from lcsc_opt.base.records import SEARCH, Candidate, Cost
from lcsc_opt.base.study_spec import BudgetSpec, ObjectiveSpec, OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Evaluator, InProcessEvaluator, Outcome
from lcsc_opt.evaluation.pool import ProcessEvaluator, WorkerPool
from lcsc_opt.evaluation.spread import SpreadEvaluator
from lcsc_opt.objective.contract import CoefficientFunction, Objective
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.study.loop import Loop
from lcsc_opt.study.planning import most_in_flight

LEAST_SPEEDUP, LEAST_BUSY = 1.7, 0.95  # our own targets
IMAGES = 1000
SIMULATED, SECONDS, SPREAD = 8, 0.5, 0.05
STEPS = tuple(range(100, 2100, 100))


def main() -> None:
    """Measure, print, and compare with the targets."""
    arguments = parse(__doc__, evaluations=60, rounds=3, small={"evaluations": 6, "rounds": 1})
    print(machine())
    rates, shares = digits(arguments.evaluations, arguments.rounds)
    busy = simulated(16 if arguments.quick else 400)
    if arguments.quick:
        return
    print(write_json("workers", {**vars(arguments), "trials_per_second": rates, "arithmetic": shares, "busy": busy}))
    speedup = statistics.median(rates["two workers"]) / statistics.median(rates["one worker"])
    if speedup < LEAST_SPEEDUP or busy < LEAST_BUSY:
        sys.exit(
            f"missed: two workers {LEAST_SPEEDUP} times as fast as one, and {SIMULATED} of them {LEAST_BUSY:.0%} busy"
        )


def digits(
    evaluations: int, rounds: int, *options: str, output: str = ""
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Trials per second of each way, in each round, and the share of workers' time spent on sampling and features."""
    checkpoints = str(trained("digits", *options, output=output))
    settings: dict[str, Any] = {"checkpoints": checkpoints, "images": IMAGES, "loss": "fid"}
    load = functools.partial(load_objective, ObjectiveSpec(file="trained.py", settings=settings))
    objective = load()
    with contextlib.closing(WorkerPool(load, 2)) as pool:
        _warm_up(pool, Candidate(default_origin(objective.steps)))
        objective(default_origin(objective.steps))
        ways: dict[str, tuple[Callable[[], Evaluator], int]] = {
            "one worker": (lambda: OneOf(pool), 1),
            "two workers": (lambda: ProcessEvaluator(pool), 2),
            "two share images": (lambda: SpreadEvaluator(objective, pool), 1),
            "one process": (lambda: InProcessEvaluator(objective), 1),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        shares: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, (evaluator, workers) in ways.items():
                seconds, cost = search(objective, evaluator(), evaluations, workers=workers)
                rates[way].append(round(evaluations / seconds, 3))
                arithmetic = cost.sample_seconds + cost.features_seconds
                shares[way].append(round(arithmetic / (workers * seconds), 4))
    one = statistics.median(rates["one worker"])
    for way, measured in rates.items():
        spread = f"{min(measured):.2f} to {max(measured):.2f}"
        rate, share = statistics.median(measured), statistics.median(shares[way])
        print(
            f"digits  {way:17s} {rate:6.2f} trials a second ({spread})  {rate / one:.2f} times  sampling and features "
            f"{share:.1%} of the workers' time",
            flush=True,
        )
    return rates, shares


class OneOf:
    """The first worker of a pool, alone."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool

    def submit(self, candidate: Candidate) -> Future[Outcome]:
        """Let the worker evaluate."""
        return self._pool.submit("submit", candidate, worker=0)

    def close(self) -> None:
        """Does nothing: the pool is closed elsewhere."""


def _warm_up(pool: WorkerPool, candidate: Candidate) -> None:
    """Start the processes, and let each draw the noise that it samples from."""
    for future in [pool.submit("submit", candidate, worker=worker) for worker in range(len(pool))]:
        future.result()


def search(objective: Objective, evaluator: Evaluator, evaluations: int, *, workers: int) -> tuple[float, Cost]:
    """Seconds of a search with CMA-ES in a fresh database, and the total cost of its evaluations."""
    space = AffineSpace(objective.steps, default_origin(objective.steps))
    optimizer = build_optimizer(OptimizerSpec(name="CMA"), space, budget=evaluations, workers=workers, seed=0)
    with tempfile.TemporaryDirectory(dir=Path()) as folder, contextlib.closing(evaluator):
        storage = open_storage(f"sqlite:///{Path(folder) / 'workers.db'}", write=True)
        study = StoredStudy.open_or_create(storage, "workers/CMA/0", {})
        budget, width = BudgetSpec(evaluations=evaluations), most_in_flight(workers)
        with study.hold():
            running = Loop(study, Driver(lambda: optimizer, "the optimizer"), evaluator, budget=budget, in_flight=width)
            start = time.perf_counter()
            running.run()
            seconds = time.perf_counter() - start
        costs = [Cost(**trial.user_attrs["cost"]) for trial in study.trials()]
    return seconds, functools.reduce(operator.add, costs)


def sleeping() -> Objective:
    """An objective whose evaluation takes half a second ± 5 %, depending on the coefficients."""

    def sleep(coefficients: np.ndarray) -> float:
        seed = int(np.abs(coefficients[0]) * 1e15) % 2**32
        time.sleep(SECONDS * float(np.exp(SPREAD * np.random.default_rng(seed).standard_normal())))
        return float(np.square(coefficients).sum())

    return CoefficientFunction(sleep, STEPS, name="sleeping")


def simulated(evaluations: int) -> float:
    """The share of the time in which eight workers evaluate."""
    with contextlib.closing(WorkerPool(sleeping, SIMULATED)) as pool:
        _warm_up(pool, Candidate(default_origin(STEPS), noise=SEARCH))
        seconds, cost = search(sleeping(), ProcessEvaluator(pool), evaluations, workers=SIMULATED)
    busy = round(cost.seconds / (SIMULATED * seconds), 4)
    print(f"{SIMULATED} simulated workers: {busy:.1%} busy", flush=True)
    return busy


if __name__ == "__main__":
    main()
