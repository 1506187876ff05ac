"""The cost of a trial in the database, against simpler ways with Optuna.

    python benchmarks/store.py [--checkpoints 50 200 500] [--rounds 40] [--postgresql URL] [--quick]

A trial is a candidate of K coefficients that is safe before it is evaluated, and a result (loss, metrics, cost) that is
safe before the optimizer is told. In each round every way stores one trial, in turns, each in a database of its own:

* ``ours``: as ``lcsc run`` does, under the study's lock;
* ``attributes``: Optuna's ask, ``set_user_attr`` for the coefficients and for each part of the result, and tell;
* ``parameters``: Optuna's ask, ``suggest_float`` for each coefficient, and tell; no metrics, no cost.

The SQLite file is in the current folder. ``--postgresql postgresql://user@host/postgres`` also measures a server, on
which it makes databases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from common import machine, parse, write_json

from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy

WAYS = ("ours", "attributes", "parameters")
FEW = 3  # rounds of the slowest way
RESULT = Evaluation(
    12.345678901234567,
    {"fid": 12.345678901234567, "kid": 0.0123456789, "fid@clip": 1.23456789},
    Cost(1000, 1000, 0.123456, 0.0123, 0.0234, 0.0345, 0.0045),
)

Store = Callable[[np.ndarray], object]


def main() -> None:
    """Measure and print a line for each database and K."""
    checkpoints = {"type": int, "nargs": "+", "default": [50, 200, 500]}
    postgresql = {"help": "the URL of a database of a server, as one who may make others"}
    small = {"checkpoints": [50], "rounds": 5}
    arguments = parse(__doc__, checkpoints=checkpoints, rounds=40, postgresql=postgresql, small=small)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(machine())
    print("milliseconds a trial, median [quartiles]; in brackets, how many times ours")
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        kinds: dict[str, Callable[[str], str]] = {"sqlite": lambda name: f"sqlite:///{Path(folder) / name}.db"}
        if arguments.postgresql:
            kinds["postgresql"] = functools.partial(new_database, arguments.postgresql)
        rows = [
            measure(kind, count, url, arguments.rounds)
            for kind, url in kinds.items()
            for count in arguments.checkpoints
        ]
    if not arguments.quick:
        print(write_json("store", {"unit": "milliseconds a trial", "rows": rows}))


def new_database(server: str, name: str) -> str:
    """The URL of an empty database."""
    import psycopg

    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"{server.rpartition('/')[0]}/{name}"


def measure(kind: str, count: int, url: Callable[[str], str], rounds: int) -> dict[str, Any]:
    """One row of the results."""
    generator = np.random.default_rng(count)
    with contextlib.ExitStack() as opened:
        ways: dict[str, Store] = {
            "ours": opened.enter_context(ours(url(f"ours-{count}"))),
            "attributes": attributes(url(f"attributes-{count}")),
            "parameters": parameters(url(f"parameters-{count}")),
        }
        milliseconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 1):  # the first turn of each does not count
            coefficients = generator.normal(size=count) / count
            for way, store in ways.items():
                if way == "parameters" and turn > FEW:
                    continue
                start = time.perf_counter()
                store(coefficients)
                milliseconds[way] += [1e3 * (time.perf_counter() - start)] if turn else []
    return _row(kind, count, milliseconds)


def _row(kind: str, count: int, milliseconds: Mapping[str, list[float]]) -> dict[str, Any]:
    medians = {way: statistics.median(known) for way, known in milliseconds.items()}
    quartiles = {way: np.quantile(known, [0.25, 0.75]).tolist() for way, known in milliseconds.items()}
    cells = (
        f"{way} {medians[way]:.2f} [{quartiles[way][0]:.2f}, {quartiles[way][1]:.2f}]"
        + ("" if way == "ours" else f" ({medians[way] / medians['ours']:.3g} ×)")
        for way in WAYS
    )
    print(f"{kind:10s} K = {count:3d}  {'  '.join(cells)}", flush=True)
    times = {way: round(medians[way] / medians["ours"], 4) for way in WAYS}
    rounded = {way: [round(value, 3) for value in (medians[way], *quartiles[way])] for way in WAYS}
    return {"database": kind, "checkpoints": count, "median_and_quartiles": rounded, "times_ours": times}


@contextlib.contextmanager
def ours(url: str) -> Iterator[Store]:
    """Our way: a candidate in one transaction, its result in others."""
    study = StoredStudy.open_or_create(open_storage(url, write=True), "store/LCSC/0", {"budget": {"evaluations": 1000}})

    def store(coefficients: np.ndarray) -> None:
        study.finish(study.add_candidate(Candidate(coefficients)), RESULT)

    with study.hold():
        yield store


def attributes(url: str) -> Store:
    """Coefficients, metrics and cost as user attributes, each set by itself."""
    study = optuna.create_study(storage=url, sampler=optuna.samplers.RandomSampler(seed=0))

    def store(coefficients: np.ndarray) -> None:
        trial = study.ask()
        trial.set_user_attr("coefficients", coefficients.tolist())
        trial.set_user_attr("metrics", dict(RESULT.metrics))
        trial.set_user_attr("cost", dataclasses.asdict(RESULT.cost))
        study.tell(trial, RESULT.loss)

    return store


def parameters(url: str) -> Store:
    """An Optuna parameter for each coefficient. The sampler only draws random numbers."""
    study = optuna.create_study(storage=url, sampler=optuna.samplers.RandomSampler(seed=0))

    def store(coefficients: np.ndarray) -> None:
        trial = study.ask()
        for index in range(len(coefficients)):
            trial.suggest_float(f"a{index}", -1.0, 1.0)
        study.tell(trial, RESULT.loss)

    return store


if __name__ == "__main__":
    main()
