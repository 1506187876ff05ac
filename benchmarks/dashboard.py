"""How long the data behind the pages takes: the first read of an experiment, and a refresh while it runs.

    python benchmarks/dashboard.py [--studies 10] [--trials 2000] [--checkpoints 500] [--rounds 5]

Makes an SQLite database of so many studies in the current folder, with coefficients of so many checkpoints. Then
measures, as medians: the first read of all of it, a refresh when nothing is new, a refresh when every study has one
more result, and drawing the comparison figure, with the bytes that are sent to the browser. Processor time is shown
beside wall time: other work on the machine hardly changes it.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, write_csv
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from lcsc_opt.base.progress import progress
from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, create
from lcsc_opt.views.curves import comparison
from lcsc_opt.views.figures.comparison import comparison_figure
from lcsc_opt.views.ranking import ranking

LIMITS = {
    "first read": 1000.0,
    "refresh, nothing new": 100.0,
    "refresh, a result each": 100.0,
}  # ms, our own targets
OPTIMIZERS = ("LCSC", "CMA", "DE", "OnePlusOne", "PSO")
EXPERIMENT = "large"


def main() -> None:
    """Measure and print one line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=10)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--checkpoints", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        file = Path(folder) / "large.db"
        storage = open_storage(f"sqlite:///{file}", write=True)
        names = make_database(storage, arguments.studies, arguments.trials, arguments.checkpoints)
        print(f"{arguments.studies} studies of {arguments.trials} trials, K = {arguments.checkpoints}, ", end="")
        print(f"{file.stat().st_size / 1e6:.0f} MB")
        print(
            f"milliseconds of {arguments.rounds} rounds: median on the clock (least to most), median of the processor"
        )
        rows = [show(name, times) for name, times in measure(storage, names, arguments).items()]
    print(write_csv("dashboard", ("what", "milliseconds", "least", "most", "processor", "limit"), rows))
    if missed := [row[0] for row in rows if row[1] > row[5]]:
        sys.exit(f"missed: {', '.join(missed)}")


def show(name: str, times: list[tuple[float, float]]) -> tuple[Any, ...]:
    """Print one line; gives the row of the results."""
    clock, processor = zip(*times, strict=True)
    seconds = (statistics.median(clock), min(clock), max(clock), statistics.median(processor))
    median, least, most, busy = (1e3 * value for value in seconds)
    limit = LIMITS.get(name, float("inf"))
    print(f"{name:26s} {median:8.1f} ({least:.1f} to {most:.1f})  {busy:8.1f}  limit {limit:g}", flush=True)
    return name, *(round(value, 2) for value in (median, least, most, busy)), limit


def make_database(storage: RDBStorage, studies: int, trials: int, checkpoints: int) -> list[str]:
    """Studies of several optimizers and seeds, each in one transaction; gives their names."""
    names = [f"{EXPERIMENT}/{OPTIMIZERS[i % len(OPTIMIZERS)]}/{i // len(OPTIMIZERS)}" for i in range(studies)]
    attributes = {"steps": list(range(100, 100 * (checkpoints + 1), 100)), "budget": {"evaluations": trials + 100}}
    with progress("making the database", studies) as advance:
        for i, name in enumerate(names):
            rng = np.random.default_rng(i)
            create(storage, name, attributes, [trial(number, checkpoints, rng) for number in range(trials)])
            advance()
    return names


def trial(number: int, checkpoints: int, rng: np.random.Generator) -> FrozenTrial:
    """A complete trial as the runner leaves it, with coefficients of full precision."""
    coefficients = rng.normal(0, 0.02, checkpoints)
    coefficients[-1] += 1 - coefficients.sum()
    loss = float(3 + 20 * np.exp(-number / 300) + rng.exponential(1.0))
    cost = {**Cost(1000, 2000, 1.5, 0.1, 0.9, 0.4, 0.1).as_dict(), "seconds": 1.5 + float(rng.random()) / 10}
    attributes = {"coefficients": coefficients.tolist(), "metrics": {"fid": loss}, "cost": cost, "tell_index": number}
    made = create_trial(state=TrialState.COMPLETE, value=loss, user_attrs=attributes)
    made.datetime_start = datetime.datetime(2025, 1, 1) + datetime.timedelta(seconds=1.7 * number)
    made.datetime_complete = made.datetime_start + datetime.timedelta(seconds=1.65)
    return made


def measure(
    storage: RDBStorage, names: list[str], arguments: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """Name of the measurement → (wall seconds, processor seconds) of each round."""
    url = storage.url
    found: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter(), time.process_time()
        result = work(*arguments)
        found.setdefault(name, []).append((time.perf_counter() - start[0], time.process_time() - start[1]))
        return result

    for _ in range(arguments.rounds):
        reader = HistoryReader(open_storage(url, write=False))
        timed("first read", reader.read, EXPERIMENT)
        timed("refresh, nothing new", reader.read, EXPERIMENT)
        for name in names:
            add_result(storage, name, arguments.checkpoints)
        studies = timed("refresh, a result each", reader.read, EXPERIMENT)
        compared = timed("curves", comparison, studies)
        timed("ranking", ranking, studies)
        figure = timed("comparison figure", comparison_figure, compared)
        text = timed("figure as JSON", figure.to_json)
    print(f"the figure is {len(text) / 1e3:.0f} kB")
    return found


def add_result(storage: RDBStorage, name: str, checkpoints: int) -> None:
    """One more result, written as the runner writes it."""
    study = StoredStudy.open(storage, name)
    key = study.add_candidate(Candidate(np.full(checkpoints, 1 / checkpoints)))
    study.finish(key, Evaluation(2.0, {"fid": 2.0}, Cost(1000, 2000, 1.5)), tell_index=key.number)


if __name__ == "__main__":
    main()
