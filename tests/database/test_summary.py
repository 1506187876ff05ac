"""The stored summary of a study: there is one only while it says what the trials do."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.base.records import Candidate
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import Standing
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, read_contents
from lcsc_opt.database.summary import SUMMARY, Summary
from tests.processes import forked
from tests.study_examples import add_result, coefficients, write_study

NAME = "digits/LCSC/0"
LOSSES = [4.0, None, 3.0, 5.0, 2.5]


def searched(storage: RDBStorage, losses: list[float | None] = LOSSES, name: str = NAME) -> StoredStudy:
    """A study whose search was interrupted."""
    study = write_study(storage, name, [], ended=False)
    with study.hold():
        for number, loss in enumerate(losses):
            add_result(study, number, loss)
    return study


def read(storage: RDBStorage) -> Standing:
    """The only study of an experiment, as a process reads it that has just begun."""
    [study] = HistoryReader(storage).read("digits")
    return study


def queries_of_trials(storage: RDBStorage) -> list[str]:
    """Those that are sent from now on."""
    found: list[str] = []

    def sent(*arguments: Any) -> None:
        if "FROM trials" in arguments[2]:
            found.append(arguments[2])

    sa.event.listen(storage.engine, "before_cursor_execute", sent)
    return found


def test_a_summary_says_what_the_trials_do_and_none_of_them_is_read(any_storage: RDBStorage) -> None:
    study = searched(any_storage)
    queries = queries_of_trials(any_storage)
    with study.hold():
        study.set_attribute("measured", {})  # as a process that reports
    queries.clear()
    found = read(any_storage)
    assert len(queries) == 1, "of what the experiment measured"
    assert found.summary == Summary.of(study.trials())
    assert (found.summary.evaluations, found.summary.failed, found.summary.trials) == (5, 1, 5)
    assert (found.summary.best, found.searched, found.metric) == (4, 2.5, "fid")
    study.set_attribute(SUMMARY, None)
    without = read(any_storage)
    assert queries
    assert (without.searched, without.state, without.summary) == (found.searched, found.state, found.summary)


def test_while_a_search_runs_there_is_no_summary_and_trials_are_read_as_they_are(any_storage: RDBStorage) -> None:
    study = searched(any_storage)
    reader = HistoryReader(any_storage)
    with study.hold():
        assert reader.read_study(NAME).summary.evaluations == 5
        key = study.add_candidate(Candidate(coefficients(5)))
        assert SUMMARY in study.attributes
        assert study.attributes[SUMMARY] is None
        found = reader.read_study(NAME)
        assert (found.summary.evaluations, found.summary.trials, found.running) == (5, 6, True)
        study.fail(key, [{"reason": "broken", "seconds": 1.0}])
        assert (reader.read_study(NAME).summary.failed, read(any_storage).summary.failed) == (2, 2)
    assert study.attributes[SUMMARY]["failed"] == 2
    assert reader.read_study(NAME).summary == Summary.of(study.trials())


def test_an_interrupted_search_leaves_the_summary_of_all_trials(storage: RDBStorage) -> None:
    study = searched(storage, [4.0])

    def interrupted() -> None:
        with study.hold():
            add_result(study, 1, 1.0)
            study.add_candidate(Candidate(coefficients(2)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    found = Summary.stored(study.attributes)
    assert found == Summary.of(study.trials())
    assert found is not None
    assert (found.trials, found.evaluations, found.loss) == (3, 2, 1.0)


def _killed_before_write(url: str, last: int) -> None:
    writes = 0
    write = StoredStudy._write

    def counted(study: StoredStudy, change: Any) -> Any:
        nonlocal writes
        if writes == last:
            os._exit(9)
        writes += 1
        return write(study, change)

    study = StoredStudy.open(open_storage(url, write=True), NAME)
    with mock.patch.object(StoredStudy, "_write", counted), study.hold():
        study.note_attempts(2, [{"reason": "broken", "seconds": 1.0}])
        study.fail(2, [{"reason": "broken", "seconds": 1.0}])
        add_result(study, 3, 1.0)


@pytest.mark.parametrize("last", [0, 3, 5])
def test_a_kill_before_any_write_leaves_what_the_trials_say(any_url: str, last: int) -> None:
    storage = open_storage(any_url, write=True)
    study = searched(storage, [4.0, 2.0])
    with study.hold():
        study.add_candidate(Candidate(coefficients(2)))
    process = forked(_killed_before_write, any_url, last)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert (study.stored_attributes()[SUMMARY] is None) == (last > 0)
    assert read(storage).summary == Summary.of(study.trials())
    with study.hold():
        pass
    assert Summary.stored(study.attributes) == Summary.of(study.trials()), "the next process stores it"


def test_a_study_that_is_deleted_while_it_is_held_leaves_nothing(storage: RDBStorage) -> None:
    study = write_study(storage, NAME, LOSSES)
    with study.hold():
        study.delete()
    assert read_contents(storage).studies == {}


@pytest.mark.parametrize("field", ["cost", "unheard_of"])
def test_a_summary_of_another_version_is_not_read_and_is_made_anew_by_the_next_process(
    storage: RDBStorage, field: str
) -> None:
    study = searched(storage)
    good = study.attributes[SUMMARY]
    other = {**good, "failed": 4}
    if other.pop(field, None) is None:
        other[field] = 1
    study.set_attribute(SUMMARY, other)
    assert read(storage).summary.failed == 1
    with study.hold():
        pass
    assert study.attributes[SUMMARY] == good


def test_forgotten_trials_are_in_no_summary(storage: RDBStorage) -> None:
    study = searched(storage, [4.0, None])
    with study.hold():
        assert study.retry_failed() == 1
        assert study.attributes[SUMMARY] is None
    found = read(storage)
    assert (found.summary.evaluations, found.summary.trials, found.summary.failed) == (1, 1, 0)
    with study.hold():
        add_result(study, 2, 3.0)
    found = read(storage)
    assert (found.summary.evaluations, found.searched) == (2, 3.0)
