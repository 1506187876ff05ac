"""One process per worker, each with an objective of its own, on this machine."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from typing import Any

from lcsc_opt.errors import ObjectiveError, StudyMismatchError
from lcsc_opt.evaluation.base import Failure, Outcome, evaluate_safely
from lcsc_opt.objective import Objective
from lcsc_opt.records import Candidate

_objective: Objective | None = None  # of a worker process
_is_another = False  # than the coordinator's


class ProcessEvaluator:
    """``workers`` processes; one that dies fails only the candidate that it was evaluating, and is started anew.

    Args:
        load_objective: builds the objective inside each process; a picklable callable.
        workers: how many processes. The machine's cores are divided among them.
        expected: what the objective of each process has to describe itself as: files may have changed since the
            coordinator loaded its own. Where it does not, futures raise StudyMismatchError. ``None`` checks nothing.
    """

    def __init__(
        self, load_objective: Callable[[], Objective], workers: int, *, expected: dict[str, Any] | None = None
    ) -> None:
        self.workers = workers
        self._load_objective, self._expected = load_objective, expected
        self._threads = max((os.cpu_count() or 1) // workers, 1)
        self._closing = False
        self._pools: dict[int, ProcessPoolExecutor] = {}
        self._waiting: queue.SimpleQueue[tuple[Candidate, bool, Future[Outcome]] | None] = queue.SimpleQueue()
        self._feeders = [threading.Thread(target=self._feed, args=(i,), daemon=True) for i in range(workers)]
        for feeder in self._feeders:
            feeder.start()

    def submit(self, candidate: Candidate, *, gradient: bool = False) -> Future[Outcome]:
        """Queue a candidate for the next process that is free."""
        future: Future[Outcome] = Future()
        self._waiting.put((candidate, gradient, future))
        return future

    def close(self) -> None:
        """Stop the processes, also in the middle of an evaluation; it is done again when the study is continued."""
        self._closing = True
        while not self._waiting.empty():
            self._waiting.get_nowait()
        for pool in list(self._pools.values()):
            for process in list(pool._processes.values()):
                process.terminate()
        for _ in self._feeders:
            self._waiting.put(None)
        for feeder in self._feeders:
            feeder.join()

    def _feed(self, worker: int) -> None:
        """Hand candidates to one process, one after the other."""
        pool = self._pools[worker] = self._start_process()
        while (job := self._waiting.get()) is not None:
            candidate, gradient, future = job
            start = time.perf_counter()
            try:
                future.set_result(pool.submit(_evaluate, candidate, gradient).result())
            except BrokenExecutor:
                if self._closing:
                    break
                reason = "the worker process died (killed, or out of memory)"
                pool.shutdown(wait=False)
                pool = self._pools[worker] = self._start_process()
                future.set_result(Failure(reason, time.perf_counter() - start))
            except Exception as error:
                future.set_exception(error)
        pool.shutdown(wait=True, cancel_futures=True)

    def _start_process(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(self._load_objective, self._threads, self._expected),
        )


def _start(load_objective: Callable[[], Objective], threads: int, expected: dict[str, Any] | None) -> None:
    global _objective, _is_another
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator, which then lets the workers go
    threading.Thread(target=_end_with_coordinator, daemon=True).start()
    _use_threads(threads)
    _objective = load_objective()
    _is_another = expected is not None and _as_json(_objective.describe()) != _as_json(expected)


def _as_json(description: dict[str, Any]) -> str:
    return json.dumps(description, sort_keys=True)


def _end_with_coordinator() -> None:
    """Leave when the coordinator is gone, killed even; nobody would fetch a result, and the device would stay taken."""
    coordinator = multiprocessing.parent_process()
    if coordinator is not None:
        multiprocessing.connection.wait([coordinator.sentinel])
        os._exit(1)


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _evaluate(candidate: Candidate, gradient: bool) -> Outcome:
    if _objective is None:
        raise ObjectiveError("the worker process has no objective")
    if _is_another:
        raise StudyMismatchError(
            "a worker process found other files than the search began with (checkpoints, reference or weights changed "
            "meanwhile); put them back, or pack the checkpoints first: lcsc trajectory pack"
        )
    return evaluate_safely(_objective, candidate, gradient=gradient)
