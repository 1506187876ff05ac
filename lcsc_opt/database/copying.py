"""Copies of studies: a new study that takes over the finished trials of another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, create_trial

from lcsc_opt.database.store import StoredStudy, create

_INHERITED = (
    "coefficients",
    "images",
    "noise",
    "metrics",
    "cost",
    "gradient",
    "violation",
    "unseen",
    "reason",
    "attempts",
)


def copy_study(source: StoredStudy, name: str, attributes: Mapping[str, Any]) -> None:
    """Create another study, with these attributes, that holds every finished trial of ``source``, marked as inherited.

    Raises:
        StudyStoreError: a study of that name exists.
    """
    finished = [trial for trial in source.trials() if trial.state.is_finished()]
    create(source.storage, name, attributes, [_inherited(trial, source.name) for trial in finished])


def _inherited(trial: FrozenTrial, study: str) -> FrozenTrial:
    origin = trial.user_attrs.get("inherited") or {"study": study, "trial": trial.number}
    kept = {key: trial.user_attrs[key] for key in _INHERITED if key in trial.user_attrs}
    copied = create_trial(state=trial.state, value=trial.value, user_attrs={**kept, "inherited": origin})
    copied.datetime_start, copied.datetime_complete = trial.datetime_start, trial.datetime_complete
    return copied
