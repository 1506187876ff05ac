"""A pool of workers: it hands out jobs, receives answers, and replaces workers that die."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from lcsc_opt.base.errors import LcscError, ObjectiveError
from lcsc_opt.base.machine import cores
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Candidate
from lcsc_opt.evaluation.base import Failure, Outcome
from lcsc_opt.evaluation.process import WorkerProcess
from lcsc_opt.evaluation.worker import NOTICE, READY, Answer, Job, Kind, WorkerSettings
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.key import Key

_POLL_SECONDS = 1.0
_MOST_DEATHS = 3  # in a row, without a single answer in between; then a worker is not started again


class _Link(Protocol):
    """The connection to one worker that was started."""

    def send(self, pickled_job: bytes) -> None:
        """Give the worker a job. Raises OSError if it is gone."""

    def receive(self) -> Answer:
        """Wait for its next answer. Raises EOFError or OSError if it is gone."""

    def terminate(self) -> None:
        """Stop it, also in the middle of a job."""

    def join(self) -> tuple[str, bool]:
        """Wait until it is gone.

        Returns:
            How it ended, and whether that counts as a death; it does not if its machine went away.
        """


class _Machines(Protocol):
    """Other machines where workers run; they come and go, and others do the jobs of a missing one."""

    def start(self, settings: WorkerSettings) -> _Link:
        """Ask for a worker, which starts when there is room. Raises OSError if that fails."""

    def refused(self, link: _Link, error: LcscError) -> LcscError:
        """The error for the jobs of a worker that could not load the objective."""


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A job that a caller waits for.

    Attributes:
        job: the call of the evaluator.
        worker: the number of the worker that has to do it; ``None`` is any.
        most_jobs: a worker gets the job only if it then has at most this many jobs.
        future: the future of the job's answer.
        started: when it was handed out, by ``time.perf_counter``.
    """

    job: Job
    worker: int | None
    most_jobs: int
    future: Future[Any] = dataclasses.field(default_factory=Future)
    started: float = 0.0

    def cancel(self) -> None:
        """Cancel the future, and notify: until then, ``concurrent.futures.wait`` does not count it as done."""
        if not self.future.cancelled() and self.future.cancel():
            self.future.set_running_or_notify_cancel()


