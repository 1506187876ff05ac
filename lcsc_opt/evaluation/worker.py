"""What a worker does: load the objective, then answer one job after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import Any, Literal

from threadpoolctl import threadpool_limits

from lcsc_opt.base.errors import LcscError, ObjectiveError, StudyStoreError
from lcsc_opt.base.machine import let_waiting_threads_sleep
from lcsc_opt.base.progress import hand_notices_to
from lcsc_opt.evaluation.base import InProcessEvaluator
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.objective.key import Key

Kind = Literal["submit", "sample", "vjp"]
"""The names of :class:`Pipeline`'s methods; an objective without stages has ``submit`` only."""


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """The settings that a worker is started with; picklable.

    Attributes:
        load_objective: builds the objective; picklable.
        expected: the key that the objective must have; ``None`` checks nothing.
        threads: how many cores the worker may use.
        environment: further environment variables, such as those that hide other workers' devices.
    """

    load_objective: Callable[[], Objective]
    expected: Key | None
    threads: int
    environment: Mapping[str, str]

    def variables(self) -> dict[str, str]:
        """The environment variables that must be set before torch is imported."""
        return {**self.environment, "OMP_NUM_THREADS": str(self.threads)}


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a method of the worker's evaluator; its answer has the same number."""

    number: int
    kind: Kind
    arguments: tuple[Any, ...]

    def pickled(self) -> bytes:
        """The job as it is sent to a worker. Raises ObjectiveError if an argument cannot be pickled."""
        try:
            return pickle.dumps(self)
        except Exception as error:  # a class of the user's may refuse in any way
            raise ObjectiveError(
                f"cannot be sent to a worker, since it cannot be pickled ({type(error).__name__}: {error}); "
                "run with workers: 1"
            ) from error


READY = -1
"""The number of the answer that says that the objective is loaded, or gives the error that prevents it."""

NOTICE = -2
"""The number of an answer that is a notice for the user."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of a job, or its error.

    Each content is pickled by itself, so one that cannot be unpickled fails no other job.
    """

    number: int
    content: bytes = b""

    @property
    def value(self) -> Any:
        """What the worker answered, or its error; an ObjectiveError for what cannot be unpickled."""
        try:
            return pickle.loads(self.content)  # noqa: S301 - of our own worker
        except Exception as error:  # unpickling a class of the user's may raise anything
            return ObjectiveError(f"the answer of a worker cannot be read: {type(error).__name__}: {error}")

    @classmethod
    def of(cls, number: int, value: Any) -> Answer:
        """Pickle a value, or an error for the coordinator to raise."""
        try:
            return cls(number, pickle.dumps(value))
        except Exception as pickling_error:  # a class of the user's may refuse in any way
            error = value if isinstance(value, BaseException) else pickling_error
            readable = ObjectiveError(f"{type(error).__name__}: {error}")
            return cls(number, pickle.dumps(readable))

    @classmethod
    def of_future(cls, number: int, done: Future[Any]) -> Answer:
        """The result of a future, or its error."""
        error = done.exception()
        if error is not None:
            return cls.of(number, error)
        return cls.of(number, done.result())


def main() -> None:
    """Run a worker process that :class:`lcsc_opt.evaluation.process.WorkerProcess` has started.

    Its standard input is the connection to the coordinator.
    """
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C and a closed terminal are for the coordinator
        signal.signal(number, signal.SIG_IGN)
    connection = _take_standard_input()
    let_waiting_threads_sleep()  # before the preparation imports torch
    try:
        # apart, since settings can be unpickled only after the preparation has set the module path
        preparation = connection.recv_bytes()
        settings = connection.recv_bytes()
    except (EOFError, OSError):  # the coordinator is gone already
        return
    spawn.prepare(pickle.loads(preparation))  # noqa: S301 - of our own coordinator, as the next
    serve(connection, pickle.loads(settings))  # noqa: S301


def _take_standard_input() -> Connection:
    """The connection behind standard input, which is empty from now on: the user's code must not read from it."""
    connection = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return connection


def serve(connection: Connection, settings: WorkerSettings) -> None:
    """Load the objective, then answer jobs until :func:`_receive` ends this process, as the coordinator is gone."""
    sending = threading.Lock()

    def send(answer: Answer) -> None:
        with sending, contextlib.suppress(OSError):  # the coordinator is gone
            connection.send(answer)

    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    hand_notices_to(lambda message: send(Answer.of(NOTICE, message)))
    try:
        evaluator = load_evaluator(settings)
    except LcscError as error:
        send(Answer.of(READY, error))  # no job will come: wait to be stopped
    else:
        send(Answer(READY))
    while True:
        job = jobs.get()
        begin = getattr(evaluator, job.kind)
        future: Future[Any] = begin(*job.arguments)
        # bound now: the loop continues with other jobs before this one is done
        future.add_done_callback(lambda done, number=job.number: send(Answer.of_future(number, done)))  # type: ignore[misc]


def _receive(connection: Connection, jobs: queue.SimpleQueue[Job]) -> None:
    """Queue jobs, and end this process with the coordinator, also when that was killed and an evaluation runs here.

    Otherwise the device would stay occupied. A job that cannot be unpickled ends this process, too, and so counts as
    failed.
    """
    while True:
        try:
            pickled_job = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)
        try:
            jobs.put(pickle.loads(pickled_job))  # noqa: S301 - of our own coordinator
        except BaseException:  # unpickling a class of the user's may raise anything
            traceback.print_exc()
            os._exit(1)


def load_evaluator(settings: WorkerSettings) -> Pipeline | InProcessEvaluator:
    """Load the objective, with the threads that this worker may use.

    Raises:
        LcscError: it cannot be loaded.
        StudyStoreError: it is not the objective that the search began with.
    """
    if "torch" in sys.modules:  # otherwise it reads OMP_NUM_THREADS when it is imported, which may be never
        sys.modules["torch"].set_num_threads(settings.threads)
    objective = settings.load_objective()
    # now that the objective's libraries are loaded: this limits no others
    threadpool_limits(settings.threads, user_api="blas")
    if settings.expected is not None:
        changed = settings.expected.changes_to(objective.key)
        if changed:
            raise StudyStoreError(
                f"a worker process loaded other files than the search began with: {'; '.join(changed)}; restore them, "
                "or pack the checkpoints first: lcsc trajectory pack"
            )
    if isinstance(objective, StagedObjective):
        return Pipeline(objective)
    return InProcessEvaluator(objective)
