"""A pool of workers: it hands out jobs, takes answers, and replaces workers that die."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import pickle
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import Any, Protocol

from lcsc_opt.base.errors import LcscError, ObjectiveError
from lcsc_opt.base.machine import cores
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Candidate, NodeWork
from lcsc_opt.evaluation.base import Failure, Outcome
from lcsc_opt.evaluation.worker import NOTICE, READY, Answer, Job, Kind, WorkerSettings, serve
from lcsc_opt.objective.contract import Objective

_MOST_DEATHS = 3  # in a row, without a single answer in between; then a worker is not started again


class _Link(Protocol):
    """The connection to one worker that was started.

    ``machine`` is the name of the one that it runs on, empty while this is not known. If the worker is gone, ``send``
    raises OSError, and ``receive`` EOFError or OSError; ``terminate`` stops it, also in the middle of a job. ``join``
    waits until it is gone, and says how it ended and whether that counts: not if its machine went away.
    """

    @property
    def machine(self) -> str: ...

    def send(self, job: Job) -> None: ...

    def receive(self) -> Answer: ...

    def terminate(self) -> None: ...

    def join(self) -> tuple[str, bool]: ...


class _Machines(Protocol):
    """Other machines where workers run; they come and go, and others do the jobs of a missing one.

    ``start`` asks for a worker that starts when there is room, and raises OSError if that fails. ``refused`` gives the
    error for the jobs of a worker that could not load the objective, or ``None`` to start it elsewhere.
    """

    def start(self, settings: WorkerSettings) -> _Link: ...

    def refused(self, link: _Link, error: LcscError) -> LcscError | None: ...


_preparing = threading.Lock()


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """While this is open, started processes do not run the user's script again: they need nothing of it.

    So the script needs no ``if __name__ == "__main__"``.
    """
    with _preparing:
        prepare = spawn.get_preparation_data

        def prepare_nothing(name: str) -> dict[str, Any]:
            return {key: value for key, value in prepare(name).items() if not key.startswith("init_main")}

        spawn.get_preparation_data = prepare_nothing
        try:
            yield
        finally:
            spawn.get_preparation_data = prepare


class _Process:
    """The connection to one process."""

    def __init__(self, settings: WorkerSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection: Connection
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, settings))
        named = b"__main__" in pickle.dumps(settings)
        with contextlib.nullcontext() if named else _without_script():
            self._process.start()
        other.close()
        self.machine = platform.node()

    def send(self, job: Job) -> None:
        self._connection.send(job)

    def receive(self) -> Answer:
        answer: Answer = self._connection.recv()
        return answer

    def terminate(self) -> None:
        self._process.terminate()

    def join(self) -> tuple[str, bool]:
        self._process.join()
        return f"the worker process died (killed, or out of memory; exit code {self._process.exitcode})", True


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A job that somebody waits for: the worker that has to do it (``None``: any), and how many jobs that may have."""

    job: Job
    worker: int | None
    depth: int
    future: Future[Any] = dataclasses.field(default_factory=Future)
    started: float = 0.0

    def cancel(self) -> None:
        if not self.future.cancelled() and self.future.cancel():
            self.future.set_running_or_notify_cancel()


