"""The gain of two worker processes on this machine's cores.

    python benchmarks/workers.py [--evaluations 60] [--rounds 3] [--quick]

Searches of the model of ``studies/digits.yaml`` with one worker on one core, and with two workers, each on a core of
its own. In each round both run in turns, after the workers are up. Trials per second are compared, as medians of the
rounds.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from common import machine, parse, trained, write_json

from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_spec import BudgetSpec, ObjectiveSpec, OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Evaluator, Outcome
from lcsc_opt.evaluation.pool import ProcessEvaluator, WorkerPool
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.study.loop import Loop
from lcsc_opt.study.planning import most_in_flight

LEAST_SPEEDUP = 1.7  # our own target
IMAGES = 1000


def main() -> None:
    """Measure, print, and compare with the target."""
    arguments = parse(__doc__, evaluations=60, rounds=3, small={"evaluations": 6, "rounds": 1})
    print(machine())
    rates = trials_per_second(arguments.evaluations, arguments.rounds)
    one, two = (statistics.median(of_rounds) for of_rounds in rates.values())
    print(f"two workers: {two / one:.2f} times the trials per second of one")
    if arguments.quick:
        return
    print(write_json("workers", {**vars(arguments), "trials_per_second": rates}))
    if two < LEAST_SPEEDUP * one:
        sys.exit(f"missed: two workers {LEAST_SPEEDUP} times as fast as one")


def trials_per_second(evaluations: int, rounds: int) -> dict[str, list[float]]:
    """Those of each way, in each round."""
    settings: dict[str, Any] = {"checkpoints": str(trained("digits")), "images": IMAGES, "loss": "fid"}
    spec = ObjectiveSpec(file="trained.py", settings=settings)
    load = functools.partial(load_objective, spec, BuildContext())
    steps = load().steps
    with contextlib.closing(WorkerPool(load, 2)) as pool:
        _warm_up(pool, Candidate(default_origin(steps)))
        ways: dict[str, tuple[Callable[[], Evaluator], int]] = {
            "one worker": (lambda: OneOf(pool), 1),
            "two workers": (lambda: ProcessEvaluator(pool), 2),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, (evaluator, workers) in ways.items():
                rates[way].append(round(evaluations / search(steps, evaluator(), evaluations, workers=workers), 3))
    for way, measured in rates.items():
        spread = f"{min(measured):.2f} to {max(measured):.2f}"
        print(f"{way:11s} {statistics.median(measured):6.2f} trials a second ({spread})", flush=True)
    return rates


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


def search(steps: tuple[int, ...], evaluator: Evaluator, evaluations: int, *, workers: int) -> float:
    """Seconds of a search with CMA-ES in a fresh database."""
    space = AffineSpace(steps, default_origin(steps))
    optimizer = build_optimizer(OptimizerSpec(name="CMA"), space, budget=evaluations, workers=workers, seed=0)
    with tempfile.TemporaryDirectory(dir=Path()) as folder, contextlib.closing(evaluator):
        storage = open_storage(f"sqlite:///{Path(folder) / 'workers.db'}", write=True)
        study = StoredStudy.open_or_create(storage, "workers/CMA/0", {})
        budget, width = BudgetSpec(evaluations=evaluations), most_in_flight(workers)
        with study.hold():
            running = Loop(study, Driver(lambda: optimizer, "the optimizer"), evaluator, budget=budget, in_flight=width)
            start = time.perf_counter()
            running.run()
            return time.perf_counter() - start


if __name__ == "__main__":
    main()
