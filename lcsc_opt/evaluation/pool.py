"""A pool of workers: it hands out jobs, takes answers, and replaces workers that die."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import pickle
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from lcsc_opt.base.errors import LcscError, ObjectiveError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Candidate, NodeWork
from lcsc_opt.evaluation.base import Failure, Outcome
from lcsc_opt.evaluation.census import Census
from lcsc_opt.evaluation.machines import Link, Machines
from lcsc_opt.evaluation.processes import ThisMachine
from lcsc_opt.evaluation.turns import FairQueue
from lcsc_opt.evaluation.worker import NOTICE, READY, Answer, Job, Kind, WorkerSettings
from lcsc_opt.objective.contract import Objective

MOST_DEATHS = 3  # in a row, without a single answer in between; then a worker is not started again


@dataclasses.dataclass
class _Waiting:
    """A job that somebody waits for."""

    job: Job
    worker: int | None  # the one that has to do it; None for any
    depth: int  # how many jobs a worker may have with this one
    user: Hashable = None  # who submitted it
    future: Future[Any] = dataclasses.field(default_factory=Future)
    started: float = 0.0

    def cancel(self) -> None:
        """Tell those who wait for it that it will not be done."""
        if not self.future.cancelled() and self.future.cancel():
            self.future.set_running_or_notify_cancel()


class Workers(Protocol):
    """A pool of workers, or one user's share of it."""

    def __len__(self) -> int: ...

    @property
    def alive(self) -> int:
        """How many workers answer now."""
        ...

    def nodes(self) -> list[NodeWork]:
        """What the workers of each machine do."""
        ...

    def submit(
        self, kind: Kind, *arguments: Any, worker: int | None = None, depth: int = 1, **options: Any
    ) -> Future[Any]:
        """Queue a job; see :meth:`WorkerPool.submit`."""
        ...


class WorkerPool:
    """Workers that start with the first job. One that dies fails only its own jobs, and is replaced.

    Args:
        load_objective: builds the objective in each worker; a picklable callable.
        workers: how many.
        expected: the fingerprint that each worker's objective must have, since files may have changed meanwhile. With
            another one, futures raise StudyStoreError. ``None`` checks nothing.
        environments: what each worker sets in its environment.
        machines: where workers run; ``None`` is processes on this machine, which share its cores.
    """

    def __init__(
        self,
        load_objective: Callable[[], Objective],
        workers: int,
        *,
        expected: dict[str, Any] | None = None,
        environments: Sequence[Mapping[str, str]] = (),
        machines: Machines | None = None,
    ) -> None:
        self._closing = False
        self._numbers = itertools.count()
        self._queue: FairQueue[_Waiting] = FairQueue()
        self._lock = threading.RLock()
        self._machines = ThisMachine() if machines is None else machines
        threads = self._machines.threads(workers)
        own = environments or [{}] * workers
        self._census = Census()
        settings = [WorkerSettings(load_objective, expected, threads, environment) for environment in own]
        self._workers = [
            _Worker(self._hand_out, self._machines, self._census, one, n) for n, one in enumerate(settings)
        ]

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def alive(self) -> int:
        """How many workers have loaded the objective and answer now."""
        return sum(worker.ready for worker in self._workers)

    def nodes(self) -> list[NodeWork]:
        """What the workers of each machine do, by its name; also of those that are gone."""
        return self._census.nodes()

    def submit(
        self,
        kind: Kind,
        *arguments: Any,
        worker: int | None = None,
        depth: int = 1,
        user: Hashable = None,
        **options: Any,
    ) -> Future[Any]:
        """Queue a job.

        Args:
            kind: the method of the worker's evaluator.
            arguments: its positional arguments.
            worker: the number of the worker that has to do it; ``None`` is the next free one.
            depth: a worker counts as free while it has fewer jobs than this.
            user: who submits; users are served in turns.
            options: keyword arguments of the method.

        Returns:
            A future of the job's answer, or of a :class:`Failure` where the worker died. It raises ObjectiveError where
            no worker stays alive, and is cancelled when the pool is closed.
        """
        waiting = _Waiting(Job(next(self._numbers), kind, arguments, options), worker, depth, user)
        with self._lock:
            self._queue.add(waiting)
        self._hand_out()
        return waiting.future

    def close(self) -> None:
        """Stop the workers, also in the middle of a job, and cancel all futures."""
        with self._lock:
            self._closing = True
        for worker in self._workers:
            worker.terminate()
        left = [waiting for worker in self._workers for waiting in worker.join()]
        for waiting in left:
            waiting.cancel()
        self._hand_out()

    def share(self) -> Share:
        """A view of the pool for one of several users."""
        return Share(self)

    def withdraw(self, user: Hashable) -> None:
        """Cancel a user's jobs that no worker has begun."""
        with self._lock:
            left = self._queue.withdraw(user)
        for waiting in left:
            waiting.cancel()

    def _hand_out(self) -> None:
        """Hand waiting jobs to the workers with the fewest jobs, users in turns."""
        with self._lock:
            if self._closing:
                for waiting in self._queue.clear():
                    waiting.cancel()
            while self._hand_out_one():
                pass

    def _hand_out_one(self) -> bool:
        """Hand out one job, or fail one that no worker is left for. Returns whether there may be more to do."""
        running = collections.Counter(waiting.user for worker in self._workers for waiting in worker.jobs())
        for waiting in self._queue.in_turn(running):
            allowed = self._workers if waiting.worker is None else self._instead_of(waiting.worker)
            alive = [worker for worker in allowed if not worker.given_up]
            for worker in alive:
                worker.ensure_started()
            free = [worker for worker in alive if worker.ready and worker.load < waiting.depth]
            if free:
                if min(free, key=lambda worker: worker.load).send(waiting):
                    self._queue.take(waiting)
                return True
            if not alive:
                self._queue.take(waiting)
                waiting.future.set_exception(ObjectiveError(allowed[0].given_up))
                return True
        return False

    def _instead_of(self, number: int) -> Sequence[_Worker]:
        """The workers that may do its jobs: itself; all of them where workers come and go and it is missing."""
        own = self._workers[number]
        return self._workers if self._machines.elastic and not own.ready else [own]


