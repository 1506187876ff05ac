"""What the database adds to a search of 500 checkpoints: a trial's milliseconds, and a replay.

    python benchmarks/trial_cost.py [--rounds 60] [--long 20000] [--folder FOLDER] [--quick]

A trial is what ``lcsc run`` does apart from the evaluation: ask, write the candidate, write the result, tell. Next to
it stands what Optuna takes for the same values by itself: ask, an attribute each for coefficients, metrics and cost,
and tell. In each round both store one trial, in turns, each in a database of its own: an SQLite file in ``--folder``,
and a PostgreSQL server that is started here and waits for the disk, as servers do.

The replay is of a search of ``--long`` trials, which is made in ``--folder``, or taken from there: until its first new
ask, in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from common import RESULTS, machine, markdown, parse, run_listed, watched_apart

from lcsc_opt.base.records import Cost, Evaluation
from lcsc_opt.base.reproducibility import blas_threads
from lcsc_opt.base.study_file import parse_study_file
from lcsc_opt.base.study_spec import OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, read_contents
from lcsc_opt.experiment.running import searches_of
from lcsc_opt.experiment.stored import spec_of
from lcsc_opt.optimizers import build_optimizer, candidate_of

sys.path.insert(0, str(Path(__file__).parents[1]))  # other packages install a folder `tests`, too

from tests.database_servers import find_binaries, postgresql

STEPS = tuple(range(100, 50_100, 100))  # of 500 checkpoints
OURS = "LCSC"
OPTUNA = "Optuna alone"
LONG = "long/LCSC/0"
NOT_COUNTED = 3  # the first trials of each way
RESULT = Evaluation(
    12.345678901234567,
    {"fid": 12.345678901234567, "kid": 0.0123456789, "fid@clip": 1.23456789},
    Cost(1000, 1000, 0.123456, 0.0123, 0.0234, 0.0345, 0.0045),
)

Trial = Callable[[], float]
"""Stores a trial, and returns the seconds of that."""


def main() -> None:
    """Measure, print the tables and write them."""
    place = {"help": "where databases are made; without it a temporary folder", "default": None}
    small = {"rounds": 10, "long": 500}
    arguments = parse(__doc__, rounds=60, long=20_000, folder=place, small=small)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with contextlib.ExitStack() as stack:
        folder = Path(arguments.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        lines = ["# What the database adds to a search", "", machine(), ""]
        lines += trial_table(folder, arguments.rounds)
        lines += ["", *replay_table(folder, arguments.long)]
    text = "\n".join([*lines, ""])
    print(text)
    if not arguments.quick:
        (RESULTS / "trial_cost.md").write_text(text)


# a trial


def trial_table(folder: Path, rounds: int) -> list[str]:
    """Milliseconds of a trial, in each database."""
    rows = [["500 checkpoints", "ms a trial, median [quartiles]", "× Optuna's"]]
    with contextlib.ExitStack() as stack:
        servers: dict[str, Callable[[str], str]] = {}
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        servers["SQLite"] = lambda name: f"sqlite:///{place}/{name}.db"
        if find_binaries() is not None:
            server = stack.enter_context(postgresql(durable=True))
            servers["PostgreSQL"] = lambda _: server.new_database().replace("postgresql:", "postgresql+psycopg:")
        for database, url in servers.items():
            measured = trial_milliseconds(url, rounds)
            for way, milliseconds in measured.items():
                lower, median, upper = np.quantile(milliseconds, [0.25, 0.5, 0.75])
                times = median / np.median(measured[OPTUNA])
                rows.append([f"{database}, {way}", f"{median:.1f} [{lower:.1f}, {upper:.1f}]", f"{times:.2f}"])
    return markdown(rows)


def trial_milliseconds(url: Callable[[str], str], rounds: int) -> dict[str, list[float]]:
    """Way → the milliseconds of each of its trials.

    Args:
        url: name → the URL of an empty database.
        rounds: trials of each way.
    """
    measured: dict[str, list[float]] = {OURS: [], OPTUNA: []}
    with searched(url("ours")) as ours:
        ways = {OURS: ours, OPTUNA: by_optuna(url("optuna"))}
        for turn in range(NOT_COUNTED + rounds):
            for way, trial in ways.items():
                seconds = trial()
                if turn >= NOT_COUNTED:
                    measured[way].append(1e3 * seconds)
    return measured


@contextlib.contextmanager
def searched(url: str) -> Iterator[Trial]:
    """A trial as ``lcsc run`` stores it, under the study's lock."""
    space = AffineSpace(STEPS, default_origin(STEPS))
    optimizer = build_optimizer(OptimizerSpec(name=OURS), space, budget=20_000, workers=1, seed=0)
    study = StoredStudy.open_or_create(open_storage(url, write=True), f"cost/{OURS}/0", {"steps": STEPS})

    def trial() -> float:
        start = time.perf_counter()
        with blas_threads(1):
            parameter = optimizer.ask()
        candidate = candidate_of(parameter)
        number = study.add_candidate(candidate)
        seconds = time.perf_counter() - start
        evaluation = dataclasses.replace(RESULT, loss=distance(candidate.coefficients))
        start = time.perf_counter()
        study.finish(number, evaluation)
        with blas_threads(1):
            optimizer.tell(parameter, evaluation.loss)
        return seconds + time.perf_counter() - start

    with study.hold():
        yield trial


