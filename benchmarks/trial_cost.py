"""What the database adds to a search of 500 checkpoints: a trial's milliseconds and bytes, and a replay.

    python benchmarks/trial_cost.py [--rounds 60] [--long 20000] [--folder FOLDER] [--quick]

A trial is what ``lcsc run`` does apart from the evaluation: ask, write the candidate, write the result, tell; with
LCSC and with CMA. Next to it stands what Optuna takes for the same values by itself: ask, an attribute each for
coefficients, metrics, cost and the place of the tell, and tell. In each round every way stores one trial, in turns,
each in a database of its own: an SQLite file in ``--folder``, and a PostgreSQL server that is started here and waits
for the disk, as servers do.

The replay is of a search of ``--long`` trials (LCSC), which is made in ``--folder``, or taken from there: until its
first new ask, in a process of its own. Next to it stands Optuna's ``get_trials``, which reads what a replay needs.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa
from common import RESULTS, machine, markdown, parse, run_listed
from store import RESULT, attributes

from lcsc_opt.base.records import Candidate
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
OPTIMIZERS = ("LCSC", "CMA")
PARTS = ("candidate", "result", "optimizer")
OPTUNA = "Optuna alone"
LONG = "long/LCSC/0"
NOT_COUNTED = 3  # the first trials of each way

Parts = Mapping[str, float]
Trial = Callable[[], Parts]


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
        lines += ["", *bytes_table(), "", *replay_table(folder, arguments.long)]
    text = "\n".join([*lines, ""])
    print(text)
    if not arguments.quick:
        (RESULTS / "trial_cost.md").write_text(text)


# a trial


def trial_table(folder: Path, rounds: int) -> list[str]:
    """Milliseconds, transactions and statements of a trial."""
    parts = "candidate, result, optimizer"
    header = ("500 checkpoints", "ms a trial, median [quartiles]", "× Optuna's", parts, "transactions, statements")
    rows: list[tuple[str, ...]] = [header]
    with contextlib.ExitStack() as stack:
        servers: dict[str, Callable[[str], str]] = {}
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        servers["SQLite"] = lambda name: f"sqlite:///{place}/{name}.db"
        if find_binaries() is not None:
            server = stack.enter_context(postgresql(durable=True))
            servers["PostgreSQL"] = lambda _: server.new_database().replace("postgresql:", "postgresql+psycopg:")
        for database, url in servers.items():
            rows += _trial_rows(database, url, rounds)
    return markdown(rows)


def _trial_rows(database: str, url: Callable[[str], str], rounds: int) -> list[tuple[str, ...]]:
    measured = trial_milliseconds(url, rounds)
    medians = {way: statistics.median(parts["whole"] for parts in trials) for way, trials in measured.items()}
    rows: list[tuple[str, ...]] = []
    for way, trials in measured.items():
        lower, upper = np.quantile([parts["whole"] for parts in trials], [0.25, 0.75])
        shown_parts = ""
        if way != OPTUNA:
            parts = [statistics.median(trial[part] for trial in trials) for part in PARTS]
            shown_parts = ", ".join(f"{milliseconds:.1f}" for milliseconds in parts)
        counted = trials[-1]
        rows.append(
            (
                f"{database}, {way}",
                f"{medians[way]:.1f} [{lower:.1f}, {upper:.1f}]",
                f"{medians[way] / medians[OPTUNA]:.2f}",
                shown_parts,
                f"{counted['transactions']:.0f}, {counted['statements']:.0f}",
            )
        )
    return rows


def trial_milliseconds(url: Callable[[str], str], rounds: int) -> dict[str, list[Parts]]:
    """Way → for each of its trials the milliseconds of its parts, and how many transactions and statements it took.

    Args:
        url: name → the URL of an empty database.
        rounds: trials of each way.
    """
    with contextlib.ExitStack() as opened:
        ways: dict[str, Trial] = {
            optimizer: opened.enter_context(searched(url(optimizer), optimizer)) for optimizer in OPTIMIZERS
        }
        ways[OPTUNA] = by_optuna(url("optuna"))
        counts: dict[str, Parts] = {}
        for way, trial in ways.items():  # trials of their own, since counting takes time
            for _ in range(NOT_COUNTED):
                trial()
            with counting() as counted:
                trial()
            counts[way] = counted
        measured: dict[str, list[Parts]] = {way: [] for way in ways}
        for turn in range(NOT_COUNTED + rounds):
            for way, trial in ways.items():
                parts = trial()
                if turn >= NOT_COUNTED:
                    measured[way].append({**parts, **counts[way]})
    return measured


@contextlib.contextmanager
def searched(url: str, optimizer_name: str) -> Iterator[Trial]:
    """A trial as ``lcsc run`` stores it, under the study's lock."""
    space = AffineSpace(STEPS, default_origin(STEPS))
    optimizer = build_optimizer(OptimizerSpec(name=optimizer_name), space, budget=20_000, workers=1, seed=0)
    study = StoredStudy.open_or_create(open_storage(url, write=True), f"cost/{optimizer_name}/0", {"steps": STEPS})

    def trial() -> Parts:
        start = time.perf_counter()
        with blas_threads(1):
            parameter = optimizer.ask()
        candidate = candidate_of(parameter)
        asked = time.perf_counter()
        number = study.add_candidate(candidate)
        written = time.perf_counter()
        evaluation = dataclasses.replace(RESULT, loss=distance(candidate.coefficients))
        evaluated = time.perf_counter()
        study.finish(number, evaluation)
        finished = time.perf_counter()
        with blas_threads(1):
            optimizer.tell(parameter, evaluation.loss)
        told = time.perf_counter()
        seconds = {
            "candidate": written - asked,
            "result": finished - evaluated,
            "optimizer": (asked - start) + (told - finished),
        }
        seconds["whole"] = sum(seconds.values())
        return {part: 1e3 * value for part, value in seconds.items()}

    with study.hold():
        yield trial


