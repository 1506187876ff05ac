"""Worker processes on this machine, each with an objective of its own on a device of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Candidate
from lcsc_opt.evaluation.base import Failure, Outcome
from lcsc_opt.evaluation.devices import cores
from lcsc_opt.evaluation.worker import NOTICE, READY, Answer, Job, Kind, WorkerSettings, serve
from lcsc_opt.objective.contract import Objective

DIED = "the worker process died (killed, or out of memory)"
MOST_DEATHS = 3  # in a row, without a single answer in between; then a worker is not started again


@dataclasses.dataclass
class _Waiting:
    """A job that somebody waits for."""

    job: Job
    worker: int | None  # which has to do it; None for any
    depth: int  # how many jobs a worker may have with this one
    future: Future[Any] = dataclasses.field(default_factory=Future)
    started: float = 0.0


class WorkerPool:
    """Worker processes, started with the first job; one that dies fails only the jobs that it had, and is replaced.

    Args:
        load_objective: builds the objective inside each process; a picklable callable.
        workers: how many processes. The cores that this process may use are divided among them.
        expected: the fingerprint that the objective of each process has to have: files may have changed since the
            coordinator loaded its own. Where it does not, futures raise StudyMismatchError. ``None`` checks nothing.
        environments: what each worker sets in its environment.
    """

    def __init__(
        self,
        load_objective: Callable[[], Objective],
        workers: int,
        *,
        expected: dict[str, Any] | None = None,
        environments: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self._closing = False
        self._numbers = itertools.count()
        self._queue: list[_Waiting] = []
        self._lock = threading.RLock()
        threads = max(cores() // workers, 1)
        own = environments or [{}] * workers
        settings = [WorkerSettings(load_objective, expected, threads, environment) for environment in own]
        self._processes = [_Process(self._hand_out, one, number) for number, one in enumerate(settings)]

    def __len__(self) -> int:
        return len(self._processes)

    def submit(
        self, kind: Kind, *arguments: Any, worker: int | None = None, depth: int = 1, **options: Any
    ) -> Future[Any]:
        """Queue a job.

        Args:
            kind: what to do.
            arguments: of it.
            worker: which one has to do it; ``None`` for the next one that is free.
            depth: a worker is free for this job while it has fewer than so many.
            options: of what to do, too.

        Returns:
            What the job gives, or a :class:`Failure` where the process died. Raises ObjectiveError where no worker
            can be kept alive; it is cancelled when the pool is closed.
        """
        waiting = _Waiting(Job(next(self._numbers), kind, arguments, options), worker, depth)
        with self._lock:
            self._queue.append(waiting)
        self._hand_out()
        return waiting.future

    def close(self) -> None:
        """Stop the processes, also in the middle of a job; what is waited for is cancelled."""
        with self._lock:
            self._closing = True
        for process in self._processes:
            process.terminate()
        left = [waiting for process in self._processes for waiting in process.join()]
        for waiting in left:
            waiting.future.cancel()
        self._hand_out()

    def _hand_out(self) -> None:
        """Give what waits, in its order, to those who have the least to do."""
        with self._lock:
            for waiting in tuple(self._queue):
                if self._closing:
                    self._queue.remove(waiting)
                    waiting.future.cancel()
                    continue
                allowed = self._processes if waiting.worker is None else [self._processes[waiting.worker]]
                alive = [process for process in allowed if not process.given_up]
                for process in alive:
                    process.ensure_started()
                free = [process for process in alive if process.ready and process.load < waiting.depth]
                if free:
                    self._queue.remove(waiting)
                    min(free, key=lambda process: process.load).send(waiting)
                elif not alive:
                    self._queue.remove(waiting)
                    waiting.future.set_exception(ObjectiveError(allowed[0].given_up))


class _Process:
    """One worker process, and the thread that takes its answers."""

    def __init__(self, changed: Callable[[], None], settings: WorkerSettings, number: int) -> None:
        self._changed, self._settings, self._number = changed, settings, number
        self._lock = threading.RLock()
        self._jobs: dict[int, _Waiting] = {}
        self._process: multiprocessing.process.BaseProcess | None = None
        self._reader: threading.Thread | None = None
        self._closing = False
        self._deaths = 0
        self.ready = False
        self.given_up = ""

    @property
    def load(self) -> int:
        """How many jobs it has."""
        return len(self._jobs)

    def ensure_started(self) -> None:
        with self._lock:
            if self._process is not None or self._closing:
                return
            context = multiprocessing.get_context("spawn")
            try:
                self._connection, other = context.Pipe()
                process = context.Process(target=serve, args=(other, self._settings))
                process.start()
            except OSError as error:
                self.given_up = (
                    f"worker {self._number} cannot be started: {error}; close other programs, or set workers"
                )
                return
            other.close()
            self._process = process
            self._reader = threading.Thread(target=self._read, args=(self._connection,), daemon=True)
            self._reader.start()

    def send(self, waiting: _Waiting) -> None:
        waiting.started = time.perf_counter()
        with self._lock:
            self._jobs[waiting.job.number] = waiting
            with contextlib.suppress(OSError):  # it died: the reader sees that, too
                self._connection.send(waiting.job)

    def terminate(self) -> None:
        with self._lock:
            self._closing = True
            if self._process is not None:
                self._process.terminate()

    def join(self) -> list[_Waiting]:
        """Wait until it is gone; gives what it has not done."""
        process, reader = self._process, self._reader
        if process is not None and reader is not None:
            process.join()
            reader.join()
        return list(self._jobs.values())

    def _read(self, connection: Any) -> None:
        while True:
            try:
                answer: Answer = connection.recv()
            except (EOFError, OSError):
                break
            if answer.number == READY:
                self.ready = True
            elif answer.number == NOTICE:
                notice(pickle.loads(answer.content))  # noqa: S301 - of our own process
            else:
                self._take(answer)
            self._changed()
        self._bury()
        self._changed()

    def _take(self, answer: Answer) -> None:
        with self._lock:
            waiting = self._jobs.pop(answer.number)
            self._deaths = 0
        try:
            value = pickle.loads(answer.content)  # noqa: S301 - of our own process
        except Exception as error:
            waiting.future.set_exception(ObjectiveError(f"what a worker answered cannot be read: {error}"))
            return
        if isinstance(value, BaseException):
            waiting.future.set_exception(value)
        else:
            waiting.future.set_result(value)

    def _bury(self) -> None:
        """Fail what the process had when it died; the next job starts another one, unless it dies again and again."""
        with self._lock:
            process = self._process
            if self._closing or process is None:
                return
            process.join()
            self._connection.close()
            lost, self._jobs = self._jobs, {}
            self._process, self.ready = None, False
            self._deaths += 1
            if self._deaths >= MOST_DEATHS:
                self.given_up = (
                    f"worker {self._number} died {self._deaths} times in a row (exit code {process.exitcode}); give it "
                    "more memory, or run with fewer workers"
                )
                notice(f"{self.given_up}; the other workers go on")
        for waiting in lost.values():
            waiting.future.set_result(Failure(DIED, time.perf_counter() - waiting.started))


class ProcessEvaluator:
    """Candidates spread over worker processes.

    Args:
        pool: the processes, which are somebody else's to close.
        depth: how many candidates one process has at once: two where the stages of its evaluations overlap.
    """

    def __init__(self, pool: WorkerPool, *, depth: int = 1) -> None:
        self._pool, self._depth = pool, depth

    def submit(self, candidate: Candidate, *, gradient: bool = False) -> Future[Outcome]:
        """Queue a candidate for the next process that is free."""
        return self._pool.submit("submit", candidate, gradient=gradient, depth=self._depth)

    def close(self) -> None:
        """The processes stay, for the next one who evaluates there."""
