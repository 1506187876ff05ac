"""One coordinator per study, by a lock that the system frees when its holder ends, however it ends."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.database import lock
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.lock import locked
from lcsc_opt.database.store import StoredStudy
from tests.database_servers import Postgresql
from tests.processes import CONTEXT, forked, wait_until

NAME = "e/LCSC/0"
ONE = Candidate(np.array([0.5, 0.5]))


pytestmark = pytest.mark.usefixtures("impatient")


def open_study(url: str) -> StoredStudy:
    return StoredStudy.open_or_create(open_storage(url, write=True), NAME, {})


def is_held(url: str) -> bool:
    return locked(open_storage(url, write=False), [NAME, "e/LCSC/1"]) == {NAME}


def test_a_second_coordinator_is_told_who_holds_the_study(any_url: str) -> None:
    study = open_study(any_url)
    assert not is_held(any_url)
    with study.hold():
        assert is_held(any_url)
        since = r"\d{4}-\d\d-\d\d \d\d:\d\d"
        with pytest.raises(StudyStoreError, match=rf"is being run on .* by process {os.getpid()} since {since}; wait"):
            open_study(any_url).hold().__enter__()
        other = StoredStudy.open_or_create(study.storage, "e/LCSC/1", {})
        with other.hold():
            pass
    assert not is_held(any_url)
    with pytest.raises(ZeroDivisionError), open_study(any_url).hold():
        _ = 1 / 0
    with study.hold():
        pass


def test_a_coordinator_that_has_not_written_its_name_yet_is_another_process(any_url: str) -> None:
    study = open_study(any_url)
    taken = lock.lock_of(open_storage(any_url, write=True), NAME)
    assert taken.take()
    with pytest.raises(StudyStoreError, match="is being run by another process; wait"):
        study.hold().__enter__()
    taken.free()


def refuse_to_open(self: FileLock, **_: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", self.lock_file)


def test_a_lock_file_that_may_not_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(f"sqlite:///{tmp_path / 'studies.db'}")
    monkeypatch.setattr(FileLock, "acquire", refuse_to_open)
    with pytest.raises(StudyStoreError, match=r"\.lock: Permission denied; .*let this user write it"):
        study.hold().__enter__()
    assert locked(study.storage, [NAME]) == set(), "readers go on"


def hold_and_wait(url: str, holds: Any) -> None:
    with open_study(url).hold():
        holds.put(os.getpid())
        signal.pause()


def test_a_stopped_coordinator_holds_its_study_and_a_killed_one_does_not(any_url: str) -> None:
    open_study(any_url)
    holds = CONTEXT.Queue()
    process = forked(hold_and_wait, any_url, holds)
    process.start()
    try:
        pid = holds.get(timeout=120)
        os.kill(pid, signal.SIGSTOP)
        assert is_held(any_url)
        with pytest.raises(StudyStoreError, match=f"by process {pid} since"):
            open_study(any_url).hold().__enter__()
    finally:
        process.kill()
        process.join(60)
    wait_until(lambda: not is_held(any_url))
    with open_study(any_url).hold():
        pass


def coordinate(url: str, barrier: Any, answers: Any) -> None:
    lock.WAIT_SECONDS = 0.3
    barrier.wait(120)
    study = open_study(url)  # all of them create the database
    try:
        with study.hold():
            answers.put("holds")
            barrier.wait(120)  # nobody gives up before everybody has tried
    except StudyStoreError:
        answers.put("refused")
        barrier.wait(120)


def test_of_four_processes_exactly_one_coordinates(any_url: str) -> None:
    barrier, answers = CONTEXT.Barrier(4), CONTEXT.Queue()
    processes = [forked(coordinate, any_url, barrier, answers) for _ in range(4)]
    for process in processes:
        process.start()
    found = sorted(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert found == ["holds"] + ["refused"] * 3
    assert len(open_storage(any_url, write=False).get_all_studies()) == 1


def test_in_a_copy_of_the_file_nobody_runs_anything_but_a_link_is_the_same_file(tmp_path: Path) -> None:
    place, copy, link = (tmp_path / name for name in ("studies.db", "copy.db", "link.db"))
    study = open_study(f"sqlite:///{place}")
    link.symlink_to(place)
    with study.hold():
        shutil.copy(place, copy)
        with open_study(f"sqlite:///{copy}").hold(), pytest.raises(StudyStoreError):
            open_study(f"sqlite:///{link}").hold().__enter__()
    assert not list(tmp_path.glob(".*")), "no file is left"


def test_a_coordinator_whose_connection_was_lost_goes_on_unless_another_one_began(
    postgresql: Postgresql, postgresql_url: str
) -> None:
    study, other = open_study(postgresql_url), open_study(postgresql_url)
    with study.hold():
        number = study.add_candidate(ONE)
        assert postgresql.terminate_backends(postgresql_url) >= 1
        study.set_attribute("note", 1)
        assert is_held(postgresql_url)
        assert postgresql.terminate_backends(postgresql_url) >= 1
        with other.hold():
            pass
        refuses_all_writes(study, number)
    assert other.attributes["note"] == 1
    assert not any(trial.state.is_finished() for trial in other.trials())


def refuses_all_writes(study: StoredStudy, number: int) -> None:
    writes = [
        lambda: study.add_candidate(ONE),
        lambda: study.finish(number, Evaluation(1.0)),
        lambda: study.fail(number, [{"reason": "x", "seconds": 0}]),
        lambda: study.set_attribute("note", 2),
    ]
    for write in writes:
        with pytest.raises(StudyStoreError, match="another process"):
            write()
