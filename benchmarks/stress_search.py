"""The search that the faults of ``stress.py`` are injected into, in its own process, and what its study must hold."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pickle
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from lcsc_opt.base.records import Candidate
from lcsc_opt.base.study_file import BudgetSpec, FailureSpec, OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation import Evaluator, InProcessEvaluator, Outcome, evaluate_safely
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.function import CoefficientFunction
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.search.runner import Search, most_in_flight

OPTIMIZERS = ("LCSC", "CMA", "DE", "OnePlusOne", "EMAGrid")
PATIENCE = 300.0  # seconds; a child that takes longer counts as hanging

Rows = list[tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. ``ok`` is ``None`` if this machine cannot inject the fault."""

    fault: str
    injected: str
    required: str
    found: str
    ok: bool | None


@dataclasses.dataclass(frozen=True)
class Work:
    """A search over a function of coefficients.

    ``pause`` is the seconds of an evaluation. If ``failing`` is not 0, about one of ``failing`` candidates raises, each
    time it is evaluated.
    """

    optimizer: str = "LCSC"
    seed: int = 0
    workers: int = 1
    evaluations: int = 30
    checkpoints: int = 20
    pause: float = 0.002
    failing: int = 0

    @property
    def name(self) -> str:
        """The name of the study."""
        return f"stress/{self.optimizer}/{self.seed}"

    @property
    def steps(self) -> tuple[int, ...]:
        """``[K]`` training steps."""
        return tuple(range(100, 100 * self.checkpoints + 100, 100))

    def loss(self, coefficients: np.ndarray) -> float:
        """A smooth function; no EMA reaches its optimum."""
        time.sleep(self.pause)
        if self.failing and int(digest(coefficients), 16) % self.failing == 0:
            raise RuntimeError(f"fails for {digest(coefficients)}")
        target = np.linspace(-0.3, 0.4, len(coefficients))
        return float(np.square(coefficients - target / target.sum()).sum())

    def objective(self) -> Objective:
        """The function as an objective."""
        return CoefficientFunction(self.loss, self.steps, name="stress:loss")

    def build_optimizer(self) -> Any:
        """A fresh optimizer, as at the beginning of every run of the study."""
        space = AffineSpace(self.steps, default_origin(self.steps))
        return build_optimizer(
            OptimizerSpec(name=self.optimizer), space, budget=self.evaluations, workers=self.workers, seed=self.seed
        )

    def evaluator(self) -> Evaluator:
        """An evaluator in this process; with several workers, candidates finish in random order."""
        objective = self.objective()
        return InProcessEvaluator(objective) if self.workers == 1 else ShuffledEvaluator(objective, self.workers)


def digest(coefficients: np.ndarray) -> str:
    """A short name for a candidate."""
    return hashlib.sha256(np.ascontiguousarray(coefficients).tobytes()).hexdigest()[:12]


class ShuffledEvaluator:
    """Finishes candidates in a random order, which differs between processes."""

    def __init__(self, objective: Objective, workers: int) -> None:
        self.workers, self._objective, self._random = workers, objective, random.Random(os.getpid())

    def submit(self, candidate: Candidate, *, gradient: bool = False) -> Future[Outcome]:
        """Finish after a random delay, in another thread."""
        future: Future[Outcome] = Future()
        outcome = evaluate_safely(self._objective, candidate, gradient=gradient)
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


def search(
    url: str,
    work: Work,
    *,
    evaluator: Evaluator | None = None,
    failures: FailureSpec | None = None,
) -> int:
    """Run a search as ``lcsc run`` does, once. Returns how many trials were told."""
    evaluator = work.evaluator() if evaluator is None else evaluator
    try:
        with opened(url, write=True) as storage:
            study = StoredStudy.open_or_create(storage, work.name, {"steps": list(work.steps)})
            with study.hold():
                asking = work.build_optimizer()
                failures = FailureSpec(stop_share=1) if failures is None else failures
                budget, width = BudgetSpec(evaluations=work.evaluations), most_in_flight(work.workers)
                running = Search(study, asking, evaluator, budget=budget, in_flight=width, failures=failures)
                running.run()
                study.set_attribute("search_ended", {"evaluations": running.told, "exhausted": False})
                return running.told
    finally:
        evaluator.close()


def sqlite_url(folder: Path, name: str) -> str:
    """The URL of a database in the folder."""
    return f"sqlite:///{folder / name}.db"


