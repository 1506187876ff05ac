from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from lcsc_opt.base.errors import LeaseLostError, StudyHeldError
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.database import connection, lease
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.lease import LEASE_SECONDS, Process, create_table, hold, holder
from lcsc_opt.database.store import StoredStudy
from tests.processes import CONTEXT, forked, wait_until

EVENTS = ("before_cursor_execute", "after_cursor_execute", "commit")
ONE = Candidate(np.array([0.5, 0.5]))


def open_study(url: str) -> StoredStudy:
    return StoredStudy.open_or_create(open_storage(url, write=True), "e/LCSC/0", {})


@pytest.fixture
def study(url: str) -> StoredStudy:
    return open_study(url)


def age_heartbeat(url: str, seconds: float) -> None:
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute("UPDATE lcsc_leases SET heartbeat_at = heartbeat_at - ?", (seconds,))


def other_process(**changes: Any) -> Process:
    values = {"host": "node7", "machine": "node7 some-boot", "number": 4711, "started": "12345"}
    return Process(**{**values, **changes})


def test_a_second_coordinator_is_told_who_holds_the_study_at_once(study: StoredStudy, url: str) -> None:
    with study.hold(), pytest.raises(StudyHeldError, match=rf"is being run on .* by process {os.getpid()} since 2"):
        open_study(url).hold().__enter__()
    with open_study(url).hold():  # given up at the end
        pass


def test_a_lease_is_given_up_when_the_search_fails(study: StoredStudy) -> None:
    with pytest.raises(ZeroDivisionError), study.hold():
        _ = 1 / 0
    with study.hold():
        pass


def test_a_dead_process_of_this_machine_does_not_hold_a_study(study: StoredStudy, url: str) -> None:
    here = Process.current()
    gone = Process(here.host, here.machine, 2**22 + 1, "1")
    recycled = Process(here.host, here.machine, os.getpid(), "not when this process started")
    create_table(study.storage.engine)
    for dead in (gone, recycled):
        left_behind = hold(study.storage.engine, "e/LCSC/0", 1, process=dead)
        left_behind.__enter__()  # kept, since a holder that is collected gives its lease up
        held = holder(study.storage.engine, 1)
        assert held is not None
        assert not held.alive
        with study.hold():
            pass
        left_behind.__exit__(None, None, None)


def test_a_process_elsewhere_holds_a_study_until_its_heartbeat_is_old(study: StoredStudy, url: str) -> None:
    create_table(study.storage.engine)
    elsewhere = hold(study.storage.engine, "e/LCSC/0", 1, process=other_process())
    with elsewhere:
        with pytest.raises(StudyHeldError, match="on node7 by process 4711"):
            study.hold().__enter__()
        age_heartbeat(url, LEASE_SECONDS + 1)
        with study.hold():
            pass


def test_a_coordinator_that_lost_its_lease_cannot_write(study: StoredStudy, url: str) -> None:
    other = open_study(url)
    with study.hold():
        first = study.add_candidate(ONE)
        with other.hold(take_over=True):
            other.add_candidate(ONE)
            writes = [
                lambda: study.add_candidate(ONE),
                lambda: study.finish(first, Evaluation(1.0), tell_index=0),
                lambda: study.fail(first, [{"reason": "x", "seconds": 0}], tell_index=0),
                lambda: study.annotate(first, {"held_out": {}}),
                lambda: study.set_attribute("budget", {}),
            ]
            for write in writes:
                with pytest.raises(LeaseLostError, match="another process has taken this study over"):
                    write()
    trials = open_study(url).trials()
    assert len(trials) == 2
    assert not any(trial.state.is_finished() for trial in trials)
    assert all(set(trial.user_attrs) == {"coefficients"} for trial in trials)


