"""Failures of a search: which are printed, and when they end it.

A failed trial is recorded, and the search goes on; ``failures.in_a_row`` of them in a row end it. What would make every
trial fail has failed in the rehearsal (:mod:`lcsc_opt.study.rehearsal`).
"""

from __future__ import annotations

from lcsc_opt.base.errors import SearchFailedError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.study_file import FailureSpec
from lcsc_opt.evaluation.base import Failure, Outcome

_MOST_REASONS = 5  # reasons of failures that a run prints; the database keeps all


class FailurePolicy:
    """Decides when the failures of one run of a study end it.

    Args:
        name: the name of the study.
        policy: how many failed trials in a row end the search.

    Attributes:
        count: how many of the trials that were told have failed.
    """

    def __init__(self, name: str, policy: FailureSpec) -> None:
        self._name = name
        self._policy = policy
        self._printed: set[str] = set()  # reasons
        self._in_a_row = 0
        self._last_reason = ""
        self.count = 0

    def print_reason(self, number: int, failure: Failure) -> None:
        """Print why a trial failed, and where unless the error is ours, once for each reason.

        ``lcsc show`` prints the whole traceback.
        """
        if failure.reason in self._printed or len(self._printed) == _MOST_REASONS:
            return
        self._printed.add(failure.reason)
        lines = [f"{self._name}: trial {number}: {failure.reason}"]
        if failure.retry:
            lines += innermost_frame(failure.traceback)
        notice("\n".join(lines))

    def add(self, failure: Failure) -> None:
        """Count a failed trial that is told."""
        self.count += 1
        self._last_reason = failure.reason.rstrip(".")

    def check(self, outcome: Outcome) -> None:
        """End the run when the last trials of this run, in the order of the tells, have all failed.

        Args:
            outcome: that this run got, and the optimizer was told.

        Raises:
            SearchFailedError: the run ends.
        """
        if not isinstance(outcome, Failure):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._policy.in_a_row is not None and self._in_a_row >= self._policy.in_a_row:
            raise self._error(f"{self._in_a_row} trials in a row failed (failures.in_a_row)")

    def check_all(self, told: int) -> None:
        """Refuse to call a search finished if all of its ``told`` trials failed.

        Raises:
            SearchFailedError: they did.
        """
        if told and self.count == told:
            raise self._error(f"all {told} trials failed")

    def _error(self, what: str) -> SearchFailedError:
        return SearchFailedError(
            f"{self._name}: {what}; the last one: {self._last_reason}. Fix the cause, then run: "
            f"lcsc run {self._name} --retry-failed (in Python: retry_failed=True), with --accept-changes if your code "
            f"changed; "
            f"lcsc show {self._name} prints the whole traceback"
        )


def innermost_frame(traceback: str) -> list[str]:
    """The lines of a traceback about where it was raised, without the last one, which is the reason."""
    lines = traceback.rstrip().splitlines()
    frames = [index for index, line in enumerate(lines) if line.startswith("  File ")]
    if not frames:
        return lines
    return lines[frames[-1] : -1]
