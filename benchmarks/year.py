"""What a database of a year costs to list, compare, show, continue and clean.

    python benchmarks/year.py [--folder FOLDER] [--trials 2000] [--long 20000] [--quick]

The SQLite database is made in ``--folder``, or left as it is where it exists: one search of 2,000 trials with 200
checkpoints, which is copied by SQL into 100 studies (10 experiments of 10), and one search of 20,000 trials with 500.
Both are real searches (LCSC over ``function.py``). Then the commands are timed, each in a process of its own, next to
``lcsc --help``; the Compare page is timed through the server's callbacks.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from common import RESULTS, machine, markdown, parse
from werkzeug.test import Client

from lcsc_opt.base.study_file import parse_studies
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.search.execution import Executor
from lcsc_opt.search.plan import plans
from lcsc_opt.views.dashboard.server import application

EXPERIMENTS = 10
OPTIMIZERS = ("LCSC", "CMA", "DE", "PSO", "OnePlusOne")
SEEDS = 2
SHORT = "short/LCSC/0"
LONG = "long/LCSC/0"
COMMAND = "from lcsc_opt.cli import main; main()"
COPIED_TABLES = {  # of one study: table → its columns that are keys, and what they are keys of
    "study_directions": {"study_direction_id": "row", "study_id": "study"},
    "study_user_attributes": {"study_user_attribute_id": "row", "study_id": "study"},
    "trials": {"trial_id": "trial", "study_id": "study"},
    "trial_values": {"trial_value_id": "row", "trial_id": "trial"},
    "trial_params": {"param_id": "row", "trial_id": "trial"},
    "trial_user_attributes": {"trial_user_attribute_id": "row", "trial_id": "trial"},
}


def distance(coefficients: np.ndarray) -> float:
    """How far coefficients are from those of a slow average: a cheap loss that a search can lower for long."""
    target = np.linspace(0.0, 1.0, len(coefficients)) ** 4
    error = coefficients - target / target.sum()
    return float(1 + 100 * (np.cumsum(error) ** 2).mean() + 10 * (error**2).sum())


def main() -> None:
    """Make the database, measure, print the table and write it."""
    folder = {"help": "where the database is made; without it a temporary folder", "default": None}
    small = {"trials": 200, "long": 2000}
    arguments = parse(__doc__, folder=folder, trials=2000, long=20_000, small=small)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with contextlib.ExitStack() as stack:
        place = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory())
        file = Path(place) / "year.db"
        if not file.exists():
            make(file, trials=arguments.trials, long=arguments.long)
        rows = [("", "measured", "required"), *measure(file)]
    text = "\n".join([f"# A database of a year\n\n{machine()}\n", *markdown(rows), ""])
    print(text)
    if not arguments.quick:
        (RESULTS / "year.md").write_text(text)


def make(file: Path, *, trials: int, long: int) -> None:
    """Search both studies, and copy the short one."""
    storage = open_storage(f"sqlite:///{file}", write=True)
    search(storage, SHORT, checkpoints=200, trials=trials)
    search(storage, LONG, checkpoints=500, trials=long)
    storage.engine.dispose()
    copy_short(file)


def search(storage: optuna.storages.RDBStorage, name: str, *, checkpoints: int, trials: int) -> None:
    """A search of that many trials."""
    experiment = name.partition("/")[0]
    settings = {
        "callable": "year:distance",
        "held_out": "year:distance",
        "steps": [100 * (index + 1) for index in range(checkpoints)],
    }
    spec = {
        "name": experiment,
        "objective": {"file": "function.py", "settings": settings},
        "optimizers": ["LCSC"],
        "budget": {"evaluations": trials},
    }
    [plan] = plans(parse_studies(spec, source="benchmark"), None)
    Executor(storage).run(plan)


def copy_short(file: Path) -> None:
    """Copies of the short study under the names of 10 experiments of 10 studies."""
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        [source] = connection.execute("SELECT study_id FROM studies WHERE study_name = ?", (SHORT,)).fetchone()
        names = [
            f"year{experiment}/{optimizer}/{seed}"
            for experiment in range(EXPERIMENTS)
            for optimizer in OPTIMIZERS
            for seed in range(SEEDS)
        ]
        for name in names:
            copy_study(connection, source, name)


def copy_study(connection: sqlite3.Connection, source: int, name: str) -> None:
    """One copy: its keys are those of the source, shifted past all that exist."""
    offsets = {"study": connection.execute("INSERT INTO studies (study_name) VALUES (?)", (name,)).lastrowid or 0}
    offsets["study"] -= source
    offsets["trial"] = connection.execute("SELECT max(trial_id) FROM trials").fetchone()[0]
    for table, keys in COPIED_TABLES.items():
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        values = []
        for column in columns:
            kind = keys.get(column)
            if kind == "row":
                values.append("NULL")
            elif kind is None:
                values.append(column)
            else:
                values.append(f"{column} + {offsets[kind]}")
        condition = "study_id = ?"
        if "study_id" not in columns:
            condition = "trial_id IN (SELECT trial_id FROM trials WHERE study_id = ?)"
        connection.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) SELECT {', '.join(values)} FROM {table} WHERE {condition}",
            (source,),
        )


def measure(file: Path) -> list[tuple[str, str, str]]:
    """The rows of the table."""
    url = f"sqlite:///{file}"
    commands = {
        "lcsc --help": (["--help"], ""),
        "lcsc list, 102 studies": (["list", "--storage", url], "2 s"),
        "lcsc compare, ten studies": (["compare", "year3", "--storage", url], "4 s"),
        "lcsc show, the long study": (["show", LONG, "--storage", url], "3 s"),
    }
    rows = []
    for title, (arguments, required) in commands.items():
        seconds = statistics.median(command_seconds(arguments) for _ in range(3))
        rows.append((title, f"{seconds:.2f} s", required))
    first, refresh = compare_page_seconds(url)
    rows.append(("Compare's first page", f"{first:.2f} s", "3 s"))
    rows.append(("a refresh of it", f"{refresh:.3f} s", "0.3 s"))
    seconds, megabytes = replay(url)
    rows.append(("continuing the long study, until the first new ask", f"{seconds:.1f} s", "60 s"))
    rows.append(("its largest memory", f"{megabytes:,.0f} MB", "1 GB"))
    with tempfile.TemporaryDirectory() as folder:
        ours, optunas = trial_milliseconds(f"sqlite:///{folder}/trials.db")
        copied = Path(folder) / "copy.db"
        shutil.copy(file, copied)
        seconds = command_seconds(["delete", LONG, "--yes", "--storage", f"sqlite:///{copied}"])
    rows.append(("storing a trial, K = 500, SQLite", f"{ours:.1f} ms", "12 ms, with its search"))
    rows.append(("the same with plain Optuna", f"{optunas:.1f} ms", ""))
    rows.append(("lcsc delete of the long study", f"{seconds:.1f} s", "10 s"))
    rows.append(("SQLite's file, K = 500, one row", f"{bytes_a_trial(1):,.0f} bytes a trial", ""))
    rows.append(("SQLite's file, K = 500, 46 rows", f"{bytes_a_trial(46):,.0f} bytes a trial", ""))
    return rows


def command_seconds(arguments: list[str]) -> float:
    """The wall-clock seconds of ``lcsc`` in a process of its own."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def compare_page_seconds(url: str) -> tuple[float, float]:
    """The server's seconds for the first drawing of the Compare page, and for a refresh without news."""
    client = Client(application(open_storage(url, write=False)))
    address = "/lcsc/compare"
    headers = {"Host": "127.0.0.1:8080"}
    start = time.perf_counter()
    client.get(address, headers=headers)
    callbacks = json.loads(client.get(f"{address}/_dash-dependencies", headers=headers).text)
    fill = next(one for one in callbacks if "page.className" in one["output"])
    draw = next(one for one in callbacks if "seen.data" in one["output"] and one["clientside_function"] is None)
    values: dict[str, Any] = {"url": "?experiment=year3", "scale": ["y"], "theme": "light", "axis": "evaluations"}
    values["experiment"] = "year3"

    def post(callback: dict[str, Any], triggered: str) -> dict[str, Any]:
        names = [part.rsplit(".", 1) for part in callback["output"].strip(".").split("...")]
        body = {
            "output": callback["output"],
            "outputs": [{"id": name, "property": value} for name, value in names],
            "inputs": [{**field, "value": values.get(field["id"])} for field in callback["inputs"]],
            "state": [{**field, "value": values.get(field["id"])} for field in callback["state"]],
            "changedPropIds": [f"{triggered}.data"],
        }
        answer = client.post(f"{address}/_dash-update-component", headers=headers, json=body)
        assert answer.status_code in {200, 204}, answer.text
        return json.loads(answer.text).get("response", {}) if answer.text else {}

    post(fill, "url")
    drawn = post(draw, "refresh")
    first = time.perf_counter() - start
    values["seen"] = drawn["seen"]["data"]
    refreshes = []
    for _ in range(5):
        start = time.perf_counter()
        post(fill, "refresh")
        post(draw, "refresh")
        refreshes.append(time.perf_counter() - start)
    return first, statistics.median(refreshes)