class WorkerPool:
    """Workers that start with the first job. One that dies fails only its own jobs, and is replaced.

    Args:
        load_objective: builds the objective in each worker; a picklable callable.
        workers: how many.
        expected: the fingerprint that each worker's objective must have, since files may have changed meanwhile. With
            another one, futures raise StudyStoreError. ``None`` checks nothing.
        environments: what each worker sets in its environment.
        threads: how many each worker may use; ``None`` is its share of this machine's cores.
        machines: where workers run; ``None`` is processes on this machine.
    """

    def __init__(
        self,
        load_objective: Callable[[], Objective],
        workers: int,
        *,
        expected: dict[str, Any] | None = None,
        environments: Sequence[Mapping[str, str]] = (),
        threads: int | None = None,
        machines: _Machines | None = None,
    ) -> None:
        self._closing = False
        self._numbers = itertools.count()
        self._queue: dict[int, _Waiting] = {}
        self._lock = threading.RLock()
        self._elastic, threads = machines is not None, threads or max(cores() // workers, 1)
        settings = [WorkerSettings(load_objective, expected, threads, e) for e in environments or [{}] * workers]
        self._workers = [_Worker(self._hand_out, machines, known, number) for number, known in enumerate(settings)]

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def alive(self) -> int:
        """How many workers have loaded the objective and answer now."""
        return sum(worker.ready for worker in self._workers)

    def nodes(self) -> list[NodeWork]:
        """The workers of each machine, by its name; also of one whose workers died."""
        alive = Counter(worker.machine for worker in self._workers if worker.ready)
        deaths = sum((worker.deaths.copy() for worker in self._workers), Counter[str]())
        return [NodeWork(name, alive[name], deaths[name]) for name in sorted({*alive, *deaths})]

    def submit(
        self, kind: Kind, *arguments: Any, worker: int | None = None, depth: int = 1, **options: Any
    ) -> Future[Any]:
        """Queue a job. Jobs for the same worker, or for any, keep their order.

        Args:
            kind: the method of the worker's evaluator.
            arguments: its positional arguments.
            worker: the number of the worker that has to do it; ``None`` is the next free one.
            depth: a worker counts as free while it has fewer jobs than this.
            options: keyword arguments of the method.

        Returns:
            A future of the job's answer, or of a :class:`Failure` if the worker died. It raises ObjectiveError if
            no worker stays alive, and is cancelled when the pool is closed.
        """
        waiting = _Waiting(Job(next(self._numbers), kind, arguments, options), worker, depth)
        with self._lock:
            self._queue[waiting.job.number] = waiting
        self._hand_out()
        return waiting.future

    def close(self) -> None:
        """Stop the workers, also in the middle of a job, and cancel all futures."""
        with self._lock:
            self._closing = True
        for worker in self._workers:
            worker.terminate()
        for waiting in [waiting for worker in self._workers for waiting in worker.join()]:
            waiting.cancel()
        self._hand_out()

    def _hand_out(self) -> None:
        with self._lock:
            blocked: set[int | None] = set()
            for number, waiting in list(self._queue.items()):
                if self._closing:
                    waiting.cancel()
                elif number not in self._queue or waiting.worker in blocked:
                    continue
                elif not self._place(waiting):
                    blocked.add(waiting.worker)
                    continue
                self._queue.pop(number, None)

    def _place(self, waiting: _Waiting) -> bool:
        """Give a job to the worker with the fewest jobs, or fail it if none is left; false if it has to wait."""
        while True:
            allowed: Sequence[_Worker] = self._workers
            if waiting.worker is not None:
                own = self._workers[waiting.worker]  # its jobs go to others if workers come and go, and it is missing
                allowed = self._workers if self._elastic and not own.ready else [own]
            for worker in allowed:
                worker.ensure_started()
            alive = [worker for worker in allowed if not worker.given_up]
            if not alive:
                waiting.future.set_exception(ObjectiveError(allowed[0].given_up))
                return True
            free = [worker for worker in alive if worker.ready and worker.load < waiting.depth]
            if not free:
                return False
            if min(free, key=lambda worker: worker.load).send(waiting):
                return True


class _Worker:
    """One worker, those that replace it, and the thread that takes their answers."""

    def __init__(
        self,
        changed: Callable[[], None],
        machines: _Machines | None,
        settings: WorkerSettings,
        number: int,
    ) -> None:
        self._changed, self._machines, self._settings, self._number = changed, machines, settings, number
        self.machine, self.deaths = "", Counter[str]()  # where it is, where it died
        self._lock = threading.RLock()
        self._jobs: dict[int, _Waiting] = {}
        self._link: _Link | None = None
        self._reader: threading.Thread | None = None
        self._closing = False
        self._in_a_row = 0
        self._refusal: LcscError | None = None
        self.ready = False
        self.given_up = ""

    @property
    def load(self) -> int:
        return len(self._jobs)

    def ensure_started(self) -> None:
        with self._lock:
            if self._link is not None or self._closing or self.given_up:
                return
            try:
                made = _Process(self._settings) if self._machines is None else self._machines.start(self._settings)
            except OSError as error:
                self.given_up = f"worker {self._number} cannot be started: {error}; close programs, or set workers"
                return
            self._link = made
            self._reader = threading.Thread(target=self._read, args=(made,), daemon=True)
            self._reader.start()

    def send(self, waiting: _Waiting) -> bool:
        """Returns whether the worker took the job: it may have died since it was chosen."""
        if self._refusal is not None:
            waiting.future.set_exception(self._refusal)
            return True
        waiting.started = time.perf_counter()
        with self._lock:
            if self._link is None or not self.ready:
                return False
            self._jobs[waiting.job.number] = waiting
            with contextlib.suppress(OSError):  # it died: the reader sees that, too
                self._link.send(waiting.job)
        return True

    def terminate(self) -> None:
        with self._lock:
            self._closing = True
            if self._link is not None:
                self._link.terminate()

    def join(self) -> list[_Waiting]:
        """Its unfinished jobs, when it is gone."""
        link, reader = self._link, self._reader
        if link is not None and reader is not None:
            link.join()
            reader.join()
        return list(self._jobs.values())

    def _read(self, link: _Link) -> None:
        while True:
            try:
                answer = link.receive()
            except (EOFError, OSError):
                break
            if answer.number == READY:
                if answer.content:
                    error = pickle.loads(answer.content)  # noqa: S301 - of our own worker
                    self._refusal = error if self._machines is None else self._machines.refused(link, error)
                    if self._refusal is None:
                        link.terminate()
                        break
                self.machine, self.ready = link.machine, True
            elif answer.number == NOTICE:
                notice(pickle.loads(answer.content))  # noqa: S301 - of our own worker
            else:
                self._take(answer)
            self._changed()
        self._bury(link)
        self._changed()

    def _take(self, answer: Answer) -> None:
        with self._lock:
            waiting = self._jobs.pop(answer.number)
            self._in_a_row = 0
        try:
            value = pickle.loads(answer.content)  # noqa: S301 - of our own worker
        except Exception as error:
            value = ObjectiveError(f"what a worker answered cannot be read: {error}")
        if isinstance(value, BaseException):
            waiting.future.set_exception(value)
        else:
            waiting.future.set_result(value)

    def _bury(self, link: _Link) -> None:
        """Fail the jobs of a worker that died. The next job starts a new one, unless workers die again and again."""
        was_ready, self.ready = self.ready, False
        how, counts = link.join()
        with self._lock:
            if self._closing:
                return
            lost, self._jobs = self._jobs, {}
            self.deaths[link.machine] += was_ready or counts
            self._link = None
            self._in_a_row += counts
            if self._in_a_row >= _MOST_DEATHS:
                lost_again = f"worker {self._number} was lost {self._in_a_row} times in a row: {how}"
                self.given_up = f"{lost_again}; give it more memory, or run with fewer workers"
                notice(f"{self.given_up}; the other workers go on")
        for waiting in lost.values():
            waiting.future.set_result(Failure(how, time.perf_counter() - waiting.started))


class ProcessEvaluator:
    """Candidates spread over workers.

    Args:
        pool: the workers; the caller closes them.
        depth: how many candidates one worker has at once: two if the stages of its evaluations overlap.
    """

    def __init__(self, pool: WorkerPool, *, depth: int = 1) -> None:
        self._pool, self._depth = pool, depth

    def submit(self, candidate: Candidate, *, gradient: bool = False) -> Future[Outcome]:
        """Queue a candidate for the next worker that is free."""
        return self._pool.submit("submit", candidate, gradient=gradient, depth=self._depth)

    def close(self) -> None:
        """The caller closes the workers."""
