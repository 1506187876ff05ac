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
from lcsc_opt.base.errors import LcscError, ObjectiveError, StudyStoreError
from lcsc_opt.base.progress import hand_notices_to
from lcsc_opt.evaluation.base import InProcessEvaluator
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.objective.contract import Objective, StagedObjective

Kind = Literal["submit", "sample", "slope"]
"""The names of :class:`Pipeline`'s methods; an objective without stages knows ``submit`` only."""


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """The settings that a worker is started with; picklable.

    Attributes:
        load_objective: builds the objective; picklable.
        expected: the fingerprint that the objective must have; ``None`` checks nothing.
        threads: how many cores it may use.
        environment: variables to set before torch looks for devices.
    """

    load_objective: Callable[[], Objective]
    expected: dict[str, Any] | None
    threads: int
    environment: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a method of the worker's evaluator; its answer has the same number."""

    number: int
    kind: Kind
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


READY, NOTICE = -1, -2
"""Numbers of answers that belong to no job: the objective is loaded, or the error that prevents it; a notice."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of a job, or its error, pickled one by one: an answer that cannot be read fails no other."""

    number: int
    content: bytes = b""


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a worker ended.

    Attributes:
        how: for people.
        reason: the reason of the attempts that failed with it.
        counts: false where the machine went away, and the worker is not to blame.
    """

    how: str
    reason: str
    counts: bool = True


class Coordinator(Protocol):
    """The connection to the coordinator. Both methods raise OSError where it is gone; ``recv`` may raise EOFError."""

    def recv(self) -> Job:
        """Wait for a job."""
        ...

    def send(self, answer: Answer, /) -> None:
        """Send an answer."""
        ...


def serve(connection: Connection, settings: WorkerSettings) -> None:
    """Answer jobs, in a process of its own, until the coordinator closes the connection, or is gone."""
    for name in ("SIGINT", "SIGHUP"):  # Ctrl-C and a closed terminal are for the coordinator
        if hasattr(signal, name):  # Windows has no second one
            signal.signal(getattr(signal, name), signal.SIG_IGN)
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
        raise StudyStoreError(
            f"a worker process found other code than the search began with: {code}; put it back"
            if code
            else "a worker process found other files than the search began with (checkpoints, reference or weights "
            "changed meanwhile); put them back, or pack the checkpoints first: lcsc trajectory pack"
        )
    return Pipeline(objective) if isinstance(objective, StagedObjective) else InProcessEvaluator(objective)


class _Answers:
    """The connection back, shared by several threads."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator, self._lock = coordinator, threading.Lock()

    def ready(self) -> None:
        """Say that jobs may come."""
        self._put(Answer(READY))

    def notice(self, message: str) -> None:
        """Send a notice to the coordinator, which prints it once for all workers."""
        self.send(NOTICE, message)

    def take(self, number: int, done: Future[Any]) -> None:
        """Send the result of a future."""
        error = done.exception()
        self.send(number, done.result() if error is None else error)

    def send(self, number: int, value: Any) -> None:
        """Send a value, or an error for the coordinator to raise."""
        try:
            content = pickle.dumps(value)
        except Exception as error:  # something of the user's that cannot be pickled
            what = value if isinstance(value, BaseException) else error
            content = pickle.dumps(ObjectiveError(f"{type(what).__name__}: {what}"))
        self._put(Answer(number, content))

    def _put(self, answer: Answer) -> None:
        with self._lock, contextlib.suppress(OSError):  # nobody is there any more
            self._coordinator.send(answer)


def _as_json(description: dict[str, Any]) -> str:
    return json.dumps(description, sort_keys=True)


def _end_with_coordinator() -> None:
    """End this process when the coordinator is gone, also when it was killed: else the device would stay taken."""
    coordinator = multiprocessing.parent_process()
    if coordinator is not None:
        multiprocessing.connection.wait([coordinator.sentinel])
        os._exit(1)


def _use_threads(threads: int) -> None:
    """Limit the threads of torch, also if it is imported later: the import takes seconds, and not all objectives need
    it.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