def rows(url: str, name: str) -> Rows:
    """Everything in a study that must not depend on faults; empty if the study does not exist."""
    with opened(url) as storage:
        return [
            (
                trial.number,
                np.array(trial.user_attrs["coefficients"]).tobytes(),
                trial.value,
                trial.state.name,
                trial.user_attrs.get("reason"),
                tuple(attempt["reason"] for attempt in trial.user_attrs.get("attempts", ())),
                trial.user_attrs.get("tell_index"),
            )
            for trial in StoredStudy.open(storage, name).trials()
        ]


def damage(url: str, work: Work, clean: Rows) -> list[str]:
    """The differences between a study and the undisturbed one; empty if there are none."""
    found, problems = rows(url, work.name), []
    numbers = [row[0] for row in found]
    if numbers != list(range(len(clean))):
        missing, doubled = set(range(len(clean))) - set(numbers), len(numbers) - len(set(numbers))
        problems.append(f"{len(missing)} lost, {doubled} doubled")
    if running := [row[0] for row in found if row[3] == TrialState.RUNNING.name]:
        problems.append(f"left RUNNING: {running}")
    names = ("number", "coefficients", "value", "state", "reason", "attempts", "tell_index")
    for expected, row in zip(clean, found, strict=False):
        problems += [f"{name} of trial {row[0]}" for name, a, b in zip(names, expected, row, strict=True) if a != b]
    if url.startswith("sqlite"):
        with opened(url) as storage, storage.engine.connect() as connection:
            if (answer := connection.execute(sa.text("PRAGMA integrity_check")).scalar()) != "ok":
                problems.append(f"integrity_check: {answer}")
    return [f"{work.name} W={work.workers}: {problem}" for problem in problems[:3]]


class Child:
    """A forked process that calls ``work``, and sends back its result or its exception."""

    def __init__(self, work: Callable[[], Any]) -> None:
        reading, writing = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.close(reading)
            _answer(work, writing)
        os.close(writing)
        self._answer, self._ended = reading, os.pidfd_open(self.pid)
        self.status: int | None = None

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Whether it ended within so many seconds."""
        if self.status is None and select.select([self._ended], [], [], seconds)[0]:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._ended)
        return self.status is not None

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.status is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process is gone."""
        self.signal(signal.SIGKILL)
        self.wait()

    def result(self) -> tuple[str, Any]:
        """``("", value)``, or the name of the exception and its message; ``("killed", …)`` if nothing was sent."""
        if not self.wait():
            self.kill()
            return "hung", f"no end after {PATIENCE:g} s"
        with os.fdopen(self._answer, "rb") as pipe:
            content = pipe.read()
        return pickle.loads(content) if content else ("killed", f"exit status {self.status}")

    def value(self) -> Any:
        """The returned value; raises :class:`ChildError` if there is none."""
        kind, value = self.result()
        if kind:
            raise ChildError(f"{kind}: {value}")
        return value


class ChildError(RuntimeError):
    """A process that should have finished did not."""


def _answer(work: Callable[[], Any], pipe: int) -> None:
    """Work in the child process, and end it. Its output goes to a log."""
    log = os.open(os.environ["STRESS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        answer = ("", work())
    except BaseException as error:
        traceback.print_exc()
        answer = (type(error).__name__, str(error))
    sys.stderr.flush()
    os.write(pipe, pickle.dumps(answer))
    os._exit(1 if answer[0] else 0)


class Clean:
    """Undisturbed studies, each run once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._known = folder, dict[Work, tuple[Rows, float, float]]()

    def rows(self, work: Work) -> Rows:
        """The rows that the study must hold."""
        return self._of(work)[0]

    def seconds(self, work: Work) -> tuple[float, float]:
        """How long a process takes to open the study and replay it, and to run it from the start."""
        return self._of(work)[1:]

    def _of(self, work: Work) -> tuple[Rows, float, float]:
        if work not in self._known:
            url = sqlite_url(self._folder, f"clean{len(self._known)}")
            seconds = []
            for _ in range(2):
                start = time.perf_counter()
                Child(lambda: search(url, work)).value()
                seconds.append(time.perf_counter() - start)
            self._known[work] = (rows(url, work.name), seconds[1], seconds[0])
        return self._known[work]


def verdict(problems: Sequence[str], found: str) -> tuple[str, bool]:
    """The text for the table (the figures, and the first problems), and whether there are no problems."""
    return (f"{found}; {len(problems)} wrong: {' | '.join(problems[:3])}" if problems else found), not problems
