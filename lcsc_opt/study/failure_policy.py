"""Failures of a search: which are printed, and when they end it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import TrialState

from lcsc_opt.base.errors import SearchFailedError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.study_file import FailureSpec
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Failure, Outcome

ACCEPTED_FAILURES = "accepted_failures"  # the attribute of a study that lists trials which end no search

_MOST_REASONS = 5  # reasons of failures that a run prints; the database keeps all
_MOST_IN_A_ROW = 5  # trials that all raised the same error end the run of a study that has had a success
_FEW_TRIALS = 10  # with fewer trials, their share of failures does not end a search


class FailurePolicy:
    """Decides when the failures of one run of a study end it.

    Args:
        name: the name of the study.
        policy: which share of failed trials ends the search.
        has_results: whether the study has had a success in an earlier run.

    Attributes:
        count: how many of the trials that were told have failed.
        accepted: how many of these had failed when the user went on with ``--retry-failed``.
    """

    def __init__(self, name: str, policy: FailureSpec, *, has_results: bool) -> None:
        self._name = name
        self._policy = policy
        self._many_expected = policy.stop_share > FailureSpec().stop_share
        self._printed: set[str] = set()  # reasons
        self._has_results = has_results
        self._repeated: list[str] = []  # the error that all attempts raised, of each trial since the last success
        self._last_reason = ""
        self.count = 0
        self.accepted = 0

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

    def add(self, failure: Failure, *, accepted: bool = False) -> None:
        """Count a failed trial that is told; one that the user has ``accepted`` ends no search."""
        self.count += 1
        if accepted:
            self.accepted += 1
        else:
            self._last_reason = failure.reason.rstrip(".")

    def check_repetition(self, outcome: Outcome, attempts: Sequence[Mapping[str, Any]], *, older_run: bool) -> None:
        """End the run when trials in a row raised one error at each attempt: code or a file is broken.

        Before the study's first success one trial is enough; afterwards, five are needed.

        Args:
            outcome: that this run got, and the optimizer was told.
            attempts: that failed, as the database stores them.
            older_run: whether a candidate that was asked before this one may still succeed.

        Raises:
            SearchFailedError: the run ends.
        """
        if not isinstance(outcome, Failure):
            self._repeated = []
            self._has_results = True
            return
        reasons = {attempt["reason"] for attempt in attempts}
        all_raised = all("traceback" in attempt for attempt in attempts)
        if len(reasons) == 1 and all_raised:
            self._repeated = [reason for reason in self._repeated if reason == outcome.reason]
            self._repeated.append(outcome.reason)
        else:
            self._repeated = []
        most = _MOST_IN_A_ROW if self._has_results else 1
        if outcome.retry and len(attempts) == 1:  # it might have succeeded at another attempt
            most = _MOST_IN_A_ROW
        if len(self._repeated) >= most and not self._many_expected and not older_run:
            trials = "a trial before the first success"
            if len(self._repeated) > 1:
                trials = f"{len(self._repeated)} trials in a row"
            raise SearchFailedError(
                f"{self._name}: {trials} raised the same error at each attempt: {outcome.reason.rstrip('.')}. "
                f"Fix it, then run: {self._command}; "
                f"lcsc show {self._name} prints the whole traceback"
            )

    def check_share(self, told: int, *, ended: bool = False) -> None:
        """End the search when too many of ``told`` trials failed, or all of them when it has ``ended``.

        Raises:
            SearchFailedError: the run ends.
        """
        told -= self.accepted
        failed = self.count - self.accepted
        too_many = told >= _FEW_TRIALS and failed > self._policy.stop_share * told
        all_failed = ended and told > 0 and failed == told
        if too_many or all_failed:
            raise SearchFailedError(
                f"{self._name}: {failed} of {told} trials failed (failures.stop_share is "
                f"{self._policy.stop_share:g}); the last one: {self._last_reason}. Fix the cause, then run: "
                f"{self._command}"
            )

    @property
    def _command(self) -> str:
        """What continues the study once the cause is removed."""
        command = f"lcsc run {self._name} --retry-failed (in Python: retry_failed=True)"
        if not self._has_results:  # so settings may still be others
            command += ", or, after a correction of the objective's settings in the study file: lcsc run FILE"
        return command


def innermost_frame(traceback: str) -> list[str]:
    """The lines of a traceback about where it was raised, without the last one, which is the reason."""
    lines = traceback.rstrip().splitlines()
    frames = [index for index, line in enumerate(lines) if line.startswith("  File ")]
    if not frames:
        return lines
    return lines[frames[-1] : -1]


def retry_failures(study: StoredStudy) -> int:
    """Forget the failures after the last success, and accept the earlier ones. The caller holds the study.

    All later candidates depend on the earlier failures, so they stay; but on replay they must not end the search again.

    Returns:
        How many trials were forgotten, and will be asked again.
    """
    many = study.retry_failed()
    remaining = [trial.number for trial in study.trials_without_arrays() if trial.state == TrialState.FAIL]
    if remaining:
        study.set_attribute(ACCEPTED_FAILURES, remaining)
    return many
