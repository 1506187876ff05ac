"""Failures of a search: what is printed of them, and when they end it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lcsc_opt.base.errors import SearchFailedError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.study_file import FailureSpec
from lcsc_opt.evaluation import Failure

MOST_REASONS = 5  # reasons of failures that a run prints; the database keeps all
_MOST_IN_A_ROW = 5  # trials that all raised the same error end a run that has had a success
_FEW_TRIALS = 10  # with fewer trials, the share of failures is not judged

Attempts = Sequence[Mapping[str, Any]]  # as the database stores them


class FailurePolicy:
    """Judges the failures of one run of a study.

    Args:
        name: of the study.
        policy: which share of failed trials ends the search.
        has_results: whether the study has had a success in an earlier run.

    Attributes:
        count: how many of the trials that were told have failed.
    """

    def __init__(self, name: str, policy: FailureSpec, *, has_results: bool) -> None:
        self._name, self._policy = name, policy
        self._expected = policy.stop_share > FailureSpec().stop_share
        self._said: set[str] = set()  # reasons
        self._succeeded = False  # in this run
        self._raised = Counter[str]()  # before the first success: reason → trials whose attempts all raised it
        self._enough = 2 if has_results else 1  # such trials end the run
        self._last_raised = deque[frozenset[str]](maxlen=_MOST_IN_A_ROW)  # by trials that failed since the last success
        self._last_reason = ""
        self.count = 0

    def say_why(self, number: int, failure: Failure) -> None:
        """Print where a failure happened, once for each reason. ``lcsc show`` prints the whole traceback."""
        if failure.reason in self._said or len(self._said) == MOST_REASONS:
            return
        self._said.add(failure.reason)
        lines = failure.traceback.rstrip().splitlines()
        frames = [index for index, line in enumerate(lines) if line.startswith("  File ")]
        shown = lines if not frames else lines[frames[-1] : -1]  # the last line is the reason
        notice("\n".join([f"{self._name}: trial {number}: {failure.reason}", *shown]))

    def succeeded(self) -> None:
        """An evaluation of this run has a result."""
        self._succeeded = True

    def failed(self, number: int, attempts: Attempts, last: Failure, *, older_run: bool) -> None:
        """Before a run's first success, end it if all attempts of a trial raised one error: code or a file is broken.

        In a study that has succeeded before, one such candidate may itself be the cause, so the run ends at the second.

        Args:
            number: of the trial.
            attempts: all of them.
            last: the last one.
            older_run: whether a candidate that was asked before this one may still succeed.

        Raises:
            SearchFailedError: the run ends.
        """
        raised = _raised(attempts)
        if self._succeeded or self._expected or len(raised) != 1 or (last.retry and len(attempts) == 1):
            return
        self._raised[last.reason] += 1
        if self._raised[last.reason] >= self._enough and not older_run:
            every = f"trial {number} raised the same error at each attempt"
            self._end(f"{every}, and nothing has succeeded in this run", last.reason)

    def told_success(self) -> None:
        """The optimizer was told a result."""
        self._last_raised.clear()

    def told_failure(self, attempts: Attempts, *, older_run: bool) -> None:
        """End the run when several trials, told one after the other, all raised one error.

        Args:
            attempts: of a trial that failed in this run.
            older_run: as for :meth:`failed`.

        Raises:
            SearchFailedError: the run ends.
        """
        self._last_raised.append(_raised(attempts))
        if len(self._last_raised) < _MOST_IN_A_ROW or len(set(self._last_raised)) > 1 or self._expected:
            return
        if len(self._last_raised[0]) == 1 and not older_run:
            [reason] = self._last_raised[0]
            self._end(f"the last {_MOST_IN_A_ROW} trials raised the same error at each attempt", reason)

    def add(self, failure: Failure) -> None:
        """Count a failed trial that is told."""
        self.count += 1
        self._last_reason = failure.reason.rstrip(".")

    def judge_share(self, told: int) -> None:
        """End the search when too many of ``told`` trials failed.

        Raises:
            SearchFailedError: the run ends.
        """
        if told >= _FEW_TRIALS and self.count > self._policy.stop_share * told:
            raise SearchFailedError(
                f"{self._name}: {self.count} of {told} trials failed, more than failures.stop_share "
                f"{self._policy.stop_share:g}; the last one: {self._last_reason}. Mend the cause, then: lcsc resume "
                f"{self._name} --retry-failed; or raise failures.stop_share in the study file"
            )

    def judge_all(self, told: int) -> None:
        """Refuse a search in which nothing succeeded.

        Raises:
            SearchFailedError: all ``told`` trials failed.
        """
        if told and self.count == told:
            raise SearchFailedError(
                f"{self._name}: all {told} trials failed; the last one: {self._last_reason}. Mend the "
                f"cause, then: lcsc resume {self._name} --retry-failed"
            )

    def _end(self, why: str, reason: str) -> NoReturn:
        raise SearchFailedError(
            f"{self._name}: {why}: {reason.rstrip('.')}. Mend it, then: lcsc resume {self._name} --retry-failed; lcsc "
            "show prints the whole traceback"
        )


def _raised(attempts: Attempts) -> frozenset[str]:
    """The exceptions of a trial's attempts, in words; none where an attempt failed otherwise."""
    return frozenset(attempt["reason"] for attempt in attempts if all("traceback" in each for each in attempts))
