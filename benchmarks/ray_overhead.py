"""The cost of a trial on a Ray cluster of this machine and on a local worker, and how busy two workers are.

    python benchmarks/ray_overhead.py [--jobs 400] [--evaluations 100] [--rounds 5] [--quick]

``overhead``: milliseconds from a candidate to its loss when the evaluation takes no time, on a local worker and on one
of Ray in turns, candidate by candidate. Also the time of a trial in a whole search with its database, on one worker,
local and Ray in turns. ``two workers``: searches with CMA-ES whose evaluations wait a tenth of a second.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import machine, parse, write_json
from workers import search

from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_file import ObjectiveSpec, RayWorkers
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.evaluation import ProcessEvaluator, WorkerPool
from lcsc_opt.evaluation.ray import ray_cluster
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective

MOST_OVERHEAD, LEAST_USE = 5.0, 0.97  # our own targets: milliseconds per trial; share of the local workers' rate
SECONDS = 0.1
MEMORY = 80 * 2**20  # bytes of each node's object store, the smallest that Ray allows
FUNCTIONS = f"""
import time


def at_once(coefficients):
    return float((coefficients**2).sum())


def slowly(coefficients):
    time.sleep({SECONDS})
    return at_once(coefficients)
"""

Times = dict[str, list[float]]
Pools = dict[str, WorkerPool]


def main() -> None:
    """Measure, print, and compare with the targets."""
    arguments = parse(__doc__, jobs=400, evaluations=100, rounds=5, small={"jobs": 10, "evaluations": 10, "rounds": 1})
    print(machine())
    with tempfile.TemporaryDirectory() as folder, node() as address:
        (Path(folder) / "overhead_functions.py").write_text(FUNCTIONS)
        with pools(Path(folder), address, "at_once", workers=1) as (objective, there):
            milliseconds = round_trips(objective, there, arguments.jobs)
            whole = searches(objective, there, arguments.evaluations, arguments.rounds)
        with pools(Path(folder), address, "slowly", workers=2) as (objective, there):
            busy = searches(objective, there, arguments.evaluations, arguments.rounds)
    local, ray = (statistics.median(milliseconds[where]) for where in ("local", "ray"))
    trials = {where: statistics.median(whole[where]) for where in whole}
    more = statistics.median(there - here for here, there in zip(whole["local"], whole["ray"], strict=True))
    use = statistics.median(busy["local"]) / statistics.median(busy["ray"])
    print(f"from candidate to loss: {local:.2f} ms local, {ray:.2f} ms on Ray: {ray - local:.2f} ms more")
    print(
        f"a trial of a whole search: {trials['local']:.1f} ms local, {trials['ray']:.1f} ms on Ray: {more:.2f} ms more"
    )
    print(f"two workers, {SECONDS:g} s an evaluation: on Ray {use:.1%} of the trials a second of local ones")
    if arguments.quick:
        return
    kept = {"overhead_milliseconds": round(ray - local, 3), "use_of_two_workers": round(use, 4), "two_workers": busy}
    medians = {"local": round(local, 3), "ray": round(ray, 3)}
    searched = {"trials_of_whole_searches": whole, "overhead_of_a_trial_milliseconds": round(more, 3)}
    print(write_json("ray_overhead", {**vars(arguments), "milliseconds": medians, **searched, **kept}))
    if max(ray - local, more) > MOST_OVERHEAD or use < LEAST_USE:
        sys.exit(f"missed: at most {MOST_OVERHEAD:g} ms a trial more, and {LEAST_USE:.0%} of the rate of local workers")


@contextlib.contextmanager
def node() -> Iterator[str]:
    """The address of a cluster whose head evaluates nothing, with a node of two CPUs."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=2, object_store_memory=MEMORY)
        yield str(cluster.address)
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def pools(folder: Path, address: str, function: str, *, workers: int) -> Iterator[tuple[Objective, Pools]]:
    """Local workers and workers of the cluster, after both have loaded the objective."""
    settings: Any = {"callable": f"overhead_functions:{function}", "steps": list(range(100, 1300, 100))}
    spec = ObjectiveSpec(file="function.py", settings=settings)
    load = functools.partial(load_objective, spec, beside=folder)
    objective = load()
    with (
        ray_cluster(RayWorkers(ray=workers, address=address), spec, objective, study=folder) as cluster,
        contextlib.closing(WorkerPool(load, workers)) as local,
        contextlib.closing(cluster.pool()) as ray,
    ):
        for pool in (local, ray):
            while pool.alive < len(pool):
                pool.submit("submit", Candidate(default_origin(objective.steps))).result()
        yield objective, {"local": local, "ray": ray}


def round_trips(objective: Objective, there: Pools, jobs: int) -> Times:
    """Milliseconds from each candidate to its loss."""
    candidate, times = Candidate(default_origin(objective.steps)), {where: list[float]() for where in there}
    for _ in range(jobs):
        for where, pool in there.items():
            start = time.perf_counter()
            pool.submit("submit", candidate).result()
            times[where].append(round(1000 * (time.perf_counter() - start), 3))
    return times


def searches(objective: Objective, there: Pools, evaluations: int, rounds: int) -> Times:
    """Milliseconds per trial of each search."""
    times = {where: list[float]() for where in there}
    for _ in range(rounds):
        for where, pool in there.items():
            took, _ = search(objective, ProcessEvaluator(pool), evaluations, workers=2)
            times[where].append(round(1000 * took / evaluations, 3))
    return times


if __name__ == "__main__":
    main()