class WorkerPool:
    """Workers that start with the first job. One that dies fails only its own jobs, and is replaced.

    Args:
        load_objective: builds the objective in each worker; a picklable callable.
        workers: how many there are.
        expected: the key that each worker's objective must have, since files may have changed meanwhile. With
            another one, futures raise StudyStoreError. ``None`` checks nothing.
        environments: the environment variables of each worker; empty if there are none to set.
        threads: how many each worker may use; ``None`` is its share of this machine's cores.
        machines: where workers run; ``None`` is processes on this machine.
    """

    def __init__(
        self,
        load_objective: Callable[[], Objective],
        workers: int,
        *,
        expected: Key | None = None,
        environments: Sequence[Mapping[str, str]] = (),
        threads: int | None = None,
        machines: _Machines | None = None,
    ) -> None:
        self._closing = False
        self._numbers = itertools.count()
        self._queue: dict[int, _Waiting] = {}
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)  # of a worker
        self._elastic = machines is not None
        threads = threads or max(cores() // workers, 1)
        self._workers = []
        for number, environment in enumerate(environments or [{}] * workers):
            settings = WorkerSettings(load_objective, expected, threads, environment)
            self._workers.append(_Worker(self._hand_out, machines, settings, number))

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def alive(self) -> int:
        """How many workers have loaded the objective and answer now."""
        return sum(worker.ready for worker in self._workers)

    def submit(self, kind: Kind, *arguments: Any, worker: int | None = None, most_jobs: int = 1) -> Future[Any]:
        """Queue a job. Jobs for the same worker, or for any, keep their order.

        Args:
            kind: the method of the worker's evaluator.
            arguments: its arguments.
            worker: the number of the worker that has to do it; ``None`` is the next free one.
            most_jobs: a worker gets the job only if it then has at most this many jobs.

        Returns:
            A future of the job's answer, or of a :class:`Failure` if the worker died. It raises ObjectiveError if
            no worker stays alive, and is cancelled when the pool is closed.
        """
        waiting = _Waiting(Job(next(self._numbers), kind, arguments), worker, most_jobs)
        with self._lock:
            self._queue[waiting.job.number] = waiting
        self._hand_out()
        return waiting.future

    def wait_until_ready(self) -> None:
        """Start the workers, and wait until each takes jobs, or never will; of machines that come and go, for one.

        So no time that is measured from now on has the start of workers in it.
        """
        enough = any if self._elastic else all
        with self._news:
            while True:
                for worker in self._workers:
                    worker.ensure_started()
                if enough(worker.ready or worker.given_up for worker in self._workers):
                    return
                self._news.wait(_POLL_SECONDS)  # one that died is started again

    def close(self) -> None:
        """Stop the workers, also in the middle of a job, and cancel all futures."""
        with self._lock:
            self._closing = True
        for worker in self._workers:
            worker.terminate()
        unfinished = [waiting for worker in self._workers for waiting in worker.join()]
        for waiting in unfinished:
            waiting.cancel()
        self._hand_out()

    def _hand_out(self) -> None:
        """Give queued jobs to workers that are free; with a closed pool, cancel them."""
        with self._news:
            self._news.notify_all()
            blocked: set[int | None] = set()  # workers with an earlier job that has to wait: later ones must not pass
            for number, waiting in list(self._queue.items()):
                if self._closing:
                    waiting.cancel()
                elif number not in self._queue or waiting.worker in blocked:
                    # a future that ended may have called this method again, which handed the job out
                    continue
                elif not self._place(waiting):
                    blocked.add(waiting.worker)
                    continue
                self._queue.pop(number, None)

    def _place(self, waiting: _Waiting) -> bool:
        """Give a job to the worker with the fewest jobs, or fail it if none is left; false if it has to wait."""
        while True:  # until a worker takes it: the chosen one may have died meanwhile
            allowed = self._allowed(waiting)
            for worker in allowed:
                worker.ensure_started()
            usable = [worker for worker in allowed if not worker.given_up]
            if not usable:
                waiting.future.set_exception(ObjectiveError(allowed[0].given_up))
                return True
            free = [worker for worker in usable if worker.ready and worker.load < waiting.most_jobs]
            if not free:
                return False
            least_busy = min(free, key=lambda worker: worker.load)
            if least_busy.send(waiting):
                return True

    def _allowed(self, waiting: _Waiting) -> Sequence[_Worker]:
        """The workers that may do a job."""
        if waiting.worker is None:
            return self._workers
        chosen = self._workers[waiting.worker]
        if self._elastic and not chosen.ready:  # where workers come and go, others do the jobs of a missing one
            return self._workers
        return [chosen]


class _Worker:
    """One worker, those that replace it, and the thread that receives their answers.

    Attributes:
        ready: whether it has loaded the objective and answers.
        given_up: why it is not started again; empty while it may be.
    """

    def __init__(
        self,
        changed: Callable[[], None],
        machines: _Machines | None,
        settings: WorkerSettings,
        number: int,
    ) -> None:
        self._changed = changed
        self._machines = machines
        self._settings = settings
        self._number = number
        self.ready = False
        self.given_up = ""
        self._lock = threading.RLock()
        self._jobs: dict[int, _Waiting] = {}
        self._link: _Link | None = None
        self._reader: threading.Thread | None = None
        self._closing = False
        self._deaths_in_a_row = 0
        self._refusal: LcscError | None = None

    @property
    def load(self) -> int:
        """How many jobs it has."""
        return len(self._jobs)

    def ensure_started(self) -> None:
        """Start it, unless it runs or must not run any more."""
        with self._lock:
            if self._link is not None or self._closing or self.given_up:
                return
            try:
                if self._machines is None:
                    link: _Link = WorkerProcess(self._settings)
                else:
                    link = self._machines.start(self._settings)
            except OSError as error:
                self.given_up = (
                    f"worker {self._number} cannot be started: {error}; close other programs, or set fewer workers"
                )
                return
            self._link = link
            self._reader = threading.Thread(target=self._read, args=(link,), daemon=True)
            self._reader.start()

    def send(self, waiting: _Waiting) -> bool:
        """Give it a job; returns whether the job is in good hands: the worker may have died after it was chosen.

        A job that nobody can do has its error at once.
        """
        if self._refusal is not None:
            waiting.future.set_exception(self._refusal)
            return True
        waiting.started = time.perf_counter()
        try:
            pickled_job = waiting.job.pickled()
        except ObjectiveError as error:  # raised further, it would end the thread that hands out jobs
            waiting.future.set_result(Failure(str(error), 0.0, retry=False))
            return True
        with self._lock:
            if self._link is None or not self.ready:
                return False
            self._jobs[waiting.job.number] = waiting
            with contextlib.suppress(OSError):  # it died: the reader sees that, too
                self._link.send(pickled_job)
        return True

    def terminate(self) -> None:
        """Stop it for good."""
        with self._lock:
            self._closing = True
            if self._link is not None:
                self._link.terminate()

    def join(self) -> list[_Waiting]:
        """Wait until it is gone, and return its unfinished jobs."""
        if self._reader is not None:
            self._reader.join()
        return list(self._jobs.values())

    def _read(self, link: _Link) -> None:
        """Take the answers of one link, until its worker is gone."""
        while True:
            try:
                answer = link.receive()
            except (EOFError, OSError):
                break
            if answer.number == NOTICE:
                notice(answer.value)
            elif answer.number != READY:
                self._take(answer)
            else:
                self._begin(link, answer)
            self._changed()
        self._bury(link)
        self._changed()

    def _begin(self, link: _Link, answer: Answer) -> None:
        """A worker that has loaded the objective accepts jobs; one that could not refuses them all.

        ``answer`` is empty, or the error of the load.
        """
        if answer.content:
            error = answer.value
            if self._machines is not None:
                error = self._machines.refused(link, error)
            self._refusal = error
        self.ready = True  # last: from here on other threads send jobs, and such a worker would die of one

    def _take(self, answer: Answer) -> None:
        """Give the answer to whoever waits for it."""
        with self._lock:
            waiting = self._jobs.pop(answer.number)
            self._deaths_in_a_row = 0
        value = answer.value
        if isinstance(value, BaseException):
            waiting.future.set_exception(value)
        else:
            waiting.future.set_result(value)

    def _bury(self, link: _Link) -> None:
        """Fail the jobs of a worker that died. The next job starts a new one, unless workers die again and again."""
        self.ready = False
        how_it_ended, is_death = link.join()
        with self._lock:
            if self._closing:  # the pool cancels its jobs
                return
            lost_jobs = self._jobs
            self._jobs = {}
            self._link = None
            if is_death:
                self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= _MOST_DEATHS:
                self.given_up = (
                    f"worker {self._number} was lost {self._deaths_in_a_row} times in a row: {how_it_ended}; "
                    "give it more memory, or run with fewer workers"
                )
                notice(f"{self.given_up}; the other workers continue")
        for waiting in lost_jobs.values():
            waiting.future.set_result(Failure(how_it_ended, time.perf_counter() - waiting.started))


class ProcessEvaluator:
    """Candidates spread over workers.

    Args:
        pool: the workers; the caller closes them.
        most_jobs: how many candidates one worker has at once: two if the stages of its evaluations overlap.
    """

    def __init__(self, pool: WorkerPool, *, most_jobs: int = 1) -> None:
        self._pool = pool
        self._most_jobs = most_jobs

    def submit(self, candidate: Candidate) -> Future[Outcome]:
        """Queue a candidate for the next worker that is free."""
        return self._pool.submit("submit", candidate, most_jobs=self._most_jobs)

    def close(self) -> None:
        """The caller closes the workers."""
