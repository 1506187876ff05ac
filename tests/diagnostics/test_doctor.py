from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from optuna.artifacts import FileSystemArtifactStore

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.lease import Process, create_table, hold
from lcsc_opt.database.store import StoredStudy, TrialKey
from lcsc_opt.diagnostics.doctor import Finding, diagnose
from lcsc_opt.trajectory import TrajectoryWriter

NAME, URL = "tiny/LCSC/0", "sqlite:///studies.db"
MODULE = """
def loss(coefficients):
    if coefficients[0] < -1:
        raise RuntimeError("far away")
    return float((coefficients**2).sum())
"""
STUDY = {
    "name": "tiny",
    "objective": {
        "file": "function.py",
        "settings": {"callable": "doctors_losses:loss", "held_out": "doctors_losses:loss", "steps": [10, 20, 30]},
    },
    "optimizers": ["LCSC"],
    "seeds": [0],
    "budget": {"evaluations": 6},
    "held_out": {"images": 10, "top": 2},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that has run, and an artifact beside its answer."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "doctors_losses.py").write_text(MODULE)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    with _chdir(folder):
        assert lcsc(["run", "tiny.yaml", "--storage", URL]) == 0
        study = StoredStudy.open(open_storage(URL, write=True), NAME)
        answer = next(trial for trial in study.trials() if trial.number == study.attributes["held_out"]["trial"])
        Path("studies.artifacts").mkdir()
        study.attach(TrialKey.of(answer), FileSystemArtifactStore("studies.artifacts"), Path("tiny.yaml"))
    return folder


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def study(workplace: Path, finished: Path) -> Path:
    """A copy of the finished study, in the working directory."""
    shutil.copytree(finished, workplace, dirs_exist_ok=True)
    return workplace


def sql(statement: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect("studies.db")) as connection, connection:
        assert connection.execute(statement, values).rowcount != 0, statement


def trial_attribute(number: int, name: str, value: Any) -> None:
    chosen = "trial_id = (SELECT trial_id FROM trials WHERE number = ?) AND key = ?"
    if value is None:
        sql(f"DELETE FROM trial_user_attributes WHERE {chosen}", number, name)
    else:
        sql(f"UPDATE trial_user_attributes SET value_json = ? WHERE {chosen}", _json(value), number, name)


def study_attribute(name: str, value: Any) -> None:
    if value is None:
        sql("DELETE FROM study_user_attributes WHERE key = ?", name)
    else:
        sql("UPDATE study_user_attributes SET value_json = ? WHERE key = ?", _json(value), name)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def study_value(name: str) -> Any:
    return StoredStudy.open(open_storage(URL, write=False), NAME).attributes.get(name)


def problems(**how: Any) -> list[Finding]:
    return [finding for finding in diagnose(URL, **how).found if finding.severity == "problem"]


def kinds(found: tuple[Finding, ...]) -> list[str]:
    return [finding.kind for finding in found]


def old_file(name: str) -> Path:
    path = Path("studies.artifacts") / name
    path.write_bytes(b"left over")
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    return path


def test_a_sound_database_has_no_problems_and_is_not_written(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("studies.db").read_bytes()
    assert lcsc(["doctor", "--format", "json", "--deep"]) == 0
    (schema,) = json.loads(capsys.readouterr().out)
    assert (schema["kind"], schema["severity"], schema["repaired"]) == ("schema", "note", False)
    assert "a table of leases" in schema["text"]
    assert lcsc(["doctor", NAME, "--repair"]) == 0
    assert "problems: 0, notes: 1, repaired: 0" in capsys.readouterr().err
    assert Path("studies.db").read_bytes() == before


UNREPAIRABLE: list[tuple[str, Callable[[], None], str, int | None]] = [
    ("no JSON", lambda: trial_attribute(2, "coefficients", "[0.5,"), "the attribute coefficients is no JSON", 2),
    ("study JSON", lambda: study_attribute("budget", "{"), "the attribute budget is no JSON", None),
    ("specification", lambda: study_attribute("specification", None), "not a study of lcsc_opt", None),
    ("budget", lambda: study_attribute("budget", {"evaluations": -1}), "not a study of lcsc_opt", None),
]


@pytest.mark.parametrize(
    ("damage", "text", "trial"), [row[1:] for row in UNREPAIRABLE], ids=[r[0] for r in UNREPAIRABLE]
)
def test_damage_that_cannot_be_repaired_is_named_and_stays(
    damage: Callable[[], None], text: str, trial: int | None, study: Path
) -> None:
    damage()
    matching = [finding for finding in problems() if text in finding.text]
    assert [(finding.study, finding.trial, finding.repairable) for finding in matching] == [(NAME, trial, False)]
    assert diagnose(URL, mend=True).repaired == ()
    assert [finding.text for finding in problems()] == [finding.text for finding in matching]


def test_studies_of_other_programs_are_one_line(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("mine", "cifar/resnet/0", "cifar/resnet/1"):
        optuna.create_study(study_name=name, storage=URL).optimize(lambda trial: trial.suggest_float("x", 0, 1), 2)
    report = diagnose(URL)
    assert [(finding.kind, finding.text) for finding in report.found[1:]] == [
        ("other programs", "3 studies of other programs")
    ]
    assert report.problems == 0
    assert lcsc(["list"]) == 0
    printed = capsys.readouterr()
    assert "cifar" not in printed.out
    assert "3 studies of other programs" in printed.err
    assert lcsc(["show", "cifar/resnet/0"]) == 2
    assert "is a study of another program" in capsys.readouterr().err


def test_rows_of_a_trial_that_is_gone_are_counted(study: Path) -> None:
    sql("DELETE FROM trials WHERE number = 5")
    texts = {finding.text for finding in problems() if finding.kind == "references"}
    assert "1 rows of trial_values belong to a row of trials that is gone" in texts


def leave_running(*numbers: int) -> None:
    for number in numbers:
        sql("UPDATE trials SET state = 'RUNNING' WHERE number = ?", number)
        sql("DELETE FROM trial_values WHERE trial_id = ?", number + 1)
    study_attribute("search_ended", None)
    study_attribute("held_out", None)


def test_an_orphan_is_a_note_and_resume_evaluates_it_again(study: Path) -> None:
    leave_running(5)
    report = diagnose(URL, mend=True)
    (note,) = [finding for finding in report.found if finding.kind == "running"]
    assert (note.severity, report.problems) == ("note", 0)
    assert "unfinished: 5" in note.text
    assert f"lcsc resume {NAME}" in note.advice
    assert lcsc(["resume", NAME]) == 0
    assert kinds(diagnose(URL).found) == ["schema"]


def test_a_dead_holder_is_released(study: Path) -> None:
    engine = open_storage(URL, write=True).engine
    here = Process.current()
    with hold(engine, NAME, 1, process=Process(here.host, here.machine, 2**22 + 1, "1")):
        before = diagnose(URL)
        (dead,) = [finding for finding in before.found if finding.kind == "dead lease"]
        assert "which is dead" in dead.text
        assert before.problems == 0  # any run would take it
        report = diagnose(URL, mend=True)
        assert kinds(report.repaired) == ["dead lease"]
        assert kinds(report.found) == ["schema"]


def test_a_study_that_somebody_runs_is_read_and_not_touched(study: Path) -> None:
    left = old_file(str(uuid.uuid4()))
    live = StoredStudy.open(open_storage(URL, write=True), NAME)
    with live.hold():
        before = Path("studies.db").read_bytes()
        report = diagnose(URL, mend=True)
        assert report.repaired == ()
        assert {"lease", "orphan file"} <= set(kinds(report.found))
        assert any("is being run by process" in finding.text for finding in report.found)
        assert Path("studies.db").read_bytes() == before
        assert left.exists()
        live.set_attribute("still", "ours")
    assert diagnose(URL, mend=True).problems == 0
    assert not left.exists()


def test_a_database_without_leases_is_a_note(study: Path) -> None:
    sql("DROP TABLE lcsc_leases")
    report = diagnose(URL)
    assert report.problems == 0
    assert "no table of leases" in report.found[0].text


def test_an_artifact_without_its_file_is_a_problem(study: Path) -> None:
    gone = next(path for path in Path("studies.artifacts").iterdir())
    gone.unlink()
    (found,) = problems()
    assert (found.kind, found.file, found.study) == ("artifact", gone.name, NAME)


def test_files_that_no_trial_names_are_removed_and_others_are_kept(study: Path) -> None:
    named = set(Path("studies.artifacts").iterdir())
    for path in named:
        os.utime(path, (1, 1))
    left, foreign = old_file(str(uuid.uuid4())), old_file("my notes.txt")
    version_1 = old_file(str(uuid.uuid1()))
    fresh = Path("studies.artifacts") / str(uuid.uuid4())  # its row may be on its way
    fresh.write_bytes(b"")
    report = diagnose(URL)
    assert [finding.file for finding in report.found if finding.kind == "orphan file"] == [left.name]
    assert kinds(diagnose(URL, NAME, mend=True).repaired) == []  # it belongs to no study
    assert kinds(diagnose(URL, mend=True).repaired) == ["orphan file"]
    assert set(Path("studies.artifacts").iterdir()) == {*named, foreign, version_1, fresh}


def test_files_in_a_folder_of_two_databases_are_kept(study: Path) -> None:
    left = old_file(str(uuid.uuid4()))
    shutil.copy("studies.db", "studies.sqlite")
    report = diagnose(URL, mend=True)
    (note,) = [finding for finding in report.found if finding.file == left.name]
    assert (note.severity, note.repairable) == ("note", False)
    assert "studies.sqlite" in note.advice
    assert left.exists()


def test_a_truncated_database_is_one_line(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = Path("studies.db").read_bytes()
    for size in (len(content) // 2, 4096, 100, 20):
        Path("studies.db").write_bytes(content[:size])
        for arguments in ([], ["--repair"]):
            assert lcsc(["doctor", *arguments]) in (1, 2)
            captured = capsys.readouterr()
            assert "Traceback" not in captured.err
            assert "studies.db" in captured.err + captured.out
        assert Path("studies.db").read_bytes() == content[:size]


def test_a_damaged_page_is_a_problem_and_nothing_is_repaired(study: Path) -> None:
    left = old_file(str(uuid.uuid4()))
    content = bytearray(Path("studies.db").read_bytes())
    with contextlib.closing(sqlite3.connect("studies.db")) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ix_trials_study_id'").fetchone()
    content[(page - 1) * 4096 + 4] -= 1  # how many entries the index has
    Path("studies.db").write_bytes(content)
    report = diagnose(URL, mend=True)
    assert set(kinds(report.found)) == {"integrity"}
    assert any("ix_trials_study_id" in finding.text for finding in report.found)
    assert report.problems > 0
    assert left.exists()


def test_another_programs_database_stays_as_it_is(workplace: Path) -> None:
    with contextlib.closing(sqlite3.connect("studies.db")) as connection, connection:
        connection.execute("CREATE TABLE bookmarks (id INTEGER)")
    before = Path("studies.db").read_bytes()
    for mend in (False, True):
        with pytest.raises(StudyStoreError, match="is no study database"):
            diagnose(URL, mend=mend)
    assert Path("studies.db").read_bytes() == before
    with pytest.raises(StudyStoreError, match="no such database"):
        diagnose("sqlite:///nothing.db", mend=True)
    assert not Path("nothing.db").exists()


def test_an_unknown_study_is_one_line(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lcsc(["doctor", "tiny/CMA/0"]) == 2
    assert "tiny/CMA/0: no such study" in capsys.readouterr().err


def test_deep_finds_an_objective_that_is_gone_or_is_another(study: Path) -> None:
    fingerprint = study_value("fingerprint")
    study_attribute("fingerprint", {**fingerprint, "objective": {**fingerprint["objective"], "callable": "x:y"}})
    assert problems() == []
    (found,) = problems(deep=True)
    assert "fingerprint.objective.callable was" in found.text
    specification = study_value("specification")
    settings = {"callable": "nowhere_at_all:loss", "steps": [10, 20, 30]}
    study_attribute("specification", {**specification, "objective": {"file": "function.py", "settings": settings}})
    (found,) = problems(deep=True)
    assert "its objective cannot be loaded" in found.text


WITH_TRAJECTORY = """
from lcsc_opt.objective import CoefficientFunction
from lcsc_opt.trajectory import Trajectory

def build(settings):
    objective = CoefficientFunction(lambda a: float((a**2).sum()), (10, 20, 30), name="with a trajectory")
    objective.trajectory = Trajectory.open("runs.trajectory")
    return objective
"""


def test_deep_names_the_step_whose_weights_are_damaged(workplace: Path) -> None:
    writer = TrajectoryWriter("runs.trajectory")
    for step in (10, 20, 30):
        writer.append(step, {"w": torch.full((64,), float(step))})
    Path("mine.py").write_text(WITH_TRAJECTORY)
    Path("tiny.yaml").write_text(yaml.safe_dump({**STUDY, "objective": {"file": "mine.py"}}))
    assert lcsc(["run", "tiny.yaml", "--storage", URL]) == 0
    assert problems(deep=True) == []
    weights = Path("runs.trajectory/weights.bin")
    content = bytearray(weights.read_bytes())
    content[content.index(torch.full((64,), 20.0).numpy().tobytes())] ^= 1
    weights.write_bytes(content)
    (found,) = problems(deep=True)
    assert (found.study, found.kind) == (NAME, "objective")
    assert "the weights of step 20 are damaged" in found.text


def test_reading_the_holder_makes_no_table(study: Path) -> None:
    sql("DROP TABLE lcsc_leases")
    diagnose(URL)
    storage = open_storage(URL, write=True)
    with contextlib.closing(sqlite3.connect("studies.db")) as connection:
        assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'lcsc_leases'").fetchall() == []
    create_table(storage.engine)
    assert "; a table of leases" in diagnose(URL).found[0].text


def test_a_study_on_a_server_is_checked_and_repaired_alike(study: Path, postgresql_url: str) -> None:
    assert lcsc(["run", "tiny.yaml", "--storage", postgresql_url]) == 0
    assert kinds(diagnose(postgresql_url, deep=True).found) == ["schema"]
    engine = open_storage(postgresql_url, write=False).engine
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE lcsc_leases SET holder = 'gone', heartbeat_at = 0")
    engine.dispose()
    Path("lcsc.artifacts").mkdir(exist_ok=True)
    left = Path("lcsc.artifacts") / str(uuid.uuid4())
    left.write_bytes(b"")
    os.utime(left, (1, 1))
    report = diagnose(postgresql_url, mend=True)
    assert set(kinds(report.repaired)) == {"dead lease"}
    assert kinds(report.found) == ["schema", "file"]
    assert left.exists()  # another database may name it
