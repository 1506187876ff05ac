"""What is written by statements of ours is what Optuna writes through its own classes."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.database import tables
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy

NAME = "digits/LCSC/0"


@pytest.fixture
def storage(any_url: str) -> RDBStorage:
    return open_storage(any_url, write=True)


@pytest.fixture(autouse=True)
def _far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nine hours, so that local times and UTC are told apart."""
    with monkeypatch.context() as changed:
        changed.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


def rows(storage: RDBStorage, table: Any) -> list[dict[str, Any]]:
    """Every row without the database's own keys, in the order in which it was written."""
    with storage.engine.connect() as connection:
        found = connection.execute(sa.select(table).order_by(*table.primary_key)).mappings().all()
    return [{name: value for name, value in row.items() if not name.endswith("_id")} for row in found]


def with_optuna(storage: RDBStorage, attributes: Mapping[str, Any], value: float) -> None:
    study = optuna.create_study(study_name=NAME, storage=storage, direction="minimize")
    study.set_user_attr("steps", [1, 2])
    trial = study.ask({"sum_abs": optuna.distributions.FloatDistribution(1.0, tables.LARGEST_SUM_ABS, log=True)})
    for name, attribute in attributes.items():
        trial.set_user_attr(name, attribute)
    study.tell(trial, value)


@pytest.mark.parametrize("value", [1.5, 5e-324, -1.7e308])
def test_rows_are_those_that_optuna_writes(storage: RDBStorage, value: float) -> None:
    attributes = {"coefficients": [0.1, 0.9], "metrics": {"fid": 0.1 + 0.2}, "tell_index": 0}
    with_optuna(storage, attributes, value)
    compared = (tables.TRIALS, tables.VALUES, tables.DIRECTIONS)
    expected = {table: rows(storage, table) for table in compared}
    texts = {row["key"]: row["value_json"] for row in rows(storage, tables.ATTRIBUTES)}
    optuna.delete_study(study_name=NAME, storage=storage)

    study = StoredStudy.open_or_create(storage, NAME, {"steps": [1, 2]})
    key = study.add_candidate(Candidate(np.array([0.1, 0.9])))
    study.finish(key, Evaluation(value, {"fid": 0.1 + 0.2}), tell_index=0)
    for table in compared:
        for ours, optunas in zip(rows(storage, table), expected[table], strict=True):
            assert set(ours) == set(optunas)
            for name, found in ours.items():
                if isinstance(found, datetime.datetime):
                    assert abs((found - optunas[name]).total_seconds()) < 300, "both of one clock, in UTC"
                else:
                    assert (found, type(found)) == (optunas[name], type(optunas[name]))
    written = {row["key"]: row["value_json"] for row in rows(storage, tables.ATTRIBUTES)}
    assert {name: written[name] for name in texts} == texts
    parameter = rows(storage, tables.PARAMETERS)[0]
    assert (parameter["param_name"], parameter["param_value"]) == ("sum_abs", 1.0)


def test_a_copy_is_what_optuna_reads_of_the_original(storage: RDBStorage) -> None:
    moment = datetime.datetime(2024, 2, 29, 23, 59, 59, 123456)
    trials = [
        create_trial(state=TrialState.COMPLETE, value=2.0, user_attrs={"coefficients": [1.0, 0.0], "a": {"b": None}}),
        create_trial(state=TrialState.FAIL, user_attrs={"reason": "ünlucky"}),
        create_trial(state=TrialState.COMPLETE, value=math.inf, user_attrs={}),
    ]
    for hour, trial in enumerate(trials):
        trial.datetime_start = moment + datetime.timedelta(hours=hour)
        trial.datetime_complete = moment + datetime.timedelta(hours=hour, seconds=1)
    with storage.engine.begin() as connection:
        tables.create_study(connection, NAME, {"steps": [1]}, trials)
    study = optuna.load_study(study_name=NAME, storage=storage)
    assert (study.direction.name, study.user_attrs) == ("MINIMIZE", {"steps": [1]})
    for number, (found, trial) in enumerate(zip(study.trials, trials, strict=True)):
        assert (found.number, found.state, found.value) == (number, trial.state, trial.value)
        assert found.user_attrs == trial.user_attrs
        assert (found.datetime_start, found.datetime_complete) == (trial.datetime_start, trial.datetime_complete)


def test_a_study_of_a_name_that_is_taken_is_an_error_and_nothing_is_written(storage: RDBStorage) -> None:
    StoredStudy.open_or_create(storage, NAME, {})
    with pytest.raises(sa.exc.IntegrityError), storage.engine.begin() as connection:
        tables.create_study(connection, NAME, {"steps": [1]}, [create_trial(value=1.0)])
    assert rows(storage, tables.TRIALS) == []


def test_a_trial_ends_once_and_the_same_end_again_is_no_error(storage: RDBStorage) -> None:
    study = StoredStudy.open_or_create(storage, NAME, {})
    key = study.add_candidate(Candidate(np.array([0.5, 0.5]))).trial_id

    def end(attributes: dict[str, Any], value: float | None, state: TrialState = TrialState.COMPLETE) -> bool:
        with storage.engine.begin() as connection:
            return tables.end_trial(connection, key, state, attributes, value=value)

    assert end({"tell_index": 0}, 1.5)
    before = rows(storage, tables.TRIALS)
    assert end({"tell_index": 0}, 1.5), "a commit that was not acknowledged"
    assert not end({"tell_index": 0}, 2.5)
    assert not end({"tell_index": 1}, 1.5)
    assert not end({"tell_index": 0}, 1.5, TrialState.FAIL)
    assert rows(storage, tables.TRIALS) == before
    assert len(rows(storage, tables.VALUES)) == 1
    with storage.engine.begin() as connection:
        assert not tables.end_trial(connection, key + 1, TrialState.COMPLETE, {}, value=1.0), "no such trial"


def test_a_candidate_is_one_commit_and_a_result_another(storage: RDBStorage) -> None:
    study = StoredStudy.open_or_create(storage, NAME, {})
    commits: list[object] = []
    statements: list[str] = []
    sa.event.listen(storage.engine, "commit", commits.append)
    sa.event.listen(storage.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    key = study.add_candidate(Candidate(np.array([0.5, 0.5])))
    assert len(commits) == 1
    study.finish(key, Evaluation(1.0, {"fid": 1.0}), tell_index=0)
    assert len(commits) == 2
    assert len(statements) <= 14, "each costs as much as the database's own part in it"
