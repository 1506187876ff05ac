"""PostgreSQL is the same to a search as SQLite is, also when its backends are terminated in the middle."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, read_contents
from lcsc_opt.database.urls import masked
from lcsc_opt.objective.contract import CoefficientFunction, Objective
from tests.database_servers import PASSWORD, Postgresql
from tests.study.test_loop import open_study, run, trials_of

pytestmark = pytest.mark.usefixtures("impatient")
STEPS = tuple(range(100, 2100, 100))
ONE = Candidate(np.array([0.5, 0.5]))


@pytest.fixture
def study(postgresql_url: str) -> StoredStudy:
    return open_study(postgresql_url)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_url_without_a_driver_is_opened_with_psycopg(scheme: str, postgresql_url: str) -> None:
    storage = open_storage(postgresql_url.replace("postgresql", scheme, 1), write=True)
    assert storage.engine.url.drivername == "postgresql+psycopg"


def test_readers_make_no_tables_and_nobody_makes_them_beside_those_of_another_program(postgresql_url: str) -> None:
    engine = sa.create_engine(postgresql_url.replace("postgresql:", "postgresql+psycopg:", 1))
    with pytest.raises(StudyStoreError, match="holds no studies"):
        open_storage(postgresql_url, write=False)
    assert sa.inspect(engine).get_table_names() == []
    with engine.begin() as begun:
        begun.exec_driver_sql("CREATE TABLE notes (name TEXT)")
    for write in (True, False):
        with pytest.raises(StudyStoreError, match="another program" if write else "holds no studies"):
            open_storage(postgresql_url, write=write)
    assert sa.inspect(engine).get_table_names() == ["notes"]
    engine.dispose()


def no_secret(message: str) -> bool:
    encoded = "p%40ss%3Aw%2F%7Brd%7D%25"
    return not any(part in message for part in (PASSWORD, encoded, "ss:w", "ss%3Aw"))


def chain(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(f"{error} {error!r}")
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def test_no_message_holds_the_password(postgresql: Postgresql, study: StoredStudy, capfd: Any) -> None:
    there = postgresql.url("postgres")
    wrong = [
        postgresql.url("no_such_database"),
        there.replace("%7D%25@", "%7D%25!@"),  # another password
        there.replace(f":{postgresql.port}", ":1"),
        there.replace("%40", "@"),  # not encoded
        there.replace(f":{postgresql.port}", ":port"),
        there.replace("postgresql:", "postgresql+nothing:"),
        f"postgresql://{there.rpartition('@')[2]}?user=lcsc&password={PASSWORD.replace('%', '%25')}&port=1",
    ]
    for url in wrong:
        with pytest.raises(StudyStoreError) as caught:
            open_storage(url, write=True)
        assert "\n" not in str(caught.value)
        assert no_secret(str(caught.value)), str(caught.value)
        assert no_secret(masked(url)), masked(url)
    study.storage.engine.dispose()
    sa.event.listen(study.storage.engine, "do_connect", to_nowhere)
    with pytest.raises(StudyStoreError, match="run the same command to continue") as caught:
        study.trials()
    assert no_secret(chain(caught.value))
    assert no_secret("".join(capfd.readouterr()))


def to_nowhere(_dialect: Any, _record: Any, _args: Any, arguments: dict[str, Any]) -> None:
    arguments["port"] = 1


class Disturbed:
    """Loses the connection at every third commit of an engine: before the server hears of it, or after."""

    def __init__(self, engine: sa.Engine, server: Postgresql, url: str, *, acknowledge: bool) -> None:
        self._commit, self._server, self._url = engine.dialect.do_commit, server, url
        self._acknowledge, self._commits, self.lost = acknowledge, 0, 0
        engine.dialect.do_commit = self  # type: ignore[assignment, method-assign]

    def __call__(self, connection: Any) -> None:
        self._commits += 1
        if self._commits % 3 != 1:
            self._commit(connection)
            return
        self.lost += 1
        if not self._acknowledge:
            self._commit(connection)
            connection.dbapi_connection.close()
            raise psycopg.OperationalError("the connection was lost after the commit")
        assert self._server.terminate_backends(self._url, state="idle in transaction") == 1
        self._commit(connection)


@pytest.mark.parametrize("acknowledge", [True, False], ids=["in a transaction", "after an unheard commit"])
def test_every_write_survives_a_lost_connection(
    acknowledge: bool, postgresql: Postgresql, postgresql_url: str, tmp_path: Path
) -> None:
    storage = open_storage(postgresql_url, write=True)
    disturbed = Disturbed(storage.engine, postgresql, postgresql_url, acknowledge=acknowledge)
    study = StoredStudy.open_or_create(storage, "e/LCSC/0", {"steps": [1]})
    with study.hold():
        with pytest.raises(StudyStoreError):
            open_study(postgresql_url, "e/LCSC/0").hold().__enter__()
        first, second = study.add_candidate(ONE), study.add_candidate(ONE)  # the same again is another trial
        study.finish(first, Evaluation(0.25, {"fid": 1.5}))
        study.fail(second, [{"reason": "no", "seconds": 0.0}])
        for _ in range(2):
            study.attach(tmp_path, "curve.png", b"a curve")
        study.set_attribute("budget", {"images": 1})
        StoredStudy.created(storage, "fork/LCSC/0", {"steps": [1]})
    assert disturbed.lost >= 7
    undisturbed = StoredStudy.open(open_storage(postgresql_url, write=False), "e/LCSC/0")
    trials = undisturbed.trials()
    (meta,) = undisturbed.artifacts()
    assert (tmp_path / meta["artifact_id"]).read_bytes() == b"a curve"
    assert [(trial.number, trial.state) for trial in trials] == [(0, TrialState.COMPLETE), (1, TrialState.FAIL)]
    assert trials[0].value == 0.25
    assert undisturbed.attributes["budget"] == {"images": 1}
    assert list(read_contents(storage).studies) == ["e/LCSC/0", "fork/LCSC/0"]
    assert len(list(tmp_path.iterdir())) == 1  # one artifact
    with open_study(postgresql_url, "e/LCSC/0").hold():  # it was given up
        pass


def test_backends_terminated_during_a_search_lose_and_double_nothing(
    study: StoredStudy, postgresql: Postgresql, postgresql_url: str, objective: Objective, url: str
) -> None:
    clean = open_study(url)
    run(clean, objective)
    terminated = calls = 0
    threads: list[threading.Thread] = []

    def disturbed(coefficients: np.ndarray) -> float:
        nonlocal calls, terminated
        calls += 1
        if calls % 6 == 0:  # between two statements
            terminated += bool(postgresql.terminate_backends(postgresql_url))
        elif calls % 6 == 3:  # in one, or wherever the search is by then
            threads.append(threading.Thread(target=postgresql.terminate_backends, args=(postgresql_url,)))
            threads[-1].start()
        return objective(coefficients)

    with study.hold():
        run(study, CoefficientFunction(disturbed, STEPS, name="disturbed"))
    for thread in threads:
        thread.join()
    assert terminated >= 1
    assert threads
    assert trials_of(study) == trials_of(clean)
