"""Reads the trials of a study from Optuna's tables: without their arrays, and then the arrays of a few at a time.

Optuna's own ``get_all_trials`` reads every attribute of every trial into objects of Python, and each coefficient into
one of its own, also where only losses are needed. Nothing here writes; everything is written through Optuna.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic_core
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.database.arrays import array_of
from lcsc_opt.database.connection import in_database

ARRAYS = ("coefficients", "gradient")  # attributes that grow with the number of checkpoints
_TRIALS_AT_ONCE = 64  # whose arrays are read together: 32 MB of text for 46 rows of 500 coefficients with gradients

_TRIALS = sa.table(
    "trials",
    sa.column("trial_id", sa.Integer),
    sa.column("study_id", sa.Integer),
    sa.column("number", sa.Integer),
    sa.column("state", sa.String),
    sa.column("datetime_start", sa.DateTime),
    sa.column("datetime_complete", sa.DateTime),
)
_VALUES = sa.table(
    "trial_values",
    sa.column("trial_id", sa.Integer),
    sa.column("value", sa.Float),
    sa.column("value_type", sa.String),
)
_ATTRIBUTES = sa.table(
    "trial_user_attributes",
    sa.column("trial_id", sa.Integer),
    sa.column("key", sa.String),
    sa.column("value_json", sa.Text),
)
_INFINITIES = {"INF_POS": np.inf, "INF_NEG": -np.inf}  # value_type → the value; else it is the column's


def read_trials(storage: RDBStorage, study_id: int) -> list[FrozenTrial]:
    """All trials of a study by number, without :data:`ARRAYS` and without Optuna's parameters.

    Raises:
        StudyStoreError: the database cannot be read.
    """
    return in_database(storage, lambda: _read_trials(storage.engine, study_id))


def _read_trials(engine: sa.Engine, study_id: int) -> list[FrozenTrial]:
    is_of_study = _TRIALS.c.study_id == study_id
    columns = [column for column in _TRIALS.c if column.name != "study_id"]
    trials: dict[int, FrozenTrial] = {}
    values: dict[int, float] = {}
    with engine.connect() as connection:
        rows = connection.execute(sa.select(*columns).where(is_of_study).order_by(_TRIALS.c.number)).all()
        of_values = sa.select(_VALUES).join(_TRIALS, _TRIALS.c.trial_id == _VALUES.c.trial_id).where(is_of_study)
        for trial_id, value, value_type in connection.execute(of_values):
            values[trial_id] = _INFINITIES.get(value_type, value)
        for row in rows:
            trials[row.trial_id] = FrozenTrial(
                number=row.number,
                state=TrialState[row.state],
                value=values.get(row.trial_id),
                datetime_start=row.datetime_start,
                datetime_complete=row.datetime_complete,
                params={},
                distributions={},
                user_attrs={},
                system_attrs={},
                intermediate_values={},
                trial_id=row.trial_id,
            )
        of_attributes = (
            sa.select(_ATTRIBUTES)
            .join(_TRIALS, _TRIALS.c.trial_id == _ATTRIBUTES.c.trial_id)
            .where(is_of_study, _ATTRIBUTES.c.key.not_in(ARRAYS))
        )
        for trial_id, key, text in connection.execute(of_attributes):
            if trial_id in trials:  # else it was added after the first query
                trials[trial_id].user_attrs[key] = pydantic_core.from_json(text)
    return list(trials.values())


def with_arrays(storage: RDBStorage, trials: Iterable[FrozenTrial]) -> Iterator[FrozenTrial]:
    """The same trials with :data:`ARRAYS` as arrays of float64, read while this is iterated, some trials at a time.

    Args:
        storage: of their study.
        trials: what :func:`read_trials` has returned, or some of them, in any order.

    Raises:
        StudyStoreError: the database cannot be read.
    """
    remaining = iter(trials)
    while some_trials := list(itertools.islice(remaining, _TRIALS_AT_ONCE)):
        arrays = _arrays_of(storage, [trial._trial_id for trial in some_trials])
        for trial in some_trials:
            trial_with_arrays = copy.copy(trial)
            trial_with_arrays.user_attrs = {**trial.user_attrs, **arrays.pop(trial._trial_id, {})}
            yield trial_with_arrays


def _arrays_of(storage: RDBStorage, trial_ids: list[int]) -> dict[int, dict[str, npt.NDArray[np.float64]]]:
    query = sa.select(_ATTRIBUTES).where(_ATTRIBUTES.c.trial_id.in_(trial_ids), _ATTRIBUTES.c.key.in_(ARRAYS))

    def read() -> list[Any]:
        with storage.engine.connect() as connection:
            return list(connection.execute(query))

    arrays: dict[int, dict[str, npt.NDArray[np.float64]]] = {}
    for trial_id, key, text in in_database(storage, read):
        arrays.setdefault(trial_id, {})[key] = array_of(pydantic_core.from_json(text))
    return arrays
