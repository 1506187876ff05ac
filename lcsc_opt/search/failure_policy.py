"""Failures of a search: what is printed of them, and when they end it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lcsc_opt.base.errors import SearchFailedError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.study_file import FailureSpec
from lcsc_opt.evaluation.base import Failure, Outcome

_MOST_REASONS = 5  # reasons of failures that a run prints; the database keeps all
_MOST_IN_A_ROW = 5  # trials that all raised the same error end the run of a study that has had a success
_FEW_TRIALS = 10  # with fewer trials, the share of failures is not looked at


class FailurePolicy:
    """Decides when the failures of one run of a study end it.

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
        self._most = _MOST_IN_A_ROW if has_results else 1  # trials in a row that end the run
        self._raised: list[str] = []  # the error that all attempts raised, of trials that failed since the last success
        self._last_reason = ""
        self.count = 0

    def say_why(self, number: int, failure: Failure) -> None:
        """Print why a trial failed, and where unless the error is ours, once for each reason.

        ``lcsc show`` prints the whole traceback.
        """
        if failure.reason in self._said or len(self._said) == _MOST_REASONS:
            return
        self._said.add(failure.reason)
        lines = failure.traceback.rstrip().splitlines() if failure.retry else []
        frames = [index for index, line in enumerate(lines) if line.startswith("  File ")]
        shown = lines if not frames else lines[frames[-1] : -1]  # the last line is the reason
        notice("\n".join([f"{self._name}: trial {number}: {failure.reason}", *shown]))

    def add(self, failure: Failure) -> None:
        """Count a failed trial that is told."""
        self.count += 1
        self._last_reason = failure.reason.rstrip(".")

    def heed(self, outcome: Outcome, attempts: Sequence[Mapping[str, Any]], *, older_run: bool) -> None:
        """End the run when trials in a row raised one error at each attempt: code or a file is broken.

        Before the study's first success one trial is enough; then it takes five.

        Args:
            outcome: that this run got, and the optimizer was told.
            attempts: that failed, as the database stores them.
            older_run: whether a candidate that was asked before this one may still succeed.

        Raises:
            SearchFailedError: the run ends.
        """
        if not isinstance(outcome, Failure):
            self._raised, self._most = [], _MOST_IN_A_ROW
            return
        same = len({attempt["reason"] for attempt in attempts}) == 1 and all("traceback" in one for one in attempts)
        self._raised = [*(one for one in self._raised if one == outcome.reason), outcome.reason] if same else []
        once = outcome.retry and len(attempts) == 1  # it might have succeeded at another attempt
        if len(self._raised) >= (_MOST_IN_A_ROW if once else self._most) and not self._expected and not older_run:
            raise SearchFailedError(
                f"{self._name}: trials raised the same error at each attempt, {len(self._raised)} in a row: "
                f"{outcome.reason.rstrip('.')}. Mend it, then: lcsc resume {self._name} --retry-failed; lcsc show "
                "prints the whole traceback"
            )

    def judge(self, told: int, *, ended: bool = False) -> None:
        """End the search when too many of ``told`` trials failed, or all of them when it has ``ended``.

        Raises:
            SearchFailedError: the run ends.
        """
        too_many = told >= _FEW_TRIALS and self.count > self._policy.stop_share * told
        if too_many or (ended and told and self.count == told):
            raise SearchFailedError(
                f"{self._name}: {self.count} of {told} trials failed (failures.stop_share is "
                f"{self._policy.stop_share:g}); the last one: {self._last_reason}. Mend the cause, then: lcsc resume "
                f"{self._name} --retry-failed"
            )
