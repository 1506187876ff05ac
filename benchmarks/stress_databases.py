"""Several coordinators of one study at once, and one that is stopped."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import psycopg
from stress_postgres import Server
from stress_search import Child, Clean, Row, Work, damage, opened, search, sqlite_url, verdict

from lcsc_opt.database.store import StoredStudy


def _file(url: str) -> str:
    return url.removeprefix("sqlite:///")


def _connect(url: str, *, timeout: float = 60) -> Any:
    """A connection of the database's own driver that commits each statement."""
    if url.startswith("sqlite"):
        return contextlib.closing(sqlite3.connect(_file(url), isolation_level=None, timeout=timeout))
    return psycopg.connect(url, autocommit=True)


def _trials(url: str) -> int:
    try:
        with _connect(url) as connection:
            return int(connection.execute("SELECT count(*) FROM trials").fetchone()[0])
    except (sqlite3.OperationalError, psycopg.errors.UndefinedTable):
        return 0


def wait_for_trials(url: str, count: int, child: Child) -> None:
    while _trials(url) < count and not child.wait(0.01):
        pass


def eight_coordinators(folder: Path, server: Server | None, *, repeats: int) -> Row:
    """Eight processes create the database and coordinate one study at the same moment."""
    kind = "SQLite" if server is None else "PostgreSQL"
    slowest, problems = 0.0, []
    for repeat in range(repeats):
        url = sqlite_url(folder, f"race{repeat}") if server is None else server.new_database()
        answers, seconds = _race(url)
        slowest = max(slowest, seconds)
        if sorted(name for name, _ in answers) != ["", *["StudyStoreError"] * 7]:
            problems.append(f"repeat {repeat}: {answers}")
    if slowest >= 5:
        problems.append(f"a loser left after {slowest:.1f} s")
    found, ok = verdict(problems, f"one winner each time, 7 × StudyStoreError, the slowest after {slowest:.2f} s")
    return Row(
        f"8 processes try to coordinate one study, {kind}",
        f"{repeats} times, the database not there yet",
        "exactly one wins each time; losers leave within 5 s",
        found,
        ok,
    )


def _race(url: str) -> tuple[list[tuple[str, Any]], float]:
    """The answer of each of the eight processes, and the seconds until the last loser left."""
    start, leave = os.pipe(), os.pipe()
    children = [Child(lambda: _coordinate(url, start, leave)) for _ in range(8)]
    began = time.monotonic()
    os.close(start[1])
    while time.monotonic() < began + 30 and sum(child.wait(0.01) for child in children) < 7:
        pass
    seconds = time.monotonic() - began
    os.close(leave[1])
    answers = [child.result() for child in children]
    os.close(start[0])
    os.close(leave[0])
    return answers, seconds


def _coordinate(url: str, start: tuple[int, int], leave: tuple[int, int]) -> None:
    os.close(start[1])
    os.close(leave[1])
    os.read(start[0], 1)  # ends when the parent closes its end
    with opened(url, write=True) as storage:
        study = StoredStudy.open_or_create(storage, "stress/race/0", {})
        with study.hold():
            os.read(leave[0], 1)


def paused_coordinator(folder: Path, server: Server | None, clean: Clean, *, times: int) -> Row:
    """SIGSTOP a coordinator, try to run its study a second time, then SIGCONT the first."""
    chance, problems = random.Random(10), []
    for number in range(times):
        work = Work("CMA", number, evaluations=40, pause=0.01)
        expected = clean.rows(work)
        url = sqlite_url(folder, f"paused{number}") if server is None else server.new_database()
        first = Child(functools.partial(search, url, work))
        wait_for_trials(url, chance.randint(1, 20), first)
        time.sleep(chance.uniform(0, 0.03))
        _stop(first, url)
        kind, message = Child(functools.partial(search, url, work)).result()
        if kind != "StudyStoreError" or f"process {first.pid} " not in message:
            problems.append(f"{work.name}: the second ended with {kind} {message}")
        first.signal(signal.SIGCONT)
        first.value()
        problems += damage(url, work, expected)
    found, ok = verdict(problems, f"{times} × StudyStoreError that names the process; rows equal")
    return Row(
        f"coordinator stopped, {'SQLite' if server is None else 'PostgreSQL'}",
        f"{times} times SIGSTOP, a second coordinator, SIGCONT",
        "the second is refused and told who runs the study; the first goes on; rows equal the clean run",
        found,
        ok,
    )


def _stop(child: Child, url: str) -> None:
    """Stop a child, but not while it holds the lock of an SQLite file, for which the next one would wait."""
    while True:
        child.signal(signal.SIGSTOP)
        if not url.startswith("sqlite") or is_unlocked(url):
            return
        child.signal(signal.SIGCONT)
        time.sleep(0.003)


def is_unlocked(url: str) -> bool:
    """Whether nobody holds the lock of an SQLite file."""
    try:
        with _connect(url, timeout=0) as connection:
            connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    return True
