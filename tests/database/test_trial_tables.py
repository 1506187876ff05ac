"""Trials that are read from Optuna's tables are those that Optuna reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from lcsc_opt.base.records import Candidate, Evaluation, Noise
from lcsc_opt.database import trial_tables
from lcsc_opt.database.arrays import array_of, stored_array
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.trial_tables import ARRAYS, read_trials, with_arrays
from tests.study_examples import write_study

SMALLEST = 5e-324
COEFFICIENTS = np.array([1 / 3, -0.0, SMALLEST, 1e300, 1 / 3 - 1e300])
ROWS = np.array([[0.1, 0.9], [2.5, -1.5]])


def described(trial: FrozenTrial) -> dict[str, Any]:
    """All but the parameters, with arrays as bytes."""
    attributes = dict(trial.user_attrs)
    for name in ARRAYS:
        if name in attributes:
            stored = attributes[name]
            array = array_of(stored) if isinstance(stored, dict) else stored
            attributes[name] = (array.shape, array.tobytes())
    return {
        "number": trial.number,
        "state": trial.state,
        "value": trial.value,
        "started": trial.datetime_start,
        "ended": trial.datetime_complete,
        "attributes": sorted(attributes.items()),
    }


@pytest.fixture
def study(any_storage: RDBStorage) -> StoredStudy:
    """Trials of every state and with every kind of attribute, between those of another study."""
    other = write_study(any_storage, "other/LCSC/0", [1.0])
    study = StoredStudy.open_or_create(any_storage, "digits/LCSC/0", {"steps": [1, 2]})
    for value in (math.inf, -math.inf):
        study._add(
            create_trial(
                state=TrialState.COMPLETE, value=value, user_attrs={"coefficients": stored_array(COEFFICIENTS)}
            )
        )
        other.add_candidate(Candidate(np.array([0.0, 1.0])))
    numbers = [
        study.add_candidate(Candidate(COEFFICIENTS, images=7, noise=Noise("search", 3))),
        study.add_candidate(Candidate(ROWS)),
        study.add_candidate(Candidate(COEFFICIENTS)),
        study.add_candidate(Candidate(ROWS)),
    ]
    study.finish(numbers[1], Evaluation(1 / 3, {"fid": 1e-300, "«ü»": math.nan}, gradient=ROWS / 7))
    study.fail(numbers[0], [{"reason": "no «image» 😀", "seconds": 0.1}])
    study.finish(numbers[2], Evaluation(0.5), compares=False)
    return study


def test_are_those_that_optuna_reads(study: StoredStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_tables, "_TRIALS_AT_ONCE", 4)
    expected = [described(trial) for trial in study.storage.get_all_trials(study.key)]
    assert {row["state"] for row in expected} >= {TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING}
    bare = read_trials(study.storage, study.key)
    read = [described(trial) for trial in with_arrays(study.storage, bare)]
    assert str(read) == str(expected)  # NaN is no equal of itself
    assert not any(set(ARRAYS) & trial.user_attrs.keys() for trial in bare)
    chosen = [bare[5], bare[2]]
    assert [trial.number for trial in with_arrays(study.storage, chosen)] == [5, 2]


def test_arrays_are_read_a_few_trials_at_a_time(study: StoredStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_tables, "_TRIALS_AT_ONCE", 2)
    trials = study.trials_without_arrays()
    queries: list[str] = []

    def remember(*arguments: Any) -> None:
        if "value_json" in arguments[2]:
            queries.append(arguments[2])

    sa.event.listen(study.storage.engine, "before_cursor_execute", remember)
    stream = study.with_arrays(trials)
    next(stream)
    assert len(queries) == 1
    assert len(list(stream)) == len(trials) - 1
    assert len(queries) == math.ceil(len(trials) / 2)