class Share:
    """The workers as seen by one of several users that share them.

    Args:
        pool: the workers.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool

    def __len__(self) -> int:
        return len(self._pool)

    @property
    def alive(self) -> int:
        """How many of the workers answer now."""
        return self._pool.alive

    def nodes(self) -> list[NodeWork]:
        """What the workers of each machine do, for all users together."""
        return self._pool.nodes()

    def submit(
        self, kind: Kind, *arguments: Any, worker: int | None = None, depth: int = 1, **options: Any
    ) -> Future[Any]:
        """Queue a job of this user."""
        return self._pool.submit(kind, *arguments, worker=worker, depth=depth, user=self, **options)

    def close(self) -> None:
        """Cancel this user's waiting jobs; the workers stay for the others."""
        self._pool.withdraw(self)


class _Worker:
    """One worker, those that replace it, and the thread that takes their answers."""

    def __init__(
        self, changed: Callable[[], None], machines: Machines, census: Census, settings: WorkerSettings, number: int
    ) -> None:
        self._changed, self._machines, self._settings, self._number = changed, machines, settings, number
        self._census, self._machine = census, ""
        self._lock = threading.RLock()
        self._jobs: dict[int, _Waiting] = {}
        self._link: Link | None = None
        self._reader: threading.Thread | None = None
        self._closing = False
        self._deaths = 0
        self._refusal: LcscError | None = None
        self.ready = False
        self.given_up = ""

    @property
    def load(self) -> int:
        """How many jobs this worker has."""
        return len(self._jobs)

    def jobs(self) -> list[_Waiting]:
        """The jobs that this worker has now."""
        return list(self._jobs.values())

    def ensure_started(self) -> None:
        with self._lock:
            if self._link is not None or self._closing:
                return
            try:
                self._link = self._machines.start(self._settings)
            except OSError as error:
                self.given_up = (
                    f"worker {self._number} cannot be started: {error}; close other programs, or set workers"
                )
                return
            self._reader = threading.Thread(target=self._read, args=(self._link,), daemon=True)
            self._reader.start()

    def send(self, waiting: _Waiting) -> bool:
        """Give it a job. Returns whether it took it: it may have died since it was chosen."""
        if self._refusal is not None:
            waiting.future.set_exception(self._refusal)
            return True
        waiting.started = time.perf_counter()
        with self._lock:
            if self._link is None or not self.ready:
                return False
            if not self._jobs:
                self._census.count(self._machine, busy=1)
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
        """Wait until the worker is gone; returns its unfinished jobs."""
        link, reader = self._link, self._reader
        if link is not None and reader is not None:
            link.join()
            reader.join()
        return self.jobs()

    def _read(self, link: Link) -> None:
        while True:
            try:
                answer = link.receive()
            except (EOFError, OSError):
                break
            if answer.number == READY:
                if answer.content:
                    self._refusal = self._machines.refused(link, pickle.loads(answer.content))  # noqa: S301 - our own
                    if self._refusal is None:
                        link.terminate()
                        break
                self._machine, self.ready = link.machine, True
                self._census.count(self._machine, alive=1)
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
            if not self._jobs:
                self._census.count(self._machine, busy=-1)
            self._deaths = 0
        try:
            value = pickle.loads(answer.content)  # noqa: S301 - of our own worker
        except Exception as error:
            waiting.future.set_exception(ObjectiveError(f"what a worker answered cannot be read: {error}"))
            return
        if isinstance(value, BaseException):
            waiting.future.set_exception(value)
        else:
            waiting.future.set_result(value)

    def _bury(self, link: Link) -> None:
        """Fail the jobs of a worker that died. The next job starts a new one, unless workers die again and again."""
        was_ready, self.ready = self.ready, False
        ending = link.join()
        with self._lock:
            if self._closing:
                return
            lost, self._jobs = self._jobs, {}
            died = was_ready or ending.counts
            self._census.count(link.machine, alive=-was_ready, busy=-bool(lost), deaths=int(died))
            self._link = None
            self._deaths += ending.counts
            if self._deaths >= MOST_DEATHS:
                self.given_up = (
                    f"worker {self._number} died {self._deaths} times in a row ({ending.how}); give it more memory, "
                    "or run with fewer workers"
                )
                notice(f"{self.given_up}; the other workers go on")
        for waiting in lost.values():
            waiting.future.set_result(Failure(ending.reason, time.perf_counter() - waiting.started))


class ProcessEvaluator:
    """Candidates spread over workers.

    Args:
        pool: the workers; the caller closes them.
        depth: how many candidates one worker has at once: two where the stages of its evaluations overlap.
    """

    def __init__(self, pool: Workers, *, depth: int = 1) -> None:
        self._pool, self._depth = pool, depth

    def submit(self, candidate: Candidate, *, gradient: bool = False) -> Future[Outcome]:
        """Queue a candidate for the next worker that is free."""
        return self._pool.submit("submit", candidate, gradient=gradient, depth=self._depth)

    def close(self) -> None:
        """Leave the workers to the pool's other users."""
