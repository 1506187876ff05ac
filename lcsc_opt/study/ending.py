"""How a search ended, as a clause for people: by itself, or cut while it still gained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial

from lcsc_opt.base.jackknife import standard_error
from lcsc_opt.database.arrays import array_of
from lcsc_opt.database.states import compared_trials
from lcsc_opt.optimizers.gradient import LEAST_GAIN

RECENT = 20  # evaluations, in which a search that still improves must have gained something
BROUGHT_NOTHING = "have brought nothing that is certain"  # of the last evaluations


def how_it_ended(
    trials: Sequence[FrozenTrial], *, by_itself: bool, patience: int | None, round_steps: int | None = None
) -> str:
    """``cut by its budget, still improving: 20 more evaluations have improved it by 2.1 %``, or that it has ended.

    Args:
        trials: of the search, with losses as values.
        by_itself: whether the optimizer had nothing more to ask.
        patience: after how many evaluations without a lower loss it ended; ``None`` if that did not happen.
        round_steps: how many steps the first round has of an optimizer that follows a path; ``None`` of others.
    """
    compared = compared_trials(trials)
    if by_itself:  # LCSCGradient did, by the rule of its checks
        if any("without_groups" in trial.user_attrs for trial in compared):
            return "ended by itself: a round of shorter steps gained no more than its error, or 1 % of the whole gain"
        return "ended by itself: a round of shorter steps gained less than 1 % of the whole gain"
    if patience is not None:
        return f"ended: {patience} evaluations in a row brought no lower loss"
    cut = "cut by its budget"
    steps = sum("gradient" in trial.user_attrs for trial in trials)
    if round_steps is not None and steps < round_steps:
        counted = "1 step" if steps == 1 else f"{steps} steps"
        cut += f" after {counted}, where a first round has {round_steps} if the budget allows so many"
    earlier = [trial for trial in compared if trial.number <= trials[-1].number - RECENT]
    if not earlier:
        return cut
    if any("gradient" in trial.user_attrs for trial in trials):  # its checks are one path: the last one is its state
        before, now = earlier[-1], compared[-1]
    else:
        before, now = _best(earlier), _best(compared)
    gain = (before.value or 0.0) - (now.value or 0.0)
    if gain <= _error(before, now):
        return f"{cut}; the last {RECENT} evaluations {BROUGHT_NOTHING}"
    if gain <= LEAST_GAIN * ((compared[0].value or 0.0) - (now.value or 0.0)):
        return f"{cut}; the last {RECENT} evaluations have brought less than 1 % of the whole gain"
    percent = f"{100 * gain / abs(before.value or 1.0):.2g} %"
    evaluations = trials[-1].number - before.number
    return f"{cut}, still improving: {evaluations} more evaluations have improved it by {percent}"


def _best(trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """The trial of the lowest loss, of those that have one."""
    return min(trials, key=lambda trial: trial.value or 0.0)


def _error(before: FrozenTrial, now: FrozenTrial) -> float:
    """The paired standard error of the gain between two checks; 0 where nothing is known of it."""
    if not all("without_groups" in trial.user_attrs for trial in (before, now)):
        return 0.0
    first, second = (array_of(trial.user_attrs["without_groups"]["loss"]) for trial in (before, now))
    return standard_error(np.subtract(first, second).tolist())
