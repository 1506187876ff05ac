"""What a trial costs on a Ray cluster of this machine beside a local worker, and how busy two workers are.

    python benchmarks/ray_overhead.py [--evaluations 200] [--rounds 3] [--quick]

``overhead``: searches with CMA-ES whose evaluations take no time, with one worker, in turns: milliseconds a trial.
``two workers``: evaluations that wait a tenth of a second, two at a time: trials a second.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
from pathlib import Path

from common import machine, write_json
from ray_nodes import OBJECTIVE, nodes, study_file
from workers import OneOf, search

from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_file import ObjectiveSpec, RayWorkers
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.evaluation import ProcessEvaluator, WorkerPool
from lcsc_opt.evaluation.ray import ray_cluster
from lcsc_opt.objective.loading import load_objective

MOST_OVERHEAD, LEAST_USE = 5.0, 0.97  # milliseconds a trial; of local workers' rate
SECONDS = 0.1

Rates = dict[str, list[float]]


def main() -> None:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="10 evaluations, one round, nothing written, no verdict")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.evaluations, arguments.rounds = 10, 1
    print(machine())
    with tempfile.TemporaryDirectory() as folder, nodes(2) as cluster:
        milliseconds = measure(Path(folder), cluster.address, 0.0, arguments.evaluations, arguments.rounds)
        busy = measure(Path(folder), cluster.address, SECONDS, arguments.evaluations, arguments.rounds)
    local, ray = (statistics.median(milliseconds[where]) for where in ("local", "ray"))
    use = statistics.median(busy["local"]) / statistics.median(busy["ray"])
    print(f"a trial with one worker: {local:.2f} ms local, {ray:.2f} ms on Ray: {ray - local:.2f} ms more")
    print(f"two workers, {SECONDS:g} s an evaluation: on Ray {use:.1%} of the trials a second of local ones")
    if arguments.quick:
        return
    print(write_json("ray_overhead", {**vars(arguments), "milliseconds": milliseconds, "two_workers": busy}))
    if ray - local > MOST_OVERHEAD or use < LEAST_USE:
        sys.exit(f"missed: at most {MOST_OVERHEAD:g} ms a trial more, and {LEAST_USE:.0%} of the rate of local workers")


def measure(folder: Path, address: str, seconds: float, evaluations: int, rounds: int) -> Rates:
    """Milliseconds a trial: of one worker where evaluations take no time, else of two."""
    study_file(folder)
    spec = ObjectiveSpec(file=OBJECTIVE, settings={"seconds": seconds})
    load = functools.partial(load_objective, spec, beside=folder)
    objective, workers = load(), 2 if seconds else 1
    wanted = RayWorkers(ray=2, address=address)
    rates: Rates = {"local": [], "ray": []}
    with (
        ray_cluster(wanted, spec, objective, study=folder) as cluster,
        contextlib.closing(WorkerPool(load, 2)) as local,
        contextlib.closing(cluster.pool()) as ray,
    ):
        for pool in (local, ray):
            _warm_up(pool, Candidate(default_origin(objective.steps)))
        for _ in range(rounds):
            for where, pool in (("local", local), ("ray", ray)):
                evaluator = ProcessEvaluator(pool) if seconds else OneOf(pool)
                took, _ = search(objective, evaluator, evaluations, workers=workers)
                rates[where].append(round(1000 * took / evaluations, 3))
    return rates


def _warm_up(pool: WorkerPool, candidate: Candidate) -> None:
    """Until all of them answer."""
    while pool.alive < len(pool):
        pool.submit("submit", candidate).result()


if __name__ == "__main__":
    main()
