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
from typing import Any, Literal

from threadpoolctl import threadpool_limits

from lcsc_opt.base.errors import LcscError, ObjectiveError, StudyStoreError
from lcsc_opt.base.machine import let_waiting_threads_sleep
from lcsc_opt.base.progress import hand_notices_to
from lcsc_opt.evaluation.base import InProcessEvaluator
from lcsc_opt.evaluation.pipeline import Pipeline
from lcsc_opt.objective.contract import Objective, StagedObjective

Kind = Literal["submit", "sample", "vjp"]
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

    @classmethod
    def of(cls, number: int, value: Any) -> Answer:
        """Pickle a value, or an error for the coordinator to raise."""
        try:
            return cls(number, pickle.dumps(value))
        except Exception as error:  # something of the user's that cannot be pickled
            what = value if isinstance(value, BaseException) else error
            return cls(number, pickle.dumps(ObjectiveError(f"{type(what).__name__}: {what}")))

    @classmethod
    def of_future(cls, number: int, done: Future[Any]) -> Answer:
        """The result of a future, or its error."""
        error = done.exception()
        return cls.of(number, done.result() if error is None else error)


def serve(connection: Connection, settings: WorkerSettings) -> None:
    """Load the objective and answer jobs, in a process of its own, until the coordinator is gone."""
    for name in ("SIGINT", "SIGHUP"):  # Ctrl-C and a closed terminal are for the coordinator
        if hasattr(signal, name):  # Windows has no second one
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    coordinator, lock = multiprocessing.parent_process(), threading.Lock()

    def end_with_coordinator() -> None:  # also when it was killed: else the device would stay taken
        if coordinator is not None:
            multiprocessing.connection.wait([coordinator.sentinel])
            os._exit(1)

    threading.Thread(target=end_with_coordinator, daemon=True).start()

    def send(answer: Answer) -> None:
        with lock, contextlib.suppress(OSError):  # nobody is there any more
            connection.send(answer)

    let_waiting_threads_sleep()
    os.environ.update(settings.environment)
    hand_notices_to(lambda message: send(Answer.of(NOTICE, message)))
    try:
        evaluator = load_evaluator(settings)
    except LcscError as error:
        send(Answer.of(READY, error))  # and no jobs will come
    else:
        send(Answer(READY))
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        future: Future[Any] = getattr(evaluator, job.kind)(*job.arguments, **job.options)
        future.add_done_callback(lambda done, number=job.number: send(Answer.of_future(number, done)))  # type: ignore[misc]


def load_evaluator(settings: WorkerSettings) -> Pipeline | InProcessEvaluator:
    """Load the objective, with the threads that this worker may use.

    Raises:
        LcscError: it cannot be loaded.
        StudyStoreError: it is not the objective that the search began with.
    """
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # torch may be imported later, or never: that takes seconds
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(settings.threads)
    objective = settings.load_objective()
    threadpool_limits(settings.threads, user_api="blas")
    now, expected = (json.dumps(known, sort_keys=True) for known in (objective.fingerprint(), settings.expected))
    if settings.expected is not None and now != expected:
        raise StudyStoreError(
            "a worker process found other files than the search began with (code, checkpoints, reference or weights "
            "changed meanwhile); put them back, or pack the checkpoints first: lcsc trajectory pack"
        )
    return Pipeline(objective) if isinstance(objective, StagedObjective) else InProcessEvaluator(objective)
