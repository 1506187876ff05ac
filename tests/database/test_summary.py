"""The stored summary of a study: written while it is searched, and never trusted against its trials."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from optuna.storages import RDBStorage

from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.database.history import History, Standing
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, trial_count
from lcsc_opt.database.summary import SUMMARY, Summary
from tests.history_examples import history
from tests.study_examples import add_result, coefficients, write_study

NAME = "digits/LCSC/0"
LOSSES = [4.0, None, 3.0, 5.0, 2.5]


def shown(study: Standing) -> dict[str, object]:
    """What lists and rankings show, without times, which the coordinator's clock and the database's differ in."""
    summary = study.summary
    points = [(point.number, point.images, point.evaluations, point.loss) for point in summary.improvements]
    return {**study.as_row(), "failed": summary.failed, "metric": study.metric, "points": points}


def searched(storage: RDBStorage, losses: list[float | None] = LOSSES) -> StoredStudy:
    """A study that a coordinator has searched."""
    study = write_study(storage, NAME, [], ended=False)
    with study.hold():
        study.begin_summary(study.trials())
        for number, loss in enumerate(losses):
            add_result(study, number, loss)
    return study


def forbid_reading_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("all trials were read")

    monkeypatch.setattr(HistoryReader, "_stored_trials", refuse)


def test_a_summary_shows_what_the_trials_do_without_reading_them(
    any_storage: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched(any_storage)
    [full] = HistoryReader(any_storage).read("digits")
    forbid_reading_all(monkeypatch)
    [short] = HistoryReader(any_storage).read_summaries("digits")
    assert shown(short) == shown(full)
    assert (short.summary.covers, short.best, short.metric) == (5, 4, "FID")


def test_trials_that_a_killed_coordinator_had_not_summarized_are_added(
    storage: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = searched(storage)
    add_result(study, 5, 1.0)  # nobody holds the study: as after a kill between this trial and its summary
    study.add_candidate(Candidate(coefficients(6)))
    [full] = HistoryReader(storage).read("digits")
    with monkeypatch.context() as patched:
        forbid_reading_all(patched)
        [short] = HistoryReader(storage).read_summaries("digits")
    assert shown(short) == shown(full)
    assert (short.evaluations, short.searched, short.summary.trials) == (6, 1.0, 7)
    with study.hold():
        study.begin_summary(study.trials())
    assert study.attributes[SUMMARY]["covers"] == 6, "the coordinator catches up"


@pytest.mark.parametrize(
    "change",
    [{"covers": 9}, {"loss": 0.5}, {"best": 3}, {"failed": 0}, {"retried": [2]}],
    ids=lambda change: next(iter(change)),
)
def test_a_summary_that_contradicts_its_trials_is_made_anew(storage: RDBStorage, change: dict[str, float]) -> None:
    study = searched(storage)
    good = study.attributes[SUMMARY]
    study.set_attribute(SUMMARY, {**good, **change})
    with study.hold():
        study.begin_summary(study.trials())
    anew = study.attributes[SUMMARY]
    assert (anew["covers"], anew["loss"], anew["best"], anew["failed"]) == (5, 2.5, 4, 1)


@pytest.mark.parametrize("field", ["waited_seconds", "unheard_of"])
def test_a_summary_of_another_version_is_not_read_and_is_made_anew_by_the_next_coordinator(
    storage: RDBStorage, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = searched(storage)
    good = study.attributes[SUMMARY]
    other = {**good, "loss": 0.0}
    if other.pop(field, None) is None:
        other[field] = 1
    study.set_attribute(SUMMARY, other)
    [slow] = HistoryReader(storage).read_summaries("digits")
    assert isinstance(slow, History)
    assert (slow.evaluations, slow.searched) == (5, 2.5)
    with study.hold():
        study.begin_summary(study.trials())
    assert study.attributes[SUMMARY].keys() == good.keys()
    forbid_reading_all(monkeypatch)
    [quick] = HistoryReader(storage).read_summaries("digits")
    assert shown(quick) == shown(slow)


def test_a_reader_does_not_trust_a_summary_of_more_trials_than_there_are(storage: RDBStorage) -> None:
    study = searched(storage)
    study.set_attribute(SUMMARY, {**study.attributes[SUMMARY], "covers": 9, "loss": 0.0})
    [short] = HistoryReader(storage).read_summaries("digits")
    assert (short.evaluations, short.searched) == (5, 2.5)


def test_a_study_without_a_summary_is_read_with_its_trials(storage: RDBStorage) -> None:
    study = write_study(storage, NAME, LOSSES)
    assert SUMMARY not in study.attributes
    [full] = HistoryReader(storage).read("digits")
    [short] = HistoryReader(storage).read_summaries("digits")
    assert shown(short) == shown(full)


def test_forgotten_trials_are_in_no_summary(storage: RDBStorage) -> None:
    study = searched(storage, [4.0, None])
    with study.hold():
        assert study.retry_failed() == 1
    [short] = HistoryReader(storage).read_summaries("digits")
    assert (short.evaluations, short.summary.failed) == (1, 0)
    with study.hold():
        study.begin_summary(study.trials())
        add_result(study, 2, 3.0)
    [short] = HistoryReader(storage).read_summaries("digits")
    assert (short.evaluations, short.summary.covers, short.searched) == (2, 3, 3.0)


def test_a_refresh_has_a_new_revision_only_after_a_change(storage: RDBStorage) -> None:
    study = searched(storage)
    reader = HistoryReader(storage)
    first = reader.read_summaries("digits")[0].revision
    assert reader.read_summaries("digits")[0].revision == first
    add_result(study, 5, 1.0)
    assert reader.read_summaries("digits")[0].revision > first


def test_extending_a_summary_gives_the_summary_of_all() -> None:
    study = history([5.0, None, 4.0, 4.5, 3.0, None, 2.0])
    trials = study.finished
    begun = dataclasses.replace(Summary.of(trials[:3]), longest_pause=Summary.of(trials).longest_pause)
    assert begun.extended(trials[3:]) == Summary.of(trials)
    assert Summary.of(trials).compared == 5
    assert Summary.from_json(study.summary.to_json()) == study.summary


@pytest.mark.parametrize("count", [0, 1, 2, 7, 16])
@pytest.mark.parametrize("guess", [0, 1, 5, 40])
def test_trials_are_counted_whatever_the_guess(count: int, guess: int, storage: RDBStorage) -> None:
    study = write_study(storage, NAME, [1.0] * count)
    assert trial_count(storage, study.key, at_least=guess) == count


def test_a_result_is_in_the_summary_at_the_latest_after_25_trials(storage: RDBStorage) -> None:
    study = write_study(storage, NAME, [], ended=False)
    with study.hold():
        study.begin_summary([])
        for number in range(26):
            key = study.add_candidate(Candidate(np.array([0.0, 0.0, 1.0])))
            study.finish(key, Evaluation(float(number), {}, Cost()))
        assert study.attributes[SUMMARY]["covers"] == 25
    assert study.attributes[SUMMARY]["covers"] == 26


def test_a_moments_names_and_attributes_are_read_once(storage: RDBStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    study = searched(storage)
    reader = HistoryReader(storage)
    reads = []
    read = RDBStorage.get_all_studies

    def counted(of: RDBStorage) -> Any:
        reads.append(of)
        return read(of)

    monkeypatch.setattr(RDBStorage, "get_all_studies", counted)
    with reader.at_one_moment():
        with reader.at_one_moment():
            assert reader.experiments() == ["digits"]
        [before] = reader.read_summaries("digits")
        add_result(study, 5, 1.0)
        [after] = reader.read_summaries("digits")
    assert len(reads) == 1
    assert (before.searched, after.searched) == (2.5, 1.0), "trials are always read as they are"
    reader.experiments()
    assert len(reads) == 2


def test_a_study_that_has_ended_costs_a_refresh_no_query(storage: RDBStorage) -> None:
    study = searched(storage)
    study.set_attribute("search_ended", {"evaluations": 5, "exhausted": False})
    reader = HistoryReader(storage)
    reader.read_summaries("digits")
    statements: list[str] = []
    sa.event.listen(storage.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    [summary] = reader.read_summaries("digits")
    assert summary.evaluations == 5
    assert statements
    assert not [statement for statement in statements if "FROM trials" in statement]
    study.set_attribute("search_ended", None)
    reader.read_summaries("digits")
    assert [statement for statement in statements if "FROM trials" in statement]
