"""Worker processes on this machine, each with an objective of its own on a device of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from lcsc_opt.evaluation.base import Failure, Outcome
from lcsc_opt.evaluation.devices import cores
from lcsc_opt.evaluation.worker import Answer, Job, Kind, WorkerSettings, serve
from lcsc_opt.objective import Objective
from lcsc_opt.records import Candidate

DIED = "the worker process died (killed, or out of memory)"


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
        expected: what the objective of each process has to describe itself as: files may have changed since the
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
        self._settings = [WorkerSettings(load_objective, expected, threads, environment) for environment in own]
        self._processes: list[_Process] = []

    def __len__(self) -> int:
        return len(self._settings)

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
            What the job gives, or a :class:`Failure` where the process died.
        """
        with self._lock:
            if not self._processes and not self._closing:
                self._processes = [_Process(self._free, one) for one in self._settings]
            waiting = _Waiting(Job(next(self._numbers), kind, arguments, options), worker, depth)
            self._queue.append(waiting)
            self._hand_out()
        return waiting.future

    def close(self) -> None:
        """Stop the processes, also in the middle of a job; the futures of these are cancelled."""
        with self._lock:
            self._closing = True
            left, self._queue = self._queue, []
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            left += process.join()
        for waiting in left:
            waiting.future.cancel()

    def _free(self) -> None:
        with self._lock:
            self._hand_out()

    def _hand_out(self) -> None:
        """Give what waits, in its order, to those who have the least to do."""
        if self._closing:
            return
        for waiting in tuple(self._queue):
            allowed = self._processes if waiting.worker is None else [self._processes[waiting.worker]]
            process = min(allowed, key=lambda process: process.load)
            if process.load < waiting.depth:
                self._queue.remove(waiting)
                process.send(waiting)


class _Process:
    """One worker process, and the thread that takes its answers."""

    def __init__(self, free: Callable[[], None], settings: WorkerSettings) -> None:
        self._free, self._settings = free, settings
        self._lock = threading.Lock()
        self._jobs: dict[int, _Waiting] = {}
        self._closing = False
        self._start()
        self._reader = threading.Thread(target=self._read, daemon=True, name="lcsc-answers")
        self._reader.start()

    @property
    def load(self) -> int:
        """How many jobs it has."""
        return len(self._jobs)

    def send(self, waiting: _Waiting) -> None:
        waiting.started = time.perf_counter()
        with self._lock:
            self._jobs[waiting.job.number] = waiting
            with contextlib.suppress(OSError):  # it died: the reader sees that, too
                self._connection.send(waiting.job)

    def terminate(self) -> None:
        with self._lock:
            self._closing = True
            self._process.terminate()

    def join(self) -> list[_Waiting]:
        """Wait until it is gone; gives what it has not done."""
        self._process.join()
        self._reader.join()
        return list(self._jobs.values())

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, self._settings))
        self._process.start()
        other.close()

    def _read(self) -> None:
        while True:
            try:
                answer: Answer = self._connection.recv()
            except (EOFError, OSError):
                if not self._restarted():
                    return
                self._free()
                continue
            with self._lock:
                waiting = self._jobs.pop(answer.number)
            if answer.error is None:
                waiting.future.set_result(answer.value)
            else:
                waiting.future.set_exception(answer.error)
            self._free()

    def _restarted(self) -> bool:
        """Whether a new process is there in place of the one that died, whose jobs have failed."""
        with self._lock:
            if self._closing:
                return False
            self._process.join()
            self._connection.close()
            lost, self._jobs = self._jobs, {}
            self._start()
        for waiting in lost.values():
            waiting.future.set_result(Failure(DIED, time.perf_counter() - waiting.started))
        return True


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
