"""The search that the faults of ``stress.py`` are injected into, in a process of its own, and what its study holds."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_spec import BudgetSpec, FailureSpec, OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Evaluator, InProcessEvaluator, Outcome, evaluate_safely
from lcsc_opt.objective.contract import CoefficientFunction, Objective
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.study.loop import Loop
from lcsc_opt.study.planning import most_in_flight

FORK = multiprocessing.get_context("fork")
OPTIMIZERS = ("LCSC", "CMA", "DE", "OnePlusOne", "EMAGrid")
PATIENCE = 300.0  # seconds; a child that takes longer counts as hanging
STEPS = tuple(range(100, 2100, 100))

NewDatabase = Callable[[], str]
Rows = list[tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Found:
    """What was seen of a fault, and what was not as required."""

    seen: str
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class Work:
    """A search over a function of 20 coefficients.

    ``pause`` is the seconds of an evaluation. If ``failing`` is not 0, about one of ``failing`` candidates raises, each
    time it is evaluated.
    """

    optimizer: str = "LCSC"
    seed: int = 0
    workers: int = 1
    evaluations: int = 30
    pause: float = 0.002
    failing: int = 0

    @property
    def name(self) -> str:
        """The name of the study."""
        return f"stress/{self.optimizer}/{self.seed}"

    def loss(self, coefficients: np.ndarray) -> float:
        """A smooth function; no EMA reaches its optimum."""
        time.sleep(self.pause)
        if self.failing and int(digest(coefficients), 16) % self.failing == 0:
            raise RuntimeError(f"fails for {digest(coefficients)}")
        target = np.linspace(-0.3, 0.4, len(coefficients))
        return float(np.square(coefficients - target / target.sum()).sum())

    def objective(self) -> Objective:
        """The function as an objective."""
        return CoefficientFunction(self.loss, STEPS, name="stress:loss")


def digest(coefficients: np.ndarray) -> str:
    """A short name for a candidate."""
    return hashlib.sha256(np.ascontiguousarray(coefficients).tobytes()).hexdigest()[:12]


class ShuffledEvaluator:
    """Finishes candidates in a random order, which differs between processes."""

    def __init__(self, objective: Objective) -> None:
        self._objective, self._random = objective, random.Random(os.getpid())

    def submit(self, candidate: Candidate) -> Future[Outcome]:
        """Finish after a random delay, in another thread."""
        future: Future[Outcome] = Future()
        outcome = evaluate_safely(self._objective, candidate)
        threading.Timer(self._random.random() * 0.02, lambda: future.set_result(outcome)).start()
        return future

    def close(self) -> None:
        """Does nothing: there is nothing to release."""


@contextlib.contextmanager
def opened(url: str, *, write: bool = False) -> Iterator[RDBStorage]:
    """A storage that leaves no connection behind: a forked process would share it."""
    storage = open_storage(url, write=write)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def search(url: str, work: Work, evaluator: Evaluator | None = None) -> None:
    """Run a search as ``lcsc run`` does."""
    if evaluator is None:
        evaluator = (InProcessEvaluator if work.workers == 1 else ShuffledEvaluator)(work.objective())
    space, spec = AffineSpace(STEPS, default_origin(STEPS)), OptimizerSpec(name=work.optimizer)
    optimizer = build_optimizer(spec, space, budget=work.evaluations, workers=work.workers, seed=work.seed)
    with contextlib.closing(evaluator), opened(url, write=True) as storage:
        study = StoredStudy.open_or_create(storage, work.name, {"steps": list(STEPS)})
        with study.hold():
            budget, failures = BudgetSpec(evaluations=work.evaluations), FailureSpec(in_a_row=None)
            width = most_in_flight(work.workers)
            running = Loop(
                study,
                Driver(lambda: optimizer, "the optimizer"),
                evaluator,
                budget=budget,
                in_flight=width,
                failures=failures,
            )
            running.run()
            study.set_attribute("search_ended", {"evaluations": running.told, "exhausted": False})


def rows(url: str, name: str) -> Rows:
    """Everything in a study that must not depend on faults; empty if the study does not exist."""
    try:
        with opened(url) as storage:
            return [
                (
                    trial.number,
                    coefficients_of(trial).tobytes(),
                    trial.value,
                    trial.state.name,
                    trial.user_attrs.get("reason"),
                    tuple(attempt["reason"] for attempt in trial.user_attrs.get("attempts", ())),
                )
                for trial in StoredStudy.open(storage, name).trials()
            ]
    except StudyStoreError:
        return []


def damage(url: str, work: Work, clean: Rows) -> list[str]:
    """The differences between a study and the undisturbed one; empty if there are none."""
    found, problems = rows(url, work.name), []
    numbers = [row[0] for row in found]
    if numbers != list(range(len(clean))):
        missing, doubled = set(range(len(clean))) - set(numbers), len(numbers) - len(set(numbers))
        problems.append(f"{len(missing)} lost, {doubled} doubled")
    names = ("number", "coefficients", "value", "state", "reason", "attempts")
    for expected, row in zip(clean, found, strict=False):
        problems += [f"{name} of trial {row[0]}" for name, a, b in zip(names, expected, row, strict=True) if a != b]
    if url.startswith("sqlite"):
        with opened(url) as storage, storage.engine.connect() as connection:
            if (answer := connection.execute(sa.text("PRAGMA integrity_check")).scalar()) != "ok":
                problems.append(f"integrity_check: {answer}")
    return [f"{work.name} W={work.workers}: {problem}" for problem in problems[:3]]


class Child:
    """A forked process that calls ``work``, and sends back its result or its exception. Its output goes to a log."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._answer, sent = FORK.Pipe(duplex=False)
        self._process = FORK.Process(target=_work, args=(work, sent))
        self._process.start()
        sent.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid or 0)

    @property
    def was_killed(self) -> bool:
        """Whether it ended by SIGKILL."""
        return self._process.exitcode == -signal.SIGKILL

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Whether it ended within so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process is gone."""
        self._process.kill()
        self._process.join()

    def result(self) -> tuple[str, Any]:
        """``("", value)``, or the name of the exception and its message; ``("killed", …)`` if nothing was sent."""
        if not self._answer.poll(PATIENCE):
            self.kill()
            return "hung", f"no answer after {PATIENCE:g} s"
        try:
            kind, value = self._answer.recv()
        except EOFError:
            kind, value = "killed", ""
        self._process.join()
        return kind, value

    def value(self) -> Any:
        """The returned value; raises RuntimeError if there is none."""
        kind, value = self.result()
        if kind:
            raise RuntimeError(f"{kind}: {value}")
        return value


def _work(work: Callable[[], Any], answer: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(os.environ["STRESS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        answer.send(("", work()))
    except BaseException as error:
        traceback.print_exc()
        answer.send((type(error).__name__, str(error)))


class Clean:
    """Undisturbed studies, each run once."""

    def __init__(self, new: NewDatabase) -> None:
        self._new, self._known = new, dict[Work, tuple[Rows, float, float]]()

    def rows(self, work: Work) -> Rows:
        """The rows that the study must hold."""
        return self._of(work)[0]

    def seconds(self, work: Work) -> tuple[float, float]:
        """How long a process takes to open the study and replay it, and to run it from the start."""
        return self._of(work)[1:]

    def _of(self, work: Work) -> tuple[Rows, float, float]:
        if work not in self._known:
            url, seconds = self._new(), []
            for _ in range(2):
                start = time.perf_counter()
                Child(lambda: search(url, work)).value()
                seconds.append(time.perf_counter() - start)
            self._known[work] = (rows(url, work.name), seconds[1], seconds[0])
        return self._known[work]


def sqlite_url(folder: Path) -> str:
    """The URL of the database that ``lcsc`` makes in a folder."""
    return f"sqlite:///{folder / 'studies.db'}"
