from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.opened import Database
from lcsc_opt.database.reader import FailureReason, HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.urls import url_of_file
from tests.history_examples import measured, report_of
from tests.study_examples import STEPS, coefficients, write_report, write_study

COST = Cost(images=10, model_calls=20, seconds=1.5, merge_seconds=0.25, sample_seconds=0.5, features_seconds=0.5)


def test_a_history_holds_what_optuna_reads(any_storage: RDBStorage) -> None:
    study = write_study(any_storage, "digits/LCSC/3", [4.0, None, 2.0], ended=False, running=2)
    study.finish(study.add_candidate(Candidate(coefficients(5))), Evaluation(1.0, {}, COST))
    reader = HistoryReader(any_storage)
    (found,) = reader.read("digits")
    trials = reader.trials(found)
    assert trials == optuna.load_study(study_name="digits/LCSC/3", storage=any_storage).trials
    assert [trial.value for trial in trials] == [4, None, 2, None, None, 1]
    assert (found.experiment, found.optimizer, found.seed, found.steps) == ("digits", "LCSC", 3, STEPS)
    assert (found.state, found.summary.best, found.chosen, found.searched, found.metric) == (
        "interrupted",
        5,
        5,
        1.0,
        "loss",
    )
    assert reader.failures(found) == [FailureReason("broken", 1, 1)]


def test_a_refresh_changes_what_has_changed(storage: RDBStorage) -> None:
    for seed in range(3):
        write_study(storage, f"digits/LCSC/{seed}", [4.0, 2.0], ended=False, running=1)
    reader = HistoryReader(storage)
    first = reader.read("digits")
    trials = reader.trials(first[1])
    study = StoredStudy.open(storage, "digits/LCSC/1")
    study.finish(2, Evaluation(1.0, {"fid": 1.0}, COST))
    study.add_candidate(Candidate(coefficients(3)))
    second = reader.read("digits")
    assert [two != one for one, two in zip(map(repr, first), map(repr, second), strict=True)] == [False, True, False]
    assert [trial.value for trial in trials] == [4.0, 2.0, None], "what was read before does not change"
    assert [trial.value for trial in reader.trials(second[1])] == [4.0, 2.0, 1.0, None]
    assert (second[1].searched, second[1].metric) == (1.0, "fid")
    study.set_attribute("search_ended", {"evaluations": 4})
    write_report(storage, report_of({"digits/LCSC/1": measured(2.5, trial=1, images=7)}))
    third = reader.read("digits")[1]
    assert (third.ended, third.chosen) == (True, 1)
    assert third.found is not None
    assert (third.found.loss, third.found.images, third.found.seeds) == (2.5, 7, (0,))


@pytest.mark.parametrize("name", ["digits/LCSC/0", "digits/CMA/0"])
@pytest.mark.parametrize("is_held", [False, True])
def test_a_study_that_was_deleted_and_made_again_is_read_anew(storage: RDBStorage, name: str, is_held: bool) -> None:
    def write(name: str, losses: list[float | None]) -> None:
        study = write_study(storage, name, losses)
        if is_held:
            with study.hold():  # stores a summary
                pass

    write("digits/LCSC/0", [4.0, 2.0])
    reader = HistoryReader(storage)
    (before,) = reader.read("digits")
    assert before.searched == 2.0
    assert [trial.value for trial in reader.trials(before)] == [4.0, 2.0]
    storage.delete_study(storage.get_study_id_from_name("digits/LCSC/0"))
    write(name, [9.0, 8.0, 7.0])  # SQLite gives it the same keys again
    (again,) = reader.read("digits")
    assert ([trial.value for trial in reader.trials(again)], again.searched) == ([9.0, 8.0, 7.0], 7.0)
    storage.delete_study(storage.get_study_id_from_name(name))
    assert reader.read_studies([name]) == ()


