"""Studies of one file at the same time, on workers that they share."""

from __future__ import annotations

import collections
import contextlib
import itertools
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcsc_opt.base.progress import progress
from lcsc_opt.cli import run as lcsc
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.turns import FairQueue
from lcsc_opt.search import plan
from tests.evaluation.staged_examples import SLOW_SECONDS
from tests.processes import finished_trials, lcsc_process

OBJECTIVE = """
from tests.evaluation.staged_examples import Stages


class Again(Stages):
    def slope(self, candidate, first, last, back):
        self.kept = candidate  # as an objective does that samples again what another study's candidate has replaced
        return super().slope(candidate, first, last, back)


def build(settings):
    return Again(**settings)
"""
LOSSES = """
import os
import pathlib
import signal
import time

def wait_for_the_end():
    try:
        pathlib.Path("interrupted").touch(exist_ok=False)
        os.kill(os.getppid(), signal.SIGINT)
    except FileExistsError:
        pass
    for _ in range(30_000):
        time.sleep(0.01)

def loss(coefficients):
    if "LCSC_TEST_ENDS" in os.environ and len(open("log").readlines()) >= 4:
        wait_for_the_end()
    if os.path.exists("fails") and str(float(coefficients[0])) in open("fails").read().split():
        raise RuntimeError(f"broken at {coefficients[0]}")
    start = time.time()
    time.sleep(float(os.environ.get("LCSC_TEST_SECONDS", "0")))
    with open("log", "a") as file:
        file.write(f"{start} {time.time()}\\n")
    return float(coefficients @ coefficients)
"""
NUMBERS = itertools.count()
Trials = list[tuple[Any, ...]]


@pytest.fixture
def folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (workplace / "side_stages.py").write_text(OBJECTIVE)
    (workplace / f"side_losses_{next(NUMBERS)}.py").write_text(LOSSES)  # modules are imported once
    return workplace


def study_file(folder: Path, **changes: Any) -> str:
    [module] = folder.glob("side_losses*.py")
    function = {"file": "function.py", "settings": {"callable": f"{module.stem}:loss", "steps": [1, 2, 3, 4]}}
    content = {"name": "e", "objective": function, "budget": {"evaluations": 8}, "workers": 2, **changes}
    path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def trials(name: str, database: str = "studies.db") -> Trials:
    study = StoredStudy.open(open_storage(f"sqlite:///{database}", write=False), name)
    return [
        (t.number, t.user_attrs["coefficients"], t.value, t.user_attrs.get("gradient"), t.user_attrs.get("tell_index"))
        for t in study.trials()
    ]


def log() -> list[tuple[float, float]]:
    """When each evaluation began and ended."""
    rows = [line.split() for line in Path("log").read_text().splitlines()]
    return [(float(start), float(end)) for start, end in rows]


def in_turns(queue: FairQueue[Any], workers: int, jobs: int) -> list[str]:
    """Whose jobs begin when each worker takes another one as soon as the oldest ends."""
    running: list[str] = []
    began = []
    for _ in range(jobs):
        if len(running) == workers:
            running.pop(0)
        item = next(queue.in_turn(collections.Counter(running)))
        queue.take(item)
        running.append(item.user)
        began.append(item.user)
    return began


class Job:
    def __init__(self, user: str) -> None:
        self.user, self.worker = user, None


def test_who_asks_for_much_waits_for_those_who_ask_for_little() -> None:
    queue: FairQueue[Job] = FairQueue()
    for user, jobs in (("many", 30), ("few", 5), ("some", 10)):
        for _ in range(jobs):
            queue.add(Job(user))
    began = in_turns(queue, workers=2, jobs=45)
    assert collections.Counter(began[:15]) == {"many": 5, "few": 5, "some": 5}
    assert collections.Counter(began[15:25]) == {"many": 5, "some": 5}
    assert not list(queue.in_turn({}))


def test_who_comes_later_has_a_share_at_once() -> None:
    queue: FairQueue[Job] = FairQueue()
    for _ in range(20):
        queue.add(Job("first"))
    assert in_turns(queue, workers=2, jobs=6) == ["first"] * 6
    for _ in range(4):
        queue.add(Job("later"))
    assert collections.Counter(in_turns(queue, workers=2, jobs=8)) == {"first": 4, "later": 4}
    assert [item.user for item in queue.withdraw("first")] == ["first"] * 10


@pytest.mark.slow
def test_trials_are_those_of_each_study_alone(folder: Path) -> None:
    files = {"file": "side_stages.py", "settings": {"sample": 0.003}}
    shared = {"objective": files, "optimizers": ["LCSC", "CMA", "LCSCGradient"], "held_out": {"images": 8, "top": 2}}
    file = study_file(folder, seeds=[1], **shared)
    assert lcsc(["run", file, "--one-by-one", "--storage", "sqlite:///alone.db"]) == 0
    assert lcsc(["run", file, "--parallel"]) == 0
    for optimizer in shared["optimizers"]:
        assert trials(f"e/{optimizer}/1") == trials(f"e/{optimizer}/1", "alone.db")
    reports = [
        StoredStudy.open(open_storage(f"sqlite:///{db}.db", write=False), "e/CMA/1").attributes["held_out"]["loss"]
        for db in ("studies", "alone")
    ]
    assert reports[0] == reports[1]


