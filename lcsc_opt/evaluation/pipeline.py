"""The stages of several candidates at the same time: one is merged while another is sampled and a third is scored.

Liu et al. 2024 (Section 5.2, Table 5) overlap merging and FID with sampling in the same way.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lcsc_opt.base.records import Candidate, Coefficients, Cost
from lcsc_opt.evaluation.base import Failure, Outcome, attempt, checked, evaluate_safely
from lcsc_opt.objective.contract import Objective, StagedObjective, stop_flag, stop_if_told


class Pipeline:
    """Evaluates candidates, or parts of them, in three threads: one merges, one samples, one scores.

    Candidates pass every stage in the order in which they were submitted. The caller decides how many are under way:
    with two, the sampling thread hardly ever waits. A gradient needs all stages in turn and is computed in the sampling
    thread, as is what another evaluation has to come before. The objective has stages.
    """

    def __init__(self, objective: Objective) -> None:
        assert isinstance(objective, StagedObjective)
        self._objective = objective
        self._stop = threading.Event()
        torch_threads = None
        if "torch" in sys.modules:  # otherwise nothing here uses it
            torch_threads = sys.modules["torch"].get_num_threads()

        def begin_thread() -> None:
            stop_flag.set(self._stop)  # which stop_if_told looks at in this thread
            if torch_threads is not None:  # in a new thread, some of torch's libraries would use all cores
                sys.modules["torch"].set_num_threads(torch_threads)

        # each of one thread, which does what is submitted in its order
        self._merging = ThreadPoolExecutor(1, "lcsc-merge", begin_thread)
        self._sampling = ThreadPoolExecutor(1, "lcsc-sample", begin_thread)
        self._scoring = ThreadPoolExecutor(1, "lcsc-score", begin_thread)

    def submit(self, candidate: Candidate) -> Future[Outcome]:
        """Start a whole evaluation."""
        if candidate.gradient or self._objective.needs(candidate) is not None:
            return self._sampling.submit(lambda: evaluate_safely(self._objective, candidate))
        sampled = self.sample(candidate, 0, self._objective.images_of(candidate))
        return self._scoring.submit(lambda: self._score(candidate, sampled))

    def sample(self, candidate: Candidate, first: int, last: int) -> Future[Any]:
        """Start the images ``[first, last)`` of a candidate; the future gives their part, or a :class:`Failure`."""
        prepared = self._merging.submit(lambda: attempt(lambda: self._objective.prepare(candidate)))
        return self._sampling.submit(lambda: self._sample(candidate, prepared, first, last))

    def vjp(
        self, candidate: Candidate, first: int, last: int, back: Any
    ) -> Future[tuple[Coefficients, Cost] | Failure]:
        """Start computing what the images ``[first, last)`` contribute to the gradient, and what that costs.

        ``back`` is what the objective's ``score`` has returned for these images.
        """
        return self._sampling.submit(lambda: attempt(lambda: self._objective.vjp(candidate, first, last, back)))

    def close(self) -> None:
        """Stop. A running evaluation ends at its next :func:`stop_if_told`."""
        self._stop.set()
        threads = (self._merging, self._sampling, self._scoring)
        # all queues are emptied before the first wait, so that no thread begins another stage meanwhile
        for thread in threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for thread in threads:
            thread.shutdown()

    def _sample(self, candidate: Candidate, merged: Future[Any], first: int, last: int) -> Any:
        prepared = merged.result()
        if isinstance(prepared, Failure):
            return prepared
        stop_if_told()  # the pipeline may have been closed while the candidate was merged
        return attempt(lambda: self._objective.sample(candidate, prepared, first, last))

    def _score(self, candidate: Candidate, sampled: Future[Any]) -> Outcome:
        part = sampled.result()
        if isinstance(part, Failure):
            return part
        outcome = attempt(lambda: self._objective.score(candidate, [part])[0])
        return checked(outcome, candidate)