def by_optuna(url: str) -> Trial:
    """The same values by Optuna's own calls."""
    store = attributes(url)
    generator = np.random.default_rng(0)

    def trial() -> Parts:
        coefficients = generator.normal(size=len(STEPS)) / len(STEPS)
        start = time.perf_counter()
        store(coefficients)
        return {"whole": 1e3 * (time.perf_counter() - start)}

    return trial


@contextlib.contextmanager
def counting() -> Iterator[collections.Counter[str]]:
    """Counts ``transactions`` and ``statements`` of all databases while this is open."""
    counts: collections.Counter[str] = collections.Counter()

    def count_commit(*_: Any) -> None:
        counts["transactions"] += 1

    def count_statement(*_: Any) -> None:
        counts["statements"] += 1

    listeners = {"commit": count_commit, "before_cursor_execute": count_statement}
    for name, listener in listeners.items():
        sa.event.listen(sa.Engine, name, listener)
    try:
        yield counts
    finally:
        for name, listener in listeners.items():
            sa.event.remove(sa.Engine, name, listener)


def distance(coefficients: np.ndarray) -> float:
    """How far coefficients are from those of a slow average: a cheap loss that a search can lower for long."""
    target = np.linspace(0.0, 1.0, len(coefficients)) ** 4
    error = coefficients - target / target.sum()
    return float(1 + 100 * (np.cumsum(error) ** 2).mean() + 10 * (error**2).sum())


# its bytes


def bytes_table() -> list[str]:
    """By how much SQLite's file grows with a trial of 500 checkpoints."""
    rows = [("500 checkpoints", "bytes a trial", "the coefficients alone, as float64", "Optuna alone")]
    for count in (1, 46):
        shape = (len(STEPS),) if count == 1 else (count, len(STEPS))
        ours, optunas = bytes_a_trial(shape)
        title = "one row" if count == 1 else f"{count} rows"
        rows.append((title, f"{ours:,.0f}", f"{8 * np.prod(shape):,.0f}", f"{optunas:,.0f}"))
    return markdown(rows)