def test_optimizers_that_wait_share_the_workers_without_being_asked_to(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCSC_TEST_SECONDS", "0.05")
    file = study_file(folder, optimizers=["Powell"], seeds=[0, 1, 2])
    assert lcsc(["run", file]) == 0
    said = capsys.readouterr().err
    assert said.count("after 8 evaluations") == 3
    busy = log()
    assert len(busy) == 24
    at_once = [sum(start <= began < end for start, end in busy) for began, _ in busy]
    assert max(at_once) == 2
    first = trials("e/Powell/1")
    assert lcsc(["run", file, "--one-by-one", "--seed", "1", "--storage", "sqlite:///alone.db"]) == 0
    assert "e/Powell/1: asks for one candidate after the other, so 1 of 2 workers have" in capsys.readouterr().err
    assert trials("e/Powell/1", "alone.db") == first


def test_a_study_that_fails_does_not_stop_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = {"budget": {"evaluations": 14}, "failures": {"retries": 0, "stop_share": 0.1}}
    file = study_file(folder, optimizers=["LCSC", "CMA", "OnePlusOne"], seeds=[1], **shared)
    assert lcsc(["run", file, "--one-by-one", "--storage", "sqlite:///alone.db"]) == 0
    others = {trial[1][0] for name in ("e/LCSC/1", "e/OnePlusOne/1") for trial in trials(name, "alone.db")}
    own = [trial[1][0] for trial in trials("e/CMA/1", "alone.db")]
    Path("fails").write_text(" ".join(str(first) for first in own if first not in others))
    capsys.readouterr()
    assert lcsc(["run", file, "--parallel"]) == 1
    said = capsys.readouterr().err
    assert "of 10 trials failed, more than failures.stop_share 0.1; the last one: RuntimeError: broken" in said
    assert "1 of 3 studies did not end: e/CMA/1" in said
    for name in ("e/LCSC/1", "e/OnePlusOne/1"):
        assert trials(name) == trials(name, "alone.db")
        assert f"{name}: best" in said
    Path("fails").unlink()
    assert lcsc(["resume", "e/CMA/1", "--retry-failed"]) == 0
    capsys.readouterr()
    assert lcsc(["run", file, "--parallel"]) == 0
    assert capsys.readouterr().err.count("finished already") == 3


def test_ctrl_c_ends_all_and_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = study_file(folder, optimizers=["CMA", "LCSC"], seeds=[0, 1], budget={"evaluations": 12})
    assert lcsc(["run", file, "--one-by-one", "--storage", "sqlite:///alone.db"]) == 0
    Path("log").write_text("")
    start = time.monotonic()
    ended = lcsc_process("run", file, "--parallel", environment={"LCSC_TEST_ENDS": "yes"})
    assert time.monotonic() - start < SLOW_SECONDS / 2
    assert ended.status == 130, ended.err
    assert "everything finished is kept" in ended.err
    assert "Traceback" not in ended.err
    assert finished_trials() < 8
    with contextlib.closing(sqlite3.connect("studies.db")) as connection:
        assert connection.execute("SELECT COUNT(*) FROM trials WHERE state = 'FAIL'").fetchone() == (0,)
    assert lcsc(["run", file, "--parallel"]) == 0
    for optimizer in ("CMA", "LCSC"):
        for seed in (0, 1):
            assert trials(f"e/{optimizer}/{seed}") == trials(f"e/{optimizer}/{seed}", "alone.db")


def test_one_worker_cannot_be_shared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lcsc(["run", study_file(folder, optimizers=["CMA"], seeds=[0, 1], workers=1), "--parallel"]) == 2
    assert "--parallel: the study file has one worker; give it more of them, as in workers=2" in capsys.readouterr().err


def test_studies_that_began_with_one_worker_keep_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = study_file(folder, optimizers=["CMA"], seeds=[0, 1], workers="auto")
    for machine, budget in ((1, "4"), (2, "8")):
        monkeypatch.setattr(plan, "workers_for_this_machine", lambda machine=machine: machine)
        asked = ["--parallel"] if machine > 1 else []
        assert lcsc(["run", file, "--budget", budget, *asked]) == 0
    said = capsys.readouterr().err
    assert "--parallel: e/CMA/0, e/CMA/1: began with one worker, so one study after the other goes on" in said
    assert said.count("after 8 evaluations") == 2


def test_one_progress_line_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("all", 2) as outer:
        with progress("a part", 1) as inner:
            inner()
        outer(2)
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["all"]
