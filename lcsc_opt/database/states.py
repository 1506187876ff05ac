"""The states of trials: which of them have a loss, and which losses compare."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

SUCCEEDED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of trials that have a loss. Where an optimizer asked for other noise or another number of images, the loss
does not compare with others. Such a trial ends as pruned, so that no program that reads Optuna's tables considers it
the best."""


def is_ours(trial: FrozenTrial) -> bool:
    """Whether a search asked the trial; plain Optuna may have added others to its study."""
    return "coefficients" in trial.user_attrs


def compared_trials(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials whose losses compare, in their order."""
    return [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
