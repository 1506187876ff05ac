"""The states of trials and studies: which trials have a loss, which losses compare, and whether a search has ended."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.study_spec import Rule, StudySpec
from lcsc_opt.database.names import split_name

Attributes = Mapping[str, Any]
"""User attributes of a stored study."""

COEFFICIENTS = ("coefficients", "coefficients_sha256")
"""The attributes of which each trial of ours has one: steps of many rows have the digest, all others the numbers."""

SUCCEEDED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of trials that have a loss. Where an optimizer asked for other noise or another number of images, the loss
does not compare with others. Such a trial ends as pruned, so that no program that reads Optuna's tables considers it
the best."""


def row_rule_of(study: str | None, studies: Mapping[str, Attributes]) -> Rule | None:
    """The rule of the rows of the search that found a model; ``None`` where no search did, or it has one row.

    Args:
        study: the search.
        studies: name → attributes of all searches of the experiment.
    """
    if study is None:
        return None
    rule: Rule | None = studies[study]["specification"]["space"]["rows"]
    return rule


def is_ours(trial: FrozenTrial) -> bool:
    """Whether a search asked the trial; plain Optuna may have added others to its study."""
    return not trial.user_attrs.keys().isdisjoint(COEFFICIENTS)


def forgotten_trials(attributes: Attributes) -> frozenset[int]:
    """The numbers of the trials of a study that were forgotten, to be asked again."""
    retry = attributes.get("retry") or {}
    return frozenset(retry.get("forgotten", ()))


def shown_trials(trials: Sequence[FrozenTrial], *, sign: int, forgotten: Collection[int]) -> list[FrozenTrial]:
    """The trials of a study, by number, with losses as values, without those that are not ours or were forgotten.

    Args:
        trials: as Optuna reads them. They are not changed, as Optuna may share them.
        sign: −1 where their values are maximized scores.
        forgotten: the numbers of those that were.
    """
    shown = [trial for trial in trials if is_ours(trial) and trial.number not in forgotten]
    shown.sort(key=lambda trial: trial.number)
    if sign < 0:
        return [_with_loss(trial) for trial in shown]
    return shown


def _with_loss(trial: FrozenTrial) -> FrozenTrial:
    """A copy of a trial whose value is a maximized score, with the loss as value."""
    copied = copy.copy(trial)
    if trial.value is not None:
        copied.value = -trial.value
    return copied


def compared_trials(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials whose losses compare, in their order."""
    return [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]


def ended_search(studies: Mapping[str, Attributes], optimizer: str) -> str | None:
    """The name of the first search of an optimizer that has ended; ``None`` if none of these studies is one."""
    for name, attributes in studies.items():
        if split_name(name)[1] == optimizer and attributes.get("search_ended") is not None:
            return name
    return None


def is_searched(spec: StudySpec, stored: Attributes) -> bool:
    """Whether the search of a stored study has nothing left to do for this budget."""
    ended = stored.get("search_ended")
    if ended is None:
        return False
    if ended["exhausted"]:
        return True
    budget = spec.budget
    if ended.get("patience") is not None and ended["patience"] == budget.patience:  # which ended the search
        return True
    if budget.seconds is not None:
        return bool(ended.get("deadline", 0.0) >= budget.seconds)  # without one if another unit ended it
    if budget.evaluations is not None:
        return bool(ended["evaluations"] >= budget.evaluations)
    stored_images = stored["budget"].get("images") or 0  # which the search had spent when it ended
    return bool(stored_images >= budget.total)