def test_attempts_that_failed_are_kept_with_their_reasons(storage: RDBStorage) -> None:
    study = write_study(storage, "digits/LCSC/0", [])
    key = study.add_candidate(Candidate(coefficients(0)))
    study.note_attempts(key, [{"reason": "out of memory", "seconds": 1}])
    study.finish(key, Evaluation(1.0, {}, COST))
    closed = study.add_candidate(Candidate(coefficients(1)))
    key = storage.get_study_id_from_name(study.name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(key, closed)
    storage.set_trial_state_values(trial_id, optuna.trial.TrialState.FAIL)  # by another program
    reader = HistoryReader(storage)
    (found,) = reader.read("digits")
    assert reader.failures(found) == [FailureReason("out of memory", 1, 0), FailureReason("unknown", 1, 1)]


def test_forgotten_trials_are_gone_at_once(storage: RDBStorage) -> None:
    study = write_study(storage, "digits/LCSC/0", [4.0, None, 2.0, None], running=1)
    reader = HistoryReader(storage)
    (before,) = reader.read("digits")
    assert [trial.number for trial in reader.trials(before)] == [0, 1, 2, 3, 4]
    assert study.retry_failed() == 1
    study.add_candidate(Candidate(coefficients(1)))
    (running,) = reader.read("digits")
    assert [trial.number for trial in reader.trials(running)] == [0, 1, 2, 5]
    assert reader.failures(running) == [FailureReason("broken", 1, 1)]


def test_experiments_that_are_not_there_are_named_with_what_there_is(storage: RDBStorage) -> None:
    write_study(storage, "faces/LCSC/0", [1.0])
    reader = HistoryReader(storage)
    assert reader.experiments() == ["faces"]
    with pytest.raises(StudyStoreError, match=r"^face: no such experiment \(did you mean 'faces'\?\)"):
        reader.read("face")
    with pytest.raises(StudyStoreError, match=r"digits/CMA/9: no such study in .*studies.db; it holds: faces/LCSC/0"):
        reader.read_study("digits/CMA/9")
    with pytest.raises(
        StudyStoreError,
        match=r"no such study in .*; its studies are: faces/LCSC/0. .* lcsc compare faces",
    ):
        reader.read_study("faces")
    with pytest.raises(StudyStoreError, match="their names are experiment/optimizer/seed"):
        reader.read_studies(["somebody's own"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"something else", "file is not a database"), (b"", "no such table"), (None, "no such database")],
)
def test_a_file_that_was_replaced_is_refused_each_time(
    content: bytes | None, problem: str, url: str, tmp_path: Path
) -> None:
    write_study(open_storage(url, write=True), "digits/LCSC/0", [1.0])
    reader = HistoryReader(open_storage(url, write=False))
    assert reader.names() == ["digits/LCSC/0"]
    file = tmp_path / "studies.db"
    stored = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)  # the inode stays, as some file systems give a new file the inode of a deleted one
    for _ in range(2):
        with pytest.raises(StudyStoreError, match=problem):
            reader.names()
    file.write_bytes(stored)
    assert reader.names() == ["digits/LCSC/0"]


def tables(file: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(file)) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE studies (id INTEGER PRIMARY KEY, title TEXT)"],
        ["CREATE TABLE alembic_version (version_num TEXT)", "CREATE TABLE experiments (name TEXT)"],
    ],
    ids=["a table of Optuna's name", "another program's migrations"],
)
def test_the_database_of_another_program_is_refused_and_gets_no_table(statements: list[str], tmp_path: Path) -> None:
    file = tmp_path / "others.db"
    with contextlib.closing(sqlite3.connect(file)) as connected:
        for statement in statements:
            connected.execute(statement)
    before = tables(file)
    with pytest.raises(StudyStoreError, match="holds no studies"):
        open_storage(url_of_file(file), write=False)
    with pytest.raises(StudyStoreError, match="holds the tables of another program"):
        Database(url_of_file(file))
    assert tables(file) == before


def test_a_database_whose_creation_was_cut_gets_the_other_tables(tmp_path: Path) -> None:
    RDBStorage(url_of_file(tmp_path / "whole.db"))
    with contextlib.closing(sqlite3.connect(tmp_path / "whole.db")) as connection:
        [create] = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'studies'").fetchone()
    with contextlib.closing(sqlite3.connect(tmp_path / "begun.db")) as connection:
        connection.execute(create)  # Optuna creates them one by one, this one first
    assert open_storage(url_of_file(tmp_path / "begun.db"), write=True).get_all_studies() == []
    assert tables(tmp_path / "begun.db") == tables(tmp_path / "whole.db")
