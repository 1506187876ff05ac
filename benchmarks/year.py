"""What a database of a year costs to list, compare, show, continue and clean.

    python benchmarks/year.py [--folder FOLDER] [--postgresql URL] [--trials 2000] [--long 20000] [--quick]

The SQLite database is made in ``--folder``, or left as it is where it exists: one search of 2,000 trials with 200
checkpoints, which is copied by SQL into 100 studies (10 experiments of 10), and one search of 20,000 trials with 500.
Both are real searches (LCSC over ``function.py``). Then the commands are timed, each in a process of its own, next to
``lcsc --help``; the Compare page is timed through the server's callbacks. What writes, writes to a copy. Next to it
stands plain Optuna, which reads the same trials, deletes the same study, or stores the same attributes.
``--postgresql postgresql://user@host/postgres`` also times trials on a server, on which it makes databases.
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
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
from common import RESULTS, machine, markdown, parse, run_listed
from werkzeug.test import Client

from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.base.study_file import parse_study_file
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, read_contents
from lcsc_opt.experiment.running import searches_of, spec_of
from lcsc_opt.views.dashboard.server import application

EXPERIMENTS = 10
OPTIMIZERS = ("LCSC", "CMA", "DE", "PSO", "OnePlusOne")
SEEDS = 2
SHORT = "short/LCSC/0"
LONG = "long/LCSC/0"
Row = tuple[str, str, str, str]  # title, measured, required, plain Optuna
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
    postgresql = {"help": "the URL of a database of a server, as one who may make others", "default": None}
    small = {"trials": 200, "long": 2000}
    arguments = parse(__doc__, folder=folder, postgresql=postgresql, trials=2000, long=20_000, small=small)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with contextlib.ExitStack() as stack:
        place = Path(arguments.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        file = place / "year.db"
        if not file.exists():
            unfinished = place / "unfinished.db"
            unfinished.unlink(missing_ok=True)
            make(unfinished, trials=arguments.trials, long=arguments.long)
            unfinished.rename(file)
        rows = [("", "measured", "required", "plain Optuna"), *measure(file, postgresql=arguments.postgresql)]
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
        "space": "affine",
        "optimizers": ["LCSC"],
        "budget": {"evaluations": trials},
    }
    run_listed(searches_of([parse_study_file(spec, source="benchmark")]), storage.url)


def copy_short(file: Path) -> None:
    """Copies of the short study under the names of 10 experiments of 10 studies."""
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        [source] = connection.execute("SELECT study_id FROM studies WHERE study_name = ?", (SHORT,)).fetchone()
        for name in study_names():
            copy_study(connection, source, name)


def study_names() -> list[str]:
    """Those of the copies."""
    return [
        f"year{experiment}/{optimizer}/{seed}"
        for experiment in range(EXPERIMENTS)
        for optimizer in OPTIMIZERS
        for seed in range(SEEDS)
    ]


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


def measure(file: Path, *, postgresql: str | None = None) -> list[Row]:
    """The rows of the table. The database stays as it is: what writes, writes to a copy."""
    rows = command_rows(f"sqlite:///{file}")
    rows += page_rows(f"sqlite:///{file}")
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        copy = Path(folder) / "copy.db"
        shutil.copy(file, copy)
        url = f"sqlite:///{copy}"
        rows += refresh_rows(url)
        rows += replay_rows(url)
        rows += trial_rows(Path(folder), postgresql)
        rows += delete_rows(url)
    rows += size_rows()
    return rows


def command_rows(url: str) -> list[Row]:
    """Commands that read, each in a process of its own, and the same trials read with plain Optuna."""
    names = [name for name in study_names() if name.startswith("year3/")]
    trials_of_ten = f"[optuna.load_study(study_name=name, storage={url!r}).trials for name in {names!r}]"
    commands = {
        "lcsc --help": (["--help"], "", "import optuna"),
        "lcsc list, 102 studies": (
            ["list", "--storage", url],
            "2 s",
            f"import optuna; optuna.get_all_study_summaries({url!r})",
        ),
        "lcsc compare, ten studies": (
            ["compare", "year3", "--storage", url],
            "4 s",
            f"import optuna; {trials_of_ten}",
        ),
        "lcsc show, the long study": (
            ["show", LONG, "--storage", url],
            "3 s",
            f"import optuna; optuna.load_study(study_name={LONG!r}, storage={url!r}).trials",
        ),
    }
    rows = []
    for title, (arguments, required, optunas) in commands.items():
        ours = [command_seconds(arguments) for _ in range(3)]
        theirs = process_seconds(["-c", optunas])
        rows.append((title, f"{statistics.median(ours):.2f} s", required, f"{theirs:.2f} s"))
    return rows


def page_rows(url: str) -> list[Row]:
    """The Compare page when it is opened, and when it refreshes without news."""
    page = ComparePage(url, "year3")
    seconds = page.open()
    refreshes = [page.refresh() for _ in range(5)]
    return [
        ("Compare's first page", f"{seconds:.2f} s", "3 s", ""),
        ("a refresh without news", f"{statistics.median(refreshes):.3f} s", "0.3 s", ""),
    ]


def refresh_rows(url: str) -> list[Row]:
    """A refresh of the Compare page after each trial of a search that runs in one of its studies."""
    page = ComparePage(url, "year3")
    page.open()
    study = StoredStudy.open(open_storage(url, write=True), "year3/LCSC/0")
    best = min(trial.value for trial in study.trials() if trial.value is not None)
    refreshes = []
    with study.hold():
        for number in range(20):
            coefficients = np.full(len(study.attributes["steps"]), 1 / len(study.attributes["steps"]))
            trial = study.add_candidate(Candidate(coefficients))
            loss = best * (1 - 1e-6 * number)  # each one is better, so that curves and ranking are drawn anew
            study.finish(trial, Evaluation(loss, {}, Cost(seconds=0.01)))
            refreshes.append(page.refresh())
    return [("a refresh after a trial, while a search runs", f"{statistics.median(refreshes):.3f} s", "0.3 s", "")]


def replay_rows(url: str) -> list[Row]:
    """Continuing the long study until it asks for a new candidate, in a process of its own."""
    seconds, megabytes = replay(url)
    return [
        ("continuing the long study, until the first new ask", f"{seconds:.1f} s", "60 s", ""),
        ("its largest memory", f"{megabytes:,.0f} MB", "1 GB", ""),
    ]


def trial_rows(folder: Path, postgresql: str | None) -> list[Row]:
    """What a trial costs to store, and its attributes with plain Optuna; K = 500."""
    urls = {"SQLite, 12 ms with its search": f"sqlite:///{folder}/NAME.db"}
    if postgresql is not None:
        from store import new_database

        new_database(postgresql, "year_ours")
        new_database(postgresql, "year_optuna")
        urls["PostgreSQL, 20 ms with its search"] = f"{postgresql.rpartition('/')[0]}/year_NAME"
    rows = []
    for title, url in urls.items():
        kind, _, required = title.partition(", ")
        ours, optunas = trial_milliseconds(url.replace("NAME", "ours"), url.replace("NAME", "optuna"))
        rows.append((f"storing a trial, K = 500, {kind}", f"{ours:.1f} ms", required, f"{optunas:.1f} ms"))
    return rows


def delete_rows(url: str) -> list[Row]:
    """Deleting a short study and the long one. Optuna's own way is timed on a short one only."""
    short = command_seconds(["delete", "year4/LCSC/0", "--yes", "--storage", url])
    optunas = f"import optuna; optuna.delete_study(study_name='year4/LCSC/1', storage={url!r})"
    theirs = process_seconds(["-c", optunas])
    long = command_seconds(["delete", LONG, "--yes", "--storage", url])
    return [
        ("lcsc delete, a short study", f"{short:.1f} s", "", f"{theirs:.1f} s"),
        ("lcsc delete, the long study", f"{long:.1f} s", "10 s", ""),
    ]