def by_optuna(url: str) -> Trial:
    """The same values by Optuna's own calls: user attributes, each set by itself."""
    study = optuna.create_study(storage=url, sampler=optuna.samplers.RandomSampler(seed=0))
    generator = np.random.default_rng(0)

    def one() -> float:
        coefficients = generator.normal(size=len(STEPS)) / len(STEPS)
        start = time.perf_counter()
        trial = study.ask()
        trial.set_user_attr("coefficients", coefficients.tolist())
        trial.set_user_attr("metrics", dict(RESULT.metrics))
        trial.set_user_attr("cost", dataclasses.asdict(RESULT.cost))
        study.tell(trial, RESULT.loss)
        return time.perf_counter() - start

    return one


def distance(coefficients: np.ndarray) -> float:
    """How far coefficients are from those of a slow average: a cheap loss that a search can lower for long."""
    target = np.linspace(0.0, 1.0, len(coefficients)) ** 4
    error = coefficients - target / target.sum()
    return float(1 + 100 * (np.cumsum(error) ** 2).mean() + 10 * (error**2).sum())


# a replay


def replay_table(folder: Path, trials: int) -> list[str]:
    """Seconds and memory of a replay, which works on a copy of the SQLite file."""
    file = folder / "long.db"
    if not file.exists():
        make_long(f"sqlite:///{file}", trials)
    count = len(StoredStudy.open(open_storage(f"sqlite:///{file}", write=False), LONG).trials())
    copied = folder / "copy.db"
    shutil.copy(file, copied)
    measured = watched_apart(functools.partial(replay, f"sqlite:///{copied}"))
    copied.unlink()
    rows = [
        [f"{count:,} trials of 500 checkpoints", "seconds", "largest memory"],
        ["until the first new ask", f"{measured['seconds']:.1f}", f"{measured['total']:,.0f} MB"],
    ]
    return markdown(rows)


def make_long(url: str, trials: int) -> None:
    """A search of that many trials, by ``lcsc run``'s own way."""
    experiment, optimizer, _ = LONG.split("/")
    spec = {
        "name": experiment,
        "objective": {"file": "function.py", "settings": {"callable": "trial_cost:distance", "steps": list(STEPS)}},
        "space": "affine",
        "optimizers": [optimizer],
        "budget": {"evaluations": trials},
    }
    run_listed(searches_of([parse_study_file(spec, source="benchmark")]), url)


class _AskedError(Exception):
    """A new candidate was asked."""


def replay(url: str) -> None:
    """Until the first new ask of a finished study, which ends the search before it is stored."""

    def refuse(*_: Any, **__: Any) -> int:
        raise _AskedError

    StoredStudy.add_candidate = refuse  # type: ignore[method-assign]
    with contextlib.suppress(_AskedError):
        spec = spec_of(LONG, read_contents(open_storage(url, write=True)))
        budget = spec.budget
        longer = spec.model_copy(update={"budget": budget.with_total(budget.total + 1)})
        run_listed([longer], url, accept_changes=True)  # this script may have changed since it made the study


if __name__ == "__main__":
    main()
