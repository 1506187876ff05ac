"""Copies of studies: a new study that takes over the finished trials of another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from optuna.trial import FrozenTrial, create_trial

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.database.connection import in_database
from lcsc_opt.database.store import StoredStudy, create

INHERITED_ATTRIBUTES = (
    "coefficients",
    "images",
    "noise",
    "metrics",
    "cost",
    "gradient",
    "excess",
    "reason",
    "attempts",
)


def copy_study(source: StoredStudy, name: str, attributes: Mapping[str, Any]) -> None:
    """Create another study that holds every finished trial of ``source``, marked as inherited, in one transaction.

    Args:
        source: where the trials come from; it stays as it is.
        name: of the new study.
        attributes: its user attributes.

    Raises:
        StudyStoreError: a study of that name exists.
    """
    finished = [trial for trial in source.trials() if trial.state.is_finished()]
    inherited = [_inherited(trial, source.name) for trial in finished]
    attempts = 0

    def create_once() -> bool:
        nonlocal attempts
        attempts += 1
        try:
            create(source.storage, name, attributes, inherited)
        except sa.exc.IntegrityError:
            return False
        return True

    if in_database(source.storage, create_once):
        return
    # it exists: perhaps by an attempt whose commit was not acknowledged
    if attempts == 1 or not _holds(StoredStudy.open(source.storage, name), attributes, len(inherited)):
        raise StudyStoreError(f"{name}: exists already; give the fork another name")


def _holds(study: StoredStudy, attributes: Mapping[str, Any], trials: int) -> bool:
    """Whether the study has at least these attributes, and exactly this number of trials."""
    stored = study.attributes
    same = {key: stored.get(key) for key in attributes} == json.loads(json.dumps(dict(attributes)))
    return same and len(study.trials()) == trials


def _inherited(trial: FrozenTrial, study: str) -> FrozenTrial:
    origin = trial.user_attrs.get("inherited") or {"study": study, "trial": trial.number}
    kept = {key: trial.user_attrs[key] for key in INHERITED_ATTRIBUTES if key in trial.user_attrs}
    copied = create_trial(state=trial.state, value=trial.value, user_attrs={**kept, "inherited": origin})
    copied.datetime_start, copied.datetime_complete = trial.datetime_start, trial.datetime_complete
    return copied
