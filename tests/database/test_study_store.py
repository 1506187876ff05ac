from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import open_existing, open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, read_contents
from lcsc_opt.database.summary import Summary
from lcsc_opt.database.urls import storage_url
from tests.study_examples import write_study

NAME = "digits/LCSC/0"


@pytest.fixture
def url(any_url: str) -> str:
    return any_url


@pytest.fixture
def study(url: str) -> StoredStudy:
    return StoredStudy.open_or_create(open_storage(url, write=True), NAME, {"steps": [1, 2], "budget": {"images": 3}})


def candidate(*coefficients: float) -> Candidate:
    return Candidate(np.array(coefficients, dtype=np.float64))


def test_plain_optuna_sees_a_candidate_before_it_is_evaluated_and_then_all_of_its_result(
    study: StoredStudy, url: str
) -> None:
    key = study.add_candidate(candidate(0.25, 0.75))
    (trial,) = optuna.load_study(study_name=NAME, storage=url).trials
    assert (trial.state, coefficients_of(trial).tolist()) == (TrialState.RUNNING, [0.25, 0.75])
    assert trial.params == {"sum_abs": 1.0}
    study.finish(key, Evaluation(1.5, {"fid": 1.5}, Cost(images=10, seconds=2.0)))
    trial = optuna.load_study(study_name=NAME, storage=url).best_trial
    assert (trial.number, trial.value, trial.state) == (0, 1.5, TrialState.COMPLETE)
    assert trial.user_attrs["metrics"] == {"fid": 1.5}
    assert trial.user_attrs["cost"]["images"] == 10
    assert trial.duration is not None
    assert 0 <= trial.duration.total_seconds() < 60  # both ends are of the same clock


def test_a_failure_keeps_its_reason_and_has_no_value(study: StoredStudy, url: str) -> None:
    attempts = [{"reason": "first", "seconds": 0.5}, {"reason": "ValueError: broken", "seconds": 0.25}]
    study.fail(study.add_candidate(candidate(1, 0)), attempts)
    (trial,) = optuna.load_study(study_name=NAME, storage=url).trials
    assert (trial.state, trial.value, trial.user_attrs["reason"]) == (TrialState.FAIL, None, "ValueError: broken")
    assert trial.user_attrs["attempts"] == attempts
    assert trial.user_attrs["cost"]["seconds"] == 0.75


def test_a_result_is_written_once(study: StoredStudy) -> None:
    key = study.add_candidate(candidate(1, 0))
    study.finish(key, Evaluation(1.0))
    with pytest.raises(StudyStoreError, match="trial 0 was finished by another process"):
        study.finish(key, Evaluation(2.0))
    assert study.trials()[0].value == 1.0


class KilledError(BaseException):
    """As if the process ended there."""


def killed(*_: object) -> None:
    raise KilledError


def test_a_result_that_a_crash_cuts_off_is_not_written_at_all(
    study: StoredStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = study.add_candidate(candidate(1, 0))
    with monkeypatch.context() as patched:
        patched.setattr(study.storage, "set_trial_state_values", killed)
        with pytest.raises(KilledError):
            study.finish(key, Evaluation(1.0, {"fid": 1.0}))
    (trial,) = study.trials()
    assert (trial.state, trial.user_attrs.keys()) == (TrialState.RUNNING, {"coefficients"})
    study.finish(key, Evaluation(2.0, {"fid": 2.0}))
    (trial,) = study.trials()
    assert (trial.value, trial.user_attrs["metrics"]) == (2.0, {"fid": 2.0})


def test_a_study_is_made_to_the_end_or_not_at_all(study: StoredStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(study.storage, "set_study_user_attr", killed)
        with pytest.raises(KilledError):
            StoredStudy.created(study.storage, "more/LCSC/0", {"steps": [1]})
    assert [stored.study_name for stored in study.storage.get_all_studies()] == [NAME]
    StoredStudy.created(study.storage, "more/LCSC/0", {"steps": [1]})
    StoredStudy.created(study.storage, "more/LCSC/0", {"steps": [2]})
    assert StoredStudy.open(study.storage, "more/LCSC/0").attributes["steps"] == [1]


def test_a_trial_that_plain_optuna_adds_meanwhile_takes_no_number_of_ours(study: StoredStudy, url: str) -> None:
    with study.hold():
        assert study.add_candidate(candidate(1, 0)) == 0
        optuna.load_study(study_name=NAME, storage=url).add_trial(create_trial(value=0.25))
        number = study.add_candidate(candidate(0, 1))
        study.finish(0, Evaluation(0.75))
        study.finish(number, Evaluation(0.5))
    assert [trial.number for trial in study.trials()] == [0, 2]
    assert study.trial(number).value == 0.5
    reader = HistoryReader(study.storage)
    found = reader.read_study(NAME)
    assert found.summary == Summary.of(study.trials())
    coefficients = reader.answer(found)
    assert coefficients is not None
    assert coefficients.tolist() == [0, 1]


def test_an_artifact_replaces_the_one_of_the_same_name(study: StoredStudy, tmp_path: Path, url: str) -> None:
    store = tmp_path / "artifacts"
    store.mkdir()
    for content in (b"first", b"second"):
        study.attach(store, "curve.png", content)
    (meta,) = optuna.artifacts.get_all_artifact_meta(optuna.load_study(study_name=NAME, storage=url))
    assert (meta.filename, meta.mimetype) == ("curve.png", "image/png")
    assert (store / meta.artifact_id).read_bytes() == b"second"
    assert len(list(store.iterdir())) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("some/studies.db", r"expected a database URL such as sqlite:///studies.db, got \(an unreadable URL\)$"),
        ("postgresql://user:secret@host:port/x", r"got \(an unreadable URL\)$"),
        ("sqlite:////no/such/folder/x.db", "unable to open database file"),
        ("sqlite:////proc/studies.db", "unable to open database file|cannot be written"),  # to root, and to others
        ("mysql+nothing://user:secret@127.0.0.1/x", "SQLite files and in PostgreSQL only"),
        ("sqlite:///:memory:", "SQLite files and in PostgreSQL only"),
        ("sqlite://", "SQLite files and in PostgreSQL only"),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_line(bad: str, message: str) -> None:
    with pytest.raises(StudyStoreError, match=message) as caught:
        open_storage(bad, write=True)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_tilde_in_the_name_of_a_file_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage_url("~/studies.db") == f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.mark.parametrize(("query", "milliseconds"), [("", 3000), ("?timeout=0.25", 250)])
def test_how_long_a_lock_is_waited_for_is_what_the_url_says(tmp_path: Path, query: str, milliseconds: int) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'studies.db'}{query}", write=True)
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == milliseconds


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("these are my notes, not a database")
    with pytest.raises(StudyStoreError, match="file is not a database"):
        open_storage(f"sqlite:///{file}", write=True)
    assert file.read_text() == "these are my notes, not a database"


def test_a_database_that_does_not_exist_yet_is_not_made(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    assert open_existing(url) is None
    assert not list(tmp_path.iterdir())
    write_study(open_storage(url, write=True), "digits/LCSC/0", [1.0])
    there = open_existing(url)
    assert there is not None
    assert list(read_contents(there).studies) == ["digits/LCSC/0"]
    with pytest.raises(StudyStoreError, match="its folder does not exist"):
        open_existing(f"{url}/new.db")
