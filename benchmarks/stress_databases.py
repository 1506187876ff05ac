"""Faults of databases: locked, full, disconnected, and used by several coordinators at once."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import optuna
import psycopg
from stress_postgres import NO_SERVER, Server
from stress_search import Child, Clean, Row, Work, damage, opened, search, sqlite_url, verdict

from lcsc_opt.database.store import StoredStudy

DISK_FULL = "database or disk is full"


def lock_held(folder: Path, clean: Clean, *, seconds: float) -> Row:
    """Hold SQLite's write lock for a while, and poll as a dashboard does."""
    work = Work("CMA", evaluations=150)
    expected = clean.rows(work)
    url, stop = sqlite_url(folder, "locked"), folder / "stop-polling"
    coordinator = Child(lambda: search(url, work))
    wait_for_trials(url, 20, coordinator)
    reader = Child(lambda: _poll(url, work.name, stop))
    locker = Child(lambda: _hold_lock(url, seconds))
    kind, answer = coordinator.result()
    stop.touch()
    polls, slowest, errors = reader.value()
    held, before, after = locker.value()
    problems = [f"the search: {kind} {answer}"] * bool(kind) + errors + damage(url, work, expected)
    if before != after:
        problems.append(f"{after - before} trials were written while the lock was held")
    found, ok = verdict(
        problems,
        f"held {held:.0f} s from trial {before} on; {polls} polls, none failed, slowest {slowest:.1f} s; rows equal",
    )
    return Row(
        "another process holds SQLite's write lock; a dashboard polls during the run",
        f"lock held for {seconds:g} s; load_study, trials and best_trial without a pause",
        "nothing fails, nothing lost",
        found,
        ok and polls > 0 and held >= seconds,
    )


def _poll(url: str, name: str, stop: Path) -> tuple[int, float, list[str]]:
    """Read the study with plain Optuna until ``stop`` exists, with a new storage each time and with one that stays."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    polls, slowest, errors = 0, 0.0, []
    stays = optuna.storages.RDBStorage(url)
    while not stop.exists():
        start = time.monotonic()
        try:
            for storage in (url, stays):
                study = optuna.load_study(study_name=name, storage=storage)
                if any(trial.state.is_finished() for trial in study.trials):
                    _ = study.best_trial
        except Exception as error:
            errors.append(f"a poll: {type(error).__name__}: {error}")
        polls, slowest = polls + 1, max(slowest, time.monotonic() - start)
    return polls, slowest, errors


def _hold_lock(url: str, seconds: float) -> tuple[float, int, int]:
    connection = sqlite3.connect(_file(url), isolation_level=None, timeout=60)
    connection.execute("BEGIN IMMEDIATE")
    start = time.monotonic()
    count = "SELECT count(*) FROM trials"
    (before,) = connection.execute(count).fetchone()
    time.sleep(seconds)
    (after,) = connection.execute(count).fetchone()
    connection.execute("ROLLBACK")
    return time.monotonic() - start, before, after


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


def disk_full(folder: Path, clean: Clean, *, rounds: int) -> Row:
    """Search on a file system that fills up; each time it is made somewhat larger."""
    row = ("disk full at commit", f"{rounds} times on a small tmpfs, each time started once more while full")
    required = "typed error, no traceback; resume equals the clean run"
    work = Work(evaluations=60, checkpoints=500, pause=0)
    place = folder / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True)
    if mounted.returncode != 0:
        return Row(*row, required, "a tmpfs cannot be mounted here (needs root)", None)
    try:
        expected = clean.rows(work)
        url, problems, stored = sqlite_url(place, "full"), [], []
        for number in range(rounds):
            _resize(place, f"{300 + 100 * number}k")
            for _ in range(2):
                kind, message = Child(lambda: search(url, work)).result()
                if kind != "StudyStoreError" or DISK_FULL not in message:
                    problems.append(f"after {_trials(url)} trials: {kind} {message}")
            stored.append(_trials(url))
        _resize(place, "64m")
        Child(lambda: search(url, work)).value()
        problems += damage(url, work, expected)
    finally:
        subprocess.run(["umount", place], check=True)
    text, ok = verdict(
        problems, f"StudyStoreError ({DISK_FULL}) after {', '.join(map(str, stored))} trials; continued study equal"
    )
    return Row(*row, required, text, ok)


def _resize(place: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)


def terminated_backend(server: Server | None, clean: Clean, *, times: int) -> Row:
    """Terminate every connection of a search at random instants."""
    row = ("PostgreSQL backend terminated mid-run", f"{times} times")
    required = "reconnects; one row each; equals the clean run"
    if server is None:
        return Row(*row, required, NO_SERVER, None)
    chance, problems, hit, seed = random.Random(7), [], 0, 0
    while hit < times:
        work = Work("LCSC", seed, evaluations=60, pause=0.005)
        url = server.new_database()
        expected = clean.rows(work)
        child = Child(functools.partial(search, url, work))
        wait_for_trials(url, 1, child)
        while hit < times and not child.wait(chance.uniform(0.05, 0.3)):
            hit += _terminate(server, url)
        kind, message = child.result()
        problems += [f"{kind}: {message}"] * bool(kind) or damage(url, work, expected)
        seed += 1
    found, ok = verdict(problems, f"{hit} terminations over {seed} studies, each reconnected; one row each, equal")
    return Row(*row, required, found, ok)


def _terminate(server: Server, url: str) -> bool:
    """Terminate all connections to the database. Whether there was one."""
    chosen = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
    with server.connect() as connection:
        return bool(connection.execute(chosen, (url.rpartition("/")[2],)).fetchall())


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


def shared_database(server: Server | None, clean: Clean, *, repeats: int) -> Row:
    """Four studies with one coordinator each, and a fifth with two coordinators, all in one database at once."""
    row = ("6 coordinators in one PostgreSQL database", f"{repeats} times: 4 of different studies, 2 of the same one")
    required = "each study as alone on SQLite; one of the two is refused, StudyStoreError"
    if server is None:
        return Row(*row, required, NO_SERVER, None)
    problems, studies = list[str](), 0
    for repeat in range(repeats):
        works = [Work(name, repeat, pause=0.02) for name in ("LCSC", "CMA", "DE", "OnePlusOne")]
        works.append(Work("LCSC", 1000 + repeat, pause=0.02))
        expected = [clean.rows(work) for work in works]
        url, start = server.new_database(), os.pipe()
        coordinators = [Child(functools.partial(_after, start, url, work)) for work in [*works, works[-1]]]
        os.close(start[1])
        ended = [child.result() for child in coordinators]
        os.close(start[0])
        *own, one, other = ended
        if sorted(kind for kind, _ in (one, other)) != ["", "StudyStoreError"]:
            problems.append(f"two of the same one: {one}, {other}")
        problems += [f"a study of its own: {kind} {answer}" for kind, answer in own if kind]
        for work, trials in zip(works, expected, strict=True):
            problems += damage(url, work, trials)
            studies += 1
    found, ok = verdict(problems, f"{studies} studies equal, {repeats} × StudyStoreError")
    return Row(*row, required, found, ok)


def _after(start: tuple[int, int], url: str, work: Work) -> int:
    """Search when all processes may begin."""
    os.close(start[1])
    os.read(start[0], 1)  # ends when the parent closes its end
    return search(url, work)


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
