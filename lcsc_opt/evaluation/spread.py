"""One candidate at a time, its images spread over worker processes: for optimizers that wait for each result."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from lcsc_opt.base.records import Candidate, Cost
from lcsc_opt.evaluation.base import Failure, Outcome, attempt, checked
from lcsc_opt.evaluation.pool import WorkerPool
from lcsc_opt.objective.contract import Objective, StagedObjective

Part = TypeVar("Part")
AT_ONCE = 2  # candidates under way: one is scored while the next is sampled


class SpreadEvaluator:
    """Each worker samples a share of the images; this process joins the parts and scores them.

    Feature statistics merge, so the loss is that of one device up to the rounding of sums. Gradients are summed over
    images.

    Args:
        objective: one with stages. It only scores what the workers sampled; its model is not used.
        pool: the workers; the caller closes them.
    """

    def __init__(self, objective: Objective, pool: WorkerPool) -> None:
        assert isinstance(objective, StagedObjective)
        self._objective = objective
        self._pool = pool
        self._scoring = threading.Lock()  # an objective scores one candidate at a time
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="lcsc-spread")

    def submit(self, candidate: Candidate) -> Future[Outcome]:
        """Hand out the images of a candidate, and join the parts that come back.

        What its score needs is evaluated first, and waited for.
        """
        while (needed := self._objective.needs(candidate)) is not None:
            outcome = self._submit(needed).result()
            if isinstance(outcome, Failure):
                failed: Future[Outcome] = Future()
                failed.set_result(outcome)
                return failed
        return self._submit(candidate)

    def _submit(self, candidate: Candidate) -> Future[Outcome]:
        images = self._objective.images_of(candidate)
        workers = min(len(self._pool), images)  # so that each has an image
        ranges = list(itertools.pairwise(images * worker // workers for worker in range(workers + 1)))
        sampled = [
            self._pool.submit("sample", candidate, first, last, worker=worker, most_jobs=AT_ONCE)
            for worker, (first, last) in enumerate(ranges)
        ]
        return self._threads.submit(self._put_together, candidate, ranges, sampled)

    def close(self) -> None:
        """Give up unfinished candidates. The threads end when the workers have answered or are closed."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _put_together(
        self,
        candidate: Candidate,
        ranges: Sequence[tuple[int, int]],
        sampled: Sequence[Future[Any]],
    ) -> Outcome:
        """Wait for the parts, and score them; if a gradient was asked for, let the workers compute it, and sum it.

        Args:
            candidate: of which there are parts.
            ranges: the images ``[first, last)`` of each worker, by its number.
            sampled: what it made of them.
        """
        samples = _results(sampled)
        if isinstance(samples, Failure):
            return samples
        with self._scoring:
            scored = attempt(lambda: self._objective.score(candidate, samples))
        if isinstance(scored, Failure):
            return scored
        evaluation, gradients_of_samples = scored
        if candidate.gradient:
            # to the worker that sampled the part, which usually still has what the gradient needs
            futures = [
                self._pool.submit("vjp", candidate, first, last, back, worker=worker, most_jobs=AT_ONCE)
                for worker, ((first, last), back) in enumerate(zip(ranges, gradients_of_samples, strict=True))
            ]
            products = _results(futures)
            if isinstance(products, Failure):
                return products
            evaluation = dataclasses.replace(
                evaluation,
                gradient=sum(product for product, _ in products),
                cost=evaluation.cost + Cost.of_parts([cost for _, cost in products]),
            )
        return checked(evaluation, candidate)


def _results(futures: Sequence[Future[Part]]) -> list[Part] | Failure:
    """The results of all futures, or the first failure. Waits for all of them, so that none keeps running."""
    results = [future.result() for future in futures]
    for result in results:
        if isinstance(result, Failure):
            return result
    return results