def size_rows() -> list[Row]:
    """How much SQLite's file grows with a trial, K = 500."""
    rows = []
    for count, title in ((1, "one row"), (46, "46 rows")):
        rows.append((f"SQLite's file, K = 500, {title}", f"{bytes_a_trial(count):,.0f} bytes a trial", "", ""))
    return rows


def command_seconds(arguments: list[str]) -> float:
    """The wall-clock seconds of ``lcsc`` in a process of its own."""
    return process_seconds(["-c", COMMAND, *arguments])


def process_seconds(arguments: list[str]) -> float:
    """The wall-clock seconds of Python with these arguments."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment()
    )
    return time.perf_counter() - start


def _environment() -> dict[str, str]:
    """Of processes that import this file for its callable."""
    folders = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


class ComparePage:
    """The Compare page of an experiment, as a browser asks the server for it."""

    def __init__(self, url: str, experiment: str) -> None:
        self._client = Client(application(open_storage(url, write=False)))
        self._address = "/lcsc/compare"
        self._headers = {"Host": "127.0.0.1:8080"}
        self._values: dict[str, Any] = {
            "url": f"?experiment={experiment}",
            "experiment": experiment,
            "scale": ["y"],
            "theme": "light",
            "axis": "evaluations",
        }

    def open(self) -> float:
        """The server's seconds until everything is drawn."""
        start = time.perf_counter()
        self._client.get(self._address, headers=self._headers)
        listed = self._client.get(f"{self._address}/_dash-dependencies", headers=self._headers)
        callbacks = [callback for callback in json.loads(listed.text) if callback["clientside_function"] is None]
        self._fill = next(callback for callback in callbacks if "page.className" in callback["output"])
        self._draw = next(callback for callback in callbacks if "seen.data" in callback["output"])
        self._post(self._fill, "url.search")
        drawn = self._post(self._draw, "refresh.data")
        self._values["seen"] = drawn["seen"]["data"]
        return time.perf_counter() - start

    def refresh(self) -> float:
        """The server's seconds."""
        start = time.perf_counter()
        self._post(self._fill, "refresh.data")
        drawn = self._post(self._draw, "refresh.data")
        seconds = time.perf_counter() - start
        if "seen" in drawn:
            self._values["seen"] = drawn["seen"]["data"]
        return seconds

    def _post(self, callback: dict[str, Any], triggered: str) -> dict[str, Any]:
        """Call one callback; component → property → value."""
        outputs = []
        for part in callback["output"].strip(".").split("..."):
            component, _, name = part.rpartition(".")
            outputs.append({"id": component, "property": name})
        body = {
            "output": callback["output"],
            "outputs": outputs,
            "inputs": [{**field, "value": self._values.get(field["id"])} for field in callback["inputs"]],
            "state": [{**field, "value": self._values.get(field["id"])} for field in callback["state"]],
            "changedPropIds": [triggered],
        }
        answer = self._client.post(f"{self._address}/_dash-update-component", headers=self._headers, json=body)
        assert answer.status_code in {200, 204}, answer.text
        return json.loads(answer.text).get("response", {}) if answer.text else {}