def bytes_a_trial(shape: tuple[int, ...], trials: int = 100) -> tuple[float, float]:
    """The bytes of a trial, ours and by Optuna's own calls, whose coefficients have this shape."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = [Path(folder) / "ours.db", Path(folder) / "optuna.db"]
        study = StoredStudy.open_or_create(open_storage(f"sqlite:///{files[0]}", write=True), "bytes/LCSC/0", {})
        stack.enter_context(study.hold())
        by_attributes = attributes(f"sqlite:///{files[1]}")
        sizes = []
        for _ in range(trials + 1):
            coefficients = generator.normal(size=shape) / shape[-1]
            study.finish(study.add_candidate(Candidate(coefficients)), RESULT)
            by_attributes(coefficients)
            sizes.append([file.stat().st_size for file in files])
    ours, optunas = (np.array(sizes[-1]) - np.array(sizes[0])) / trials
    return float(ours), float(optunas)


# a replay


def replay_table(folder: Path, trials: int) -> list[str]:
    """Seconds and memory of a replay, and of Optuna's reading."""
    file = folder / "long.db"
    if not file.exists():
        make_long(f"sqlite:///{file}", trials)
    url = f"sqlite:///{file}"
    rows = [(f"{trial_count(url):,} trials of 500 checkpoints", "seconds", "seconds of a processor", "largest memory")]
    for title, measure in (("until the first new ask", replay), ("Optuna's get_trials", read_by_optuna)):
        seconds, cpu_seconds, megabytes = measure(url)
        rows.append((title, f"{seconds:.1f}", f"{cpu_seconds:.1f}", f"{megabytes:,.0f} MB"))
    return markdown(rows)


def make_long(url: str, trials: int, name: str = LONG) -> None:
    """A search of that many trials, by ``lcsc run``'s own way."""
    experiment, optimizer, _ = name.split("/")
    spec = {
        "name": experiment,
        "objective": {"file": "function.py", "settings": {"callable": "trial_cost:distance", "steps": list(STEPS)}},
        "space": "affine",
        "optimizers": [optimizer],
        "budget": {"evaluations": trials},
    }
    run_listed(searches_of([parse_study_file(spec, source="benchmark")]), url)


def trial_count(url: str, name: str = LONG) -> int:
    """How many trials the study has."""
    return len(StoredStudy.open(open_storage(url, write=False), name).trials())


def replay(url: str, name: str = LONG) -> tuple[float, float, float]:
    """Until the first new ask of a finished study: seconds, seconds of a processor, and the largest megabytes.

    It runs in a process of its own, on a copy of the SQLite file.
    """
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "copy.db"
        shutil.copy(url.removeprefix("sqlite:///"), copied)
        return _in_a_process("replay_here", f"sqlite:///{copied}", name)


def read_by_optuna(url: str, name: str = LONG) -> tuple[float, float, float]:
    """The same of Optuna's reading of all trials."""
    return _in_a_process("read_by_optuna_here", url, name)


def _in_a_process(function: str, *arguments: str) -> tuple[float, float, float]:
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", f"import trial_cost; trial_cost.{function}{arguments!r}"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    seconds, cpu_seconds, megabytes = map(float, output.stdout.split()[-3:])
    return seconds, cpu_seconds, megabytes


class _AskedError(Exception):
    """A new candidate was asked."""


def replay_here(url: str, name: str) -> None:
    """Print what :func:`replay` returns. The first new ask ends the search before it is stored."""

    def refuse(*_: Any, **__: Any) -> int:
        raise _AskedError

    StoredStudy.add_candidate = refuse  # type: ignore[method-assign]
    storage = open_storage(url, write=True)
    with _printed_costs(), contextlib.suppress(_AskedError):
        spec = spec_of(name, read_contents(storage))
        budget = spec.budget
        longer = spec.model_copy(update={"budget": budget.with_total(budget.total + 1)})
        run_listed([longer], url, accept_changes=True)  # this script may have changed since it made the study


def read_by_optuna_here(url: str, name: str) -> None:
    """Print what :func:`read_by_optuna` returns."""
    with _printed_costs():
        optuna.load_study(study_name=name, storage=url).get_trials(deepcopy=False)


@contextlib.contextmanager
def _printed_costs() -> Iterator[None]:
    start = time.perf_counter()
    cpu_start = time.process_time()
    yield
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start
    print(seconds, cpu_seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


if __name__ == "__main__":
    main()
