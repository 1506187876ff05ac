"""Faults of processes: the coordinator is killed at random instants and at every commit point; workers are killed."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from stress_postgres import NO_SERVER, Server
from stress_search import (
    OPTIMIZERS,
    Child,
    ChildError,
    Clean,
    Row,
    Work,
    damage,
    digest,
    rows,
    search,
    sqlite_url,
    verdict,
)

from lcsc_opt.database import store
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation import ProcessEvaluator, WorkerPool
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.function import CoefficientFunction

COMMITTING = ("add_candidate", "finish", "fail", "note_attempts", "set_attribute")


def random_kills(folder: Path, clean: Clean, *, workers: int, kills: int, server: Server | None = None) -> Row:
    """SIGKILL the coordinator at random instants of many studies, with all optimizers."""
    chance, problems = random.Random(workers), list[str]()
    counts = {"studies": 0, "evaluating": 0, **({"in a transaction": 0} if server is None else {})}
    done = 0
    for optimizer in OPTIMIZERS:
        wanted, seed = done + kills // len(OPTIMIZERS), 0
        while done < wanted:
            work = Work(optimizer, seed, workers, evaluations=30 if workers == 1 else 24)
            name = f"killed-{workers}-{optimizer}-{seed}"
            url = sqlite_url(folder, name) if server is None else server.new_database()
            expected = clean.rows(work)
            done += _kill_until_it_ends(url, work, clean, chance, wanted - done, counts)
            problems += damage(url, work, expected)
            counts["studies"] += 1
            seed += 1
    counted = ", ".join(f"{count} {what}" for what, count in counts.items())
    found, ok = verdict(problems, f"{done} kills: {counted}; all equal")
    shuffled = "" if workers == 1 else ", completion shuffled"
    where = "" if server is None else ", PostgreSQL"
    return Row(
        f"SIGKILL of the coordinator at random instants, W = {workers}{shuffled}{where}",
        f"{done}, over {', '.join(OPTIMIZERS)}",
        "(number, coefficient bytes, value) identical to the clean run; integrity_check ok; none RUNNING",
        found,
        ok and done >= kills,
    )


def kills_postgres(folder: Path, server: Server | None, clean: Clean, *, kills: int) -> Row:
    """:func:`random_kills` with PostgreSQL, which must notice that its client is gone."""
    if server is None:
        return Row("SIGKILL of the coordinator, PostgreSQL", f"{kills} times", "rows equal", NO_SERVER, None)
    return random_kills(folder, clean, workers=1, kills=kills, server=server)


def _kill_until_it_ends(
    url: str, work: Work, clean: Clean, chance: random.Random, kills: int, counts: dict[str, int]
) -> int:
    """Kill and start again until the study ends. Returns how many kills hit a running process."""
    opening, whole = clean.seconds(work)
    longest = (opening + 0.4 * (whole - opening)) * (1 if url.startswith("sqlite") else 3)  # a server is slower
    hit = 0
    while True:
        child = Child(lambda: search(url, work))
        if hit >= kills or child.wait(chance.uniform(0, longest)):
            child.value()
            return hit
        child.kill()
        if child.status == 0:
            return hit
        hit += 1
        if "in a transaction" in counts:
            journal = Path(url.removeprefix("sqlite:///") + "-journal")
            counts["in a transaction"] += journal.exists() and journal.stat().st_size > 0
        with contextlib.suppress(Exception):  # the study may not exist yet
            counts["evaluating"] += any(row[3] == "RUNNING" for row in rows(url, work.name))


def commit_points(folder: Path, clean: Clean, *, every: int) -> Row:
    """SIGKILL before, in, and after each commit of a study in which some candidates fail."""
    work = Work(evaluations=20, pause=0, failing=6)
    expected = clean.rows(work)
    url = sqlite_url(folder, "points-count")
    calls, commits = Child(lambda: _counted(url, work)).value()
    cases = [("before", k) for k in range(1, calls + 1)] + [("after", k) for k in range(1, calls + 1)]
    cases += [("in", k) for k in range(1, commits + 1)]
    problems = []
    for side, k in cases[::every]:
        url = sqlite_url(folder, f"points-{side}-{k}")
        child = Child(functools.partial(_dying, url, work, side, k))
        child.wait()
        if child.status != -signal.SIGKILL:
            problems.append(f"{side} {k}: not killed but {child.result()}")
        try:
            Child(functools.partial(search, url, work)).value()
            problems += [f"{side} {k}: {problem}" for problem in damage(url, work, expected)]
        except ChildError as error:
            problems.append(f"{side} {k}: {error}")
        _remove(url)
    failed = sum(row[3] == "FAIL" for row in expected)
    found, ok = verdict(
        problems, f"{len(cases[::every])} kills, 0 lost, 0 doubled; {failed} of 20 trials FAIL with 3 attempts each"
    )
    return Row(
        "SIGKILL before and after every commit point",
        f"{calls} calls that commit, before and after; {commits} COMMITs, just before each"
        + (f"; every {every}th" if every > 1 else ""),
        "0 lost, 0 doubled; equals the clean run",
        found,
        ok,
    )


def _remove(url: str) -> None:
    Path(url.removeprefix("sqlite:///")).unlink()


def _counted(url: str, work: Work) -> tuple[int, int]:
    with _fail_points("count", 0) as counts:
        search(url, work)
    return counts["calls"], counts["commits"]


def _dying(url: str, work: Work, side: str, k: int) -> None:
    with _fail_points(side, k):
        search(url, work)


@contextlib.contextmanager
def _fail_points(side: str, k: int) -> Iterator[dict[str, int]]:
    """Die before or after the k-th call that commits, or when the k-th COMMIT is about to be sent."""
    counts = {"calls": 0, "commits": 0}

    def wrapped(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts["calls"] += 1
            now = counts["calls"] == k
            if now and side == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if now and side == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def commit(_: Any) -> None:
        counts["commits"] += 1
        if counts["commits"] == k and side == "in":
            os.kill(os.getpid(), signal.SIGKILL)

    for name in COMMITTING:
        setattr(StoredStudy, name, wrapped(getattr(StoredStudy, name)))
    store.create = wrapped(store.create)
    sa.event.listen(sa.Engine, "commit", commit)
    yield counts


def logging_objective(log: str, seconds: float, deadly: str = "") -> Objective:
    """An objective that logs which process evaluates what, and kills it for the candidate ``deadly`` (``*``: any)."""
    work = Work(pause=seconds)

    def loss(coefficients: np.ndarray) -> float:
        name = digest(coefficients)
        _append(log, f"{os.getpid()} start {name}\n")
        if deadly in ("*", name):
            os.kill(os.getpid(), signal.SIGKILL)
        value = work.loss(coefficients)
        _append(log, f"{os.getpid()} end {name}\n")
        return value

    return CoefficientFunction(loss, work.steps, name="stress:loss")


def _append(log: str, line: str) -> None:
    with Path(log).open("a") as file:
        file.write(line)


def with_workers(url: str, work: Work, log: Path, *, deadly: str = "", failures: Any = None) -> int:
    """Search with real worker processes."""
    load = functools.partial(logging_objective, str(log), work.pause, deadly)
    with contextlib.closing(WorkerPool(load, work.workers)) as pool:
        return search(url, work, evaluator=ProcessEvaluator(pool), failures=failures)


def _evaluating(log: Path) -> dict[int, str]:
    """Worker process → the candidate that it evaluates now."""
    now: dict[int, str] = {}
    for process, what, name in _log(log):
        now[process] = name
        if what == "end":
            del now[process]
    return now


def _log(log: Path) -> list[tuple[int, str, str]]:
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(process), what, name) for process, what, name in lines]


def workers_killed(folder: Path, clean: Clean, *, kills: int) -> Row:
    """SIGKILL one of four worker processes while it evaluates, then others."""
    work = Work("CMA", workers=4, evaluations=12 + 60 * kills, pause=0.3)
    expected = clean.rows(Work("CMA", workers=4, evaluations=work.evaluations))
    url, log = sqlite_url(folder, "workers"), folder / "workers.log"
    child = Child(lambda: with_workers(url, work, log))
    victims: dict[int, str] = {}
    while len(victims) < kills and not child.wait(0.05):
        busy = {process: name for process, name in _evaluating(log).items() if process not in victims}
        if len(busy) == 4 and len({name for _, what, name in _log(log) if what == "end"}) >= 4 + 8 * len(victims):
            victim = min(busy)
            os.kill(victim, signal.SIGKILL)
            victims[victim] = busy[victim]
    child.value()
    starts = [name for _, what, name in _log(log) if what == "start"]
    again = {name: starts.count(name) for name in starts if starts.count(name) > 1}
    processes = {process for process, _, _ in _log(log)}
    found = rows(url, work.name)
    attempts = [(digest(np.frombuffer(row[1])), reason) for row in found for reason in row[5]]
    problems = [] if [row[:4] for row in found] == [row[:4] for row in expected] else ["rows differ"]
    if again != dict.fromkeys(victims.values(), 2):
        problems.append(f"evaluated more than once: {again}, killed: {victims}")
    if sorted(name for name, _ in attempts) != sorted(victims.values()):
        problems.append(f"attempts: {attempts}")
    if any("worker process died" not in reason for _, reason in attempts) or len(processes) != 4 + kills:
        problems.append(f"{len(processes)} worker processes, {attempts}")
    text, ok = verdict(
        problems,
        f"{len(attempts)} failed attempts of {len(starts)}, the same candidate COMPLETE at its second, "
        f"{len(processes)} processes in all; rows equal",
    )
    return Row(
        "1 of 4 worker processes SIGKILLed while it evaluates",
        f"{len(victims)} times",
        "that attempt only; same candidate retried; others undisturbed; rows equal the clean run",
        text,
        ok and len(victims) == kills,
    )


def workers_orphaned(folder: Path, clean: Clean) -> Row:
    """SIGKILL the coordinator while its four workers evaluate; then continue."""
    work = Work("CMA", workers=4, evaluations=24, pause=0.3)
    expected = clean.rows(Work("CMA", workers=4, evaluations=work.evaluations))
    url, log = sqlite_url(folder, "orphans"), folder / "orphans.log"
    child = Child(lambda: with_workers(url, work, log))
    while len(_evaluating(log)) < 4 and not child.wait(0.05):
        pass
    workers = set(_evaluating(log))
    child.kill()
    start = time.monotonic()
    while (left := [process for process in workers if _is_alive(process)]) and time.monotonic() < start + 10:
        time.sleep(0.02)
    seconds = time.monotonic() - start
    Child(lambda: with_workers(url, work, log)).value()
    same = [row[:4] for row in rows(url, work.name)] == [row[:4] for row in expected]
    problems = [f"{len(left)} left after 10 s"] * bool(left) + ["rows differ"] * (not same)
    found, ok = verdict(problems, f"all {len(workers)} gone after {seconds:.1f} s; continued study equal")
    return Row(
        "coordinator SIGKILLed while 4 worker processes evaluate",
        "once",
        "worker processes end within 10 s; the continued study equals the clean run",
        found,
        ok and len(workers) == 4,
    )


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
