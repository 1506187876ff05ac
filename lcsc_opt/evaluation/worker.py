"""What a worker process does: load the objective, then answer one job after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

from threadpoolctl import threadpool_limits

from lcsc_opt.base.code import changed_code
from lcsc_opt.base.errors import LcscError, ObjectiveError, StudyMismatchError
from lcsc_opt.base.progress import hand_notices_to
from lcsc_opt.evaluation.base import InProcessEvaluator
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.objective.contract import Objective, StagedObjective

Kind = Literal["submit", "sample", "slope"]
"""The names of :class:`Pipeline`'s methods; an objective without stages knows ``submit`` only."""


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """What a worker is started with; travels to it.

    Attributes:
        load_objective: builds the objective; picklable.
        expected: the fingerprint that it has to have; ``None`` checks nothing.
        threads: how many of the cores it may use.
        environment: set before torch looks for devices.
    """

    load_objective: Callable[[], Objective]
    expected: dict[str, Any] | None
    threads: int
    environment: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a method of the worker's evaluator, and the number that its answer comes back under."""

    number: int
    kind: Kind
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


READY, NOTICE = -1, -2
"""Numbers of answers to no job: the objective is loaded, or why it could not be; a line, which may be known."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a job gave, or the error that it ended with, pickled: one that cannot be read fails no other."""

    number: int
    content: bytes = b""


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a worker ended.

    Attributes:
        how: for people.
        reason: of the attempts that failed with it.
        counts: whether the worker itself is to blame, and not the machine that went away.
    """

    how: str
    reason: str
    counts: bool = True


class Coordinator(Protocol):
    """The way to the one who asks; both raise OSError where it is gone, and so may ``recv`` with EOFError."""

    def recv(self) -> Job:
        """Wait for a job."""
        ...

    def send(self, answer: Answer, /) -> None:
        """Say something."""
        ...


def serve(connection: Connection, settings: WorkerSettings) -> None:
    """Answer jobs, in a process of its own, until the coordinator closes the connection, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator, which then lets the workers go
    threading.Thread(target=_end_with_coordinator, daemon=True).start()
    answer_jobs(connection, settings)


def answer_jobs(coordinator: Coordinator, settings: WorkerSettings) -> None:
    """Load the objective, and answer jobs until the coordinator is gone."""
    os.environ.update(settings.environment)
    answers = _Answers(coordinator)
    hand_notices_to(answers.notice)
    try:
        evaluator = _evaluator(settings)
    except LcscError as error:
        answers.send(READY, error)  # and no jobs will come
    else:
        answers.ready()
    while True:
        try:
            job = coordinator.recv()
        except (EOFError, OSError):
            return
        future: Future[Any] = getattr(evaluator, job.kind)(*job.arguments, **job.options)
        future.add_done_callback(lambda done, number=job.number: answers.take(number, done))  # type: ignore[misc]


def _evaluator(settings: WorkerSettings) -> Pipeline | InProcessEvaluator:
    _use_threads(settings.threads)
    objective = settings.load_objective()
    threadpool_limits(settings.threads, user_api="blas")  # of what is loaded by now
    if settings.expected is not None and _as_json(objective.fingerprint()) != _as_json(settings.expected):
        code = changed_code(settings.expected["code"], objective.code)
        raise StudyMismatchError(
            f"a worker process found other code than the search began with: {code}; put it back"
            if code
            else "a worker process found other files than the search began with (checkpoints, reference or weights "
            "changed meanwhile); put them back, or pack the checkpoints first: lcsc trajectory pack"
        )
    return Pipeline(objective) if isinstance(objective, StagedObjective) else InProcessEvaluator(objective)


class _Answers:
    """The way back, used by several threads."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator, self._lock = coordinator, threading.Lock()

    def ready(self) -> None:
        """Say that jobs may come."""
        self._put(Answer(READY))

    def notice(self, message: str) -> None:
        """Leave it to the coordinator to say a line, since all workers give notice of the same things."""
        self.send(NOTICE, message)

    def take(self, number: int, done: Future[Any]) -> None:
        """Send what a future gave."""
        error = done.exception()
        self.send(number, done.result() if error is None else error)

    def send(self, number: int, value: Any) -> None:
        """Send a value, or an error that is to be raised."""
        try:
            content = pickle.dumps(value)
        except Exception as error:  # something of the user's that does not travel
            what = value if isinstance(value, BaseException) else error
            content = pickle.dumps(ObjectiveError(f"{type(what).__name__}: {what}"))
        self._put(Answer(number, content))

    def _put(self, answer: Answer) -> None:
        with self._lock, contextlib.suppress(OSError):  # nobody is there any more
            self._coordinator.send(answer)


def _as_json(description: dict[str, Any]) -> str:
    return json.dumps(description, sort_keys=True)


def _end_with_coordinator() -> None:
    """Leave when the coordinator is gone, killed even; nobody would fetch a result, and the device would stay taken."""
    coordinator = multiprocessing.parent_process()
    if coordinator is not None:
        multiprocessing.connection.wait([coordinator.sentinel])
        os._exit(1)


def _use_threads(threads: int) -> None:
    """Also of a torch that is imported later: that takes seconds, and not every objective needs it."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
