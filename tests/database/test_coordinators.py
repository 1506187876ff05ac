"""Several people run studies into one PostgreSQL database, each with a coordinator of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, study_names
from tests.processes import Lcsc, lcsc_process, wait_until
from tests.search.test_runner import trials_of

OPTIMIZERS = ("LCSC", "CMA", "OnePlusOne")
LOSS = """
import pathlib, time, uuid
calls = 0

def loss(coefficients):
    global calls
    calls += 1
    if calls == 3:
        pathlib.Path(f"waiting-{uuid.uuid4()}").touch()
        while not pathlib.Path("go").exists():
            time.sleep(0.01)
    return float(((coefficients - 0.4) ** 2).sum())
"""
STUDY = f"""
name: shared
objective: {{file: function.py, settings: {{callable: "losses_of_coordinators:loss", steps: [100, 200, 300]}}}}
optimizers: [{", ".join(OPTIMIZERS)}]
budget: {{evaluations: 12}}
"""


def contents(url: str) -> dict[str, list[Any]]:
    storage = open_storage(url, write=False)
    return {name: trials_of(StoredStudy.open(storage, name)) for name in study_names(storage)}


def test_coordinators_share_a_database_and_one_study_has_one(
    postgresql_url: str, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("losses_of_coordinators.py").write_text(LOSS)
    Path("shared.yaml").write_text(STUDY)
    server = {"LCSC_STORAGE": postgresql_url}
    commands = [("run", "shared.yaml", "--optimizer", name) for name in OPTIMIZERS]
    coordinators = [Lcsc(*command, environment=server) for command in commands]
    wait_until(lambda: len(list(tmp_path.glob("waiting-*"))) == len(OPTIMIZERS))
    second = lcsc_process(*commands[0], environment=server)
    Path("go").touch()
    assert [coordinator.wait().status for coordinator in coordinators] == [0] * len(OPTIMIZERS)
    assert lcsc(["run", "shared.yaml", "--storage", url]) == 0

    assert second.status == 2
    (line,) = [line for line in second.err.splitlines() if line.startswith("lcsc: ")]
    assert line.startswith("lcsc: shared/LCSC/0: is being run on ")
    assert "Traceback" not in second.err
    assert contents(postgresql_url) == contents(url)
    assert sorted(contents(url)) == sorted(f"shared/{name}/0" for name in OPTIMIZERS)