def test_a_coordinator_whose_trial_was_finished_by_another_one_has_lost_its_lease(study: StoredStudy, url: str) -> None:
    other = open_study(url)
    with study.hold():
        first = study.add_candidate(ONE)
        with other.hold(take_over=True):
            other.finish(first, Evaluation(1.0), tell_index=0)
            with pytest.raises(LeaseLostError, match="trial 0 was finished by another process"):
                study.finish(first, Evaluation(2.0), tell_index=0)
            with pytest.raises(LeaseLostError):  # the same result is not taken for a commit of our own
                study.finish(first, Evaluation(1.0), tell_index=0)
    assert open_study(url).trials()[0].value == 1.0


def test_the_one_who_took_over_keeps_the_lease_when_the_loser_leaves(study: StoredStudy, url: str) -> None:
    other = open_study(url)
    with study.hold():
        taken = other.hold(take_over=True)
        taken.__enter__()
    other.add_candidate(ONE)
    with pytest.raises(StudyHeldError):
        study.hold().__enter__()
    taken.__exit__(None, None, None)


def test_the_heartbeat_goes_on_while_the_holder_is_busy(
    study: StoredStudy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    with study.hold():
        age_heartbeat(url, LEASE_SECONDS + 1)
        wait_until(lambda: (held := holder(study.storage.engine, study.key)) is not None and held.alive)
        with pytest.raises(StudyHeldError):
            open_study(url).hold().__enter__()


def coordinate(url: str, barrier: Any, answers: Any) -> None:
    barrier.wait(120)
    study = open_study(url)  # all of them create the database
    try:
        with study.hold():
            answers.put("holds")
            barrier.wait(120)  # nobody gives up before everybody has tried
    except StudyHeldError:
        answers.put("refused")
        barrier.wait(120)


def test_of_eight_processes_exactly_one_coordinates(any_url: str) -> None:
    barrier, answers = CONTEXT.Barrier(8), CONTEXT.Queue()
    processes = [forked(coordinate, any_url, barrier, answers) for _ in range(8)]
    for process in processes:
        process.start()
    found = sorted(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert found == ["holds"] + ["refused"] * 7
    assert len(open_storage(any_url, write=False).get_all_studies()) == 1


def test_ctrl_c_at_any_moment_of_a_write_leaves_neither_lock_nor_lease(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted statement that is still there would keep SQLite's lock, which giving up the lease waits for."""
    monkeypatch.setattr(connection, "BUSY_SECONDS", 0.1)
    study, moment = open_study(url), 0
    engine = study.storage.engine
    while True:
        moment += 1
        moments = itertools.count(1)

        def interrupt(*_: Any, moments: Any = moments, last: int = moment) -> None:
            if next(moments) == last:
                raise KeyboardInterrupt

        try:
            with study.hold():
                for event in EVENTS:
                    sa.event.listen(engine, event, interrupt)
                try:
                    study.finish(study.add_candidate(ONE), Evaluation(1.0), tell_index=0)
                finally:
                    for event in EVENTS:
                        sa.event.remove(engine, event, interrupt)
            break
        except KeyboardInterrupt:
            assert holder(engine, 1) is None, f"moment {moment}"
    assert moment > 20


def test_in_a_copy_of_the_database_nobody_runs_anything(tmp_path: Path) -> None:
    """But in the same file under another name, or seen under another path, its holder is still alive."""
    place, copy, moved = (tmp_path / name for name in ("studies.db", "copy.db", "moved.db"))
    study = open_study(f"sqlite:///{place}")
    with study.hold():
        shutil.copy(place, copy)
        copied = StoredStudy.open(open_storage(f"sqlite:///{copy}", write=True), study.name)
        assert holder(copied.storage.engine, copied.key) is None
        with copied.hold():
            copied.set_attribute("who", "the copy")
        place.rename(moved)
        other = StoredStudy.open(open_storage(f"sqlite:///{moved}", write=True), study.name)
        with pytest.raises(StudyHeldError, match="is being run on"), other.hold():
            pass
        moved.rename(place)
        study.set_attribute("who", "the first")
    assert study.attributes["who"] == "the first"