def replay(url: str) -> tuple[float, float]:
    """Seconds until the first new ask of the long study, and the process's largest memory in megabytes.

    It raises the study's budget.
    """
    command = [sys.executable, "-c", f"import year; year.replay_here({url!r})"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_environment()).stdout
    seconds, megabytes = output.split()[-2:]
    return float(seconds), float(megabytes)


def replay_here(url: str) -> None:
    """Print what :func:`replay` returns. No trial is stored: the first new ask ends the search."""

    class AskedError(Exception):
        """A new candidate was asked."""

    def refuse(*_: Any, **__: Any) -> int:
        raise AskedError

    start = time.perf_counter()
    storage = open_storage(url, write=True)
    spec = spec_of(LONG, read_contents(storage))
    budget = spec.budget
    longer = spec.model_copy(update={"budget": budget.with_total(budget.total + 1)})
    asked = False
    with mock.patch.object(StoredStudy, "add_candidate", refuse):
        try:
            run_listed([longer], url, accept_changes=True)  # this file may have changed since it made the database
        except AskedError:
            asked = True
    assert asked, "the search ended without a new ask"
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def trial_milliseconds(url: str, optunas_url: str) -> tuple[float, float]:
    """Median milliseconds of a stored trial with K = 500, ours and with plain Optuna, side by side."""
    from store import attributes, ours

    generator = np.random.default_rng(0)
    with ours(url) as ours_stores:
        ways = (ours_stores, attributes(optunas_url))
        milliseconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(60):
            coefficients = generator.normal(size=500) / 500
            for way, spent in zip(ways, milliseconds, strict=True):
                start = time.perf_counter()
                way(coefficients)
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
                store(generator.normal(size=shape) / 500)
                if number in {0, 100}:
                    sizes.append(file.stat().st_size)
    return (sizes[1] - sizes[0]) / 100


if __name__ == "__main__":
    main()