def replay(url: str) -> tuple[float, float]:
    """Seconds until the first new ask of the long study, and the process's largest memory in megabytes."""
    script = Path(__file__).resolve()
    environment = {**os.environ, "PYTHONPATH": f"{script.parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", f"import year; year.replay_here({url!r})"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    seconds, megabytes = output.split()[-2:]
    return float(seconds), float(megabytes)


def replay_here(url: str) -> None:
    """Print what :func:`replay` returns. Nothing new is stored: the first new ask ends the search."""
    from lcsc_opt.search.plan import Plan

    storage = open_storage(url, write=True)
    start = time.perf_counter()
    stored = StoredStudy.open(storage, LONG)
    plan = Plan.of(stored)
    plan = plan.with_budget(plan.spec.budget.total + 1)

    class AskedError(Exception):
        """A new candidate was asked."""

    def refuse(*_: Any, **__: Any) -> int:
        raise AskedError

    add_candidate: Callable[..., int] = StoredStudy.add_candidate
    StoredStudy.add_candidate = refuse  # type: ignore[method-assign]
    with contextlib.suppress(AskedError):
        Executor(storage).run(plan)
    StoredStudy.add_candidate = add_candidate  # type: ignore[method-assign]
    seconds = time.perf_counter() - start
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def trial_milliseconds(url: str) -> tuple[float, float]:
    """Median milliseconds of a stored trial with K = 500, ours and with plain Optuna."""
    from store import attributes, ours

    generator = np.random.default_rng(0)
    with ours(url) as ours_stores:
        ways = (ours_stores, attributes(url.replace("trials", "optuna")))
        milliseconds: tuple[list[float], list[float]] = ([], [])
        for number in range(60):
            coefficients = generator.normal(size=500) / 500
            for way, spent in zip(ways, milliseconds, strict=True):
                start = time.perf_counter()
                way(coefficients, number)
                spent.append(1e3 * (time.perf_counter() - start))
    return statistics.median(milliseconds[0]), statistics.median(milliseconds[1])


def bytes_a_trial(rows: int) -> float:
    """How much SQLite's file grows with a trial of this many rows of 500 coefficients."""
    from store import ours

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "size.db"
        with ours(f"sqlite:///{file}") as store:
            sizes = []
            for number in range(101):
                shape = (500,) if rows == 1 else (rows, 500)
                store(generator.normal(size=shape) / 500, number)
                if number in {0, 100}:
                    sizes.append(file.stat().st_size)
    return (sizes[1] - sizes[0]) / 100


if __name__ == "__main__":
    main()
