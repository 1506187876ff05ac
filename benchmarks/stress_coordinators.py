"""Coordinators that are killed at random instants and at every commit, come eight at once, and are stopped."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from stress_search import (
    FORK,
    OPTIMIZERS,
    Child,
    Clean,
    Found,
    NewDatabase,
    Work,
    damage,
    opened,
    rows,
    search,
)

from lcsc_opt.database import store
from lcsc_opt.database.store import StoredStudy

COMMITTING = ("add_candidate", "finish", "fail", "note_attempts", "set_attribute")


def random_kills(new: NewDatabase, clean: Clean, *, workers: int, kills: int) -> Found:
    """The coordinator is killed at random instants; with several workers, candidates finish in random order."""
    chance, problems, studies, done, evaluating = random.Random(workers), list[str](), 0, 0, 0
    for optimizer in OPTIMIZERS:
        wanted, seed = done + kills // len(OPTIMIZERS), 0
        while done < wanted:
            work, url = Work(optimizer, seed, workers), new()
            expected = clean.rows(work)
            hit, within = _kill_until_it_ends(url, work, clean.seconds(work), chance, wanted - done)
            done, evaluating, studies, seed = done + hit, evaluating + within, studies + 1, seed + 1
            problems += damage(url, work, expected)
    counted = f"{done} kills, {evaluating} of them in an evaluation, of {studies} studies"
    return Found(f"{counted}: {', '.join(OPTIMIZERS)}; W = {workers}", problems)


def _kill_until_it_ends(
    url: str, work: Work, seconds: tuple[float, float], chance: random.Random, most: int
) -> tuple[int, int]:
    """Kill and start again until the study ends. Gives how many kills hit a process, and how many an evaluation."""
    opening, whole = seconds
    longest = (opening + 0.4 * (whole - opening)) * (1 if url.startswith("sqlite") else 3)  # a server is slower
    kills = evaluating = 0
    while True:
        child = Child(functools.partial(search, url, work))
        if kills >= most or child.wait(chance.uniform(0, longest)):
            child.value()
            return kills, evaluating
        child.kill()
        kills += child.was_killed
        with contextlib.suppress(Exception):  # the database may not be complete yet
            evaluating += any(row[3] == "RUNNING" for row in rows(url, work.name))


def commit_points(new: NewDatabase, clean: Clean, *, every: int) -> Found:
    """The coordinator is killed before and after each call that commits, and just before each COMMIT."""
    work = Work(evaluations=12, pause=0, failing=6)
    expected, problems = clean.rows(work), []
    points = range(1, 1 + Child(functools.partial(_die_at, 0, new(), work)).value(), every)
    for point in points:
        url = new()
        child = Child(functools.partial(_die_at, point, url, work))
        child.wait()
        if not child.was_killed:
            problems.append(f"point {point}: not killed but {child.result()}")
        kind, message = Child(functools.partial(search, url, work)).result()
        found = [f"{kind}: {message}"] if kind else damage(url, work, expected)
        problems += [f"point {point}: {problem}" for problem in found]
    failed = sum(row[3] == "FAIL" for row in expected)
    return Found(f"{len(points)} kills in a study of {work.evaluations} trials, {failed} of which fail", problems)


def _die_at(point: int, url: str, work: Work) -> int:
    """Search, and be killed at this point; with 0, gives how many points there are."""
    passed = 0

    def pass_point(*_: Any) -> None:
        nonlocal passed
        passed += 1
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def between_points(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            pass_point()
            result = original(*arguments, **options)
            pass_point()
            return result

        return call

    for name in COMMITTING:
        setattr(StoredStudy, name, between_points(getattr(StoredStudy, name)))
    store.create = between_points(store.create)
    sa.event.listen(sa.Engine, "commit", pass_point)
    search(url, work)
    return passed


def eight_coordinators(new: NewDatabase, *, repeats: int) -> Found:
    """Eight processes create the database and coordinate one study at once: one wins, the others leave."""
    slowest, problems = 0.0, []
    for _ in range(repeats):
        url, start, leave = new(), FORK.Barrier(9), FORK.Event()

        def coordinate(url: str = url, start: Any = start, leave: Any = leave) -> None:
            start.wait()
            with opened(url, write=True) as storage, StoredStudy.open_or_create(storage, "race", {}).hold():
                leave.wait()

        children = [Child(coordinate) for _ in range(8)]
        start.wait()
        began = time.monotonic()
        while time.monotonic() < began + 60 and sum(child.wait(0.01) for child in children) < 7:
            pass
        slowest = max(slowest, time.monotonic() - began)
        leave.set()
        answers = sorted(child.result()[0] for child in children)
        problems += [] if answers == ["", *["StudyStoreError"] * 7] else [str(answers)]
    return Found(f"{repeats} times one winner, 7 × StudyStoreError, the slowest after {slowest:.2f} s", problems)


def stopped_coordinator(new: NewDatabase, clean: Clean, *, times: int) -> Found:
    """A coordinator is stopped (SIGSTOP): a second one is refused and told who runs the study; the first goes on."""
    chance, problems = random.Random(10), []
    for number in range(times):
        work, url = Work("CMA", number, evaluations=40, pause=0.01), new()
        expected, trials = clean.rows(work), chance.randint(1, 20)
        first = Child(functools.partial(search, url, work))
        while len(rows(url, work.name)) < trials and not first.wait(0.01):
            pass
        _stop(first, url)
        kind, message = Child(functools.partial(search, url, work)).result()
        if kind != "StudyStoreError" or f"process {first.pid} " not in message:
            problems.append(f"{work.name}: the second ended with {kind} {message}")
        os.kill(first.pid, signal.SIGCONT)
        first.value()
        problems += damage(url, work, expected)
    return Found(f"{times} times refused with the first one's process", problems)


def _stop(child: Child, url: str) -> None:
    """Stop a child, but not while it holds the lock of an SQLite file, for which the next one would wait."""
    while True:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # until then a busy machine lets it go on
        if not url.startswith("sqlite"):
            return
        with (
            contextlib.suppress(sqlite3.OperationalError),
            contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=0)) as connection,
        ):
            connection.execute("BEGIN EXCLUSIVE")
            return
        os.kill(child.pid, signal.SIGCONT)
        time.sleep(0.003)
