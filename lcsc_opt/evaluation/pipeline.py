"""The stages of several candidates at the same time: one is merged while another is sampled and a third is scored.

Liu et al. 2024 (Section 5.2, Table 5) overlap merging and FID with sampling in the same way.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from lcsc_opt.base.records import Candidate, Coefficients, Cost
from lcsc_opt.evaluation.base import Failure, Outcome, attempt, checked, evaluate_safely
from lcsc_opt.objective.contract import Objective, StagedObjective

Value = TypeVar("Value")


class Pipeline:
    """Evaluates candidates, or parts of them, in three threads: one merges, one samples, one scores.

    What is submitted first is first in every stage. Whoever submits says how many candidates are under way: with two,
    the sampling thread hardly ever waits. A gradient needs all stages in turn and is computed in the sampling thread.

    Args:
        objective: whose evaluations go through stages.
    """

    def __init__(self, objective: Objective) -> None:
        if not isinstance(objective, StagedObjective):
            raise TypeError(f"{type(objective).__name__} has no stages")
        self._objective = objective
        self._merging, self._sampling, self._scoring = (_Thread(name) for name in ("merge", "sample", "score"))

    def submit(self, candidate: Candidate, *, gradient: bool = False) -> Future[Outcome]:
        """Start a whole evaluation."""
        if gradient:
            return self._sampling.submit(lambda: evaluate_safely(self._objective, candidate, gradient=True))
        sampled = self.sample(candidate, 0, self._objective.images_of(candidate))
        return self._scoring.submit(lambda: self._score(candidate, sampled))

    def sample(self, candidate: Candidate, first: int, last: int, *, gradient: bool = False) -> Future[Any]:
        """Start the images ``[first, last)`` of a candidate; the future gives their part, or a :class:`Failure`."""
        prepared = self._merging.submit(lambda: attempt(lambda: self._objective.prepare(candidate)))
        return self._sampling.submit(lambda: self._sample(candidate, prepared, first, last, gradient))

    def slope(
        self, candidate: Candidate, first: int, last: int, back: Any
    ) -> Future[tuple[Coefficients, Cost] | Failure]:
        """Start the contribution of the images ``[first, last)`` to the gradient."""
        return self._sampling.submit(lambda: attempt(lambda: self._objective.slope(candidate, first, last, back)))

    def close(self) -> None:
        """Stop, also in the middle of an evaluation: between two operations of it."""
        threads = (self._merging, self._sampling, self._scoring)
        for thread in threads:
            thread.stop()
        for thread in threads:
            thread.join()

    def _sample(self, candidate: Candidate, merged: Future[Any], first: int, last: int, gradient: bool) -> Any:
        prepared = merged.result()
        if isinstance(prepared, Failure):
            return prepared
        return attempt(lambda: self._objective.sample(candidate, prepared, first, last, gradient=gradient))

    def _score(self, candidate: Candidate, sampled: Future[Any]) -> Outcome:
        part = sampled.result()
        if isinstance(part, Failure):
            return part
        return checked(attempt(lambda: self._objective.score(candidate, [part])[0]), gradient=False)


def _as_many_threads_as_here() -> Callable[[], None]:
    """In a new thread, some of torch's libraries take all cores until they are told otherwise there."""
    torch = sys.modules.get("torch")
    if torch is None:
        return lambda: None
    return functools.partial(torch.set_num_threads, torch.get_num_threads())


class _Stopped(BaseException):
    """Raised in a thread that is told to stop, as Ctrl-C raises KeyboardInterrupt in the main one."""


class _Thread:
    """One thread that does one thing after the other, and can be stopped in between two operations of Python."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, f"lcsc-{name}", initializer=_as_many_threads_as_here())
        self._lock = threading.Lock()
        self._busy: int | None = None

    def submit(self, function: Callable[[], Value]) -> Future[Value]:
        return self._pool.submit(self._run, function)

    def _run(self, function: Callable[[], Value]) -> Value:
        with self._lock:
            self._busy = threading.get_ident()
        try:
            return function()
        finally:
            with self._lock:
                self._busy = None

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._busy is not None:  # threads have no other way to be stopped within a call that takes minutes
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._busy), ctypes.py_object(_Stopped))

    def join(self) -> None:
        self._pool.shutdown(wait=True)
