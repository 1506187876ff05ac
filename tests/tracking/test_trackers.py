"""Curves in other trackers, each value once over several processes; and a function that is told how it went."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from lcsc_opt.base.contact_sheet import contact_sheet
from lcsc_opt.base.records import Cost, Evaluation
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.tracking import trackers
from lcsc_opt.tracking.trackers import Reporting
from lcsc_opt.views.artifacts import EMA_IMAGES, OWN_IMAGES
from tests.commands import Typed
from tests.study_examples import add_result, attach, write_study

NAME = "curves/LCSC/0"
ROWS = [{"metric": "loss", "sign": 1, "value": 1.5, "baseline": 2.5}, {"metric": "kid@x:y", "sign": 1, "value": 7.0}]
SETTINGS = {"callable": "losses_of_trackers:loss", "steps": [10, 20, 30]}
FILE = {
    "name": "curves",
    "objective": {"file": "function.py", "settings": SETTINGS},
    "optimizers": ["LCSC"],
    "budget": {"evaluations": 3},
    "failures": {"retries": 1},
    "log": ["trackio"],
    "notify": "losses_of_trackers:tell",
}


class Recorder:
    """Trackio's interface."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.steps: list[tuple[int, dict[str, Any]]] = []
        self.broken = False

    def init(self, **how: Any) -> Recorder:
        self.begun.append(how)
        return self

    def log(self, values: dict[str, Any], *, step: int) -> None:
        if self.broken:
            raise ConnectionError("offline")
        self.steps.append((step, {name: getattr(value, "size", value) for name, value in values.items()}))

    def finish(self) -> None: ...


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made: Any = Recorder()
    made.Image = lambda picture: picture
    monkeypatch.setitem(sys.modules, "trackio", made)
    return made


@pytest.fixture
def study(workplace: Path) -> StoredStudy:
    """Trial 1 failed; trial 3 still runs, so the optimizer has not been told of trial 4."""
    made = write_study(open_storage("sqlite:///studies.db", write=True), NAME, [3.0, None, 2.0], running=1, ended=False)
    add_result(made, 4, 1.0)
    return made


@pytest.fixture
def functions(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the study file names; it remembers what it is told."""

    def loss(coefficients: Any) -> float:
        if made.broken:
            raise ValueError("no image")
        return float((coefficients**2).sum())

    made: Any = SimpleNamespace(broken=False, told=[], loss=loss, tell=lambda *what: made.told.append(what))
    monkeypatch.setitem(sys.modules, "losses_of_trackers", made)
    Path("curves.yaml").write_text(yaml.safe_dump(FILE))
    return made


def log_in_two_processes(study: StoredStudy, tracker: str) -> None:
    with Reporting(study, [tracker], None):
        pass
    study.finish(3, Evaluation(2.5, {}, Cost()))
    study.set_attribute("held_out", {"trial": 4, "loss": 1.5, "rows": ROWS})
    for name in (EMA_IMAGES, OWN_IMAGES.format(optimizer="LCSC")):
        attach(study, 4, name, contact_sheet(np.zeros((1, 3, 48, 40))))
    for _ in range(2):
        with Reporting(study, [tracker], None):
            pass


def test_each_process_logs_what_the_one_before_did_not(study: StoredStudy, recorder: Recorder) -> None:
    log_in_two_processes(study, "trackio")
    losses, best = {0: 3.0, 2: 2.0, 3: 2.5, 4: 1.0}, [3.0, 3.0, 2.0, 2.0, 1.0]
    told = [(n, ({"loss": losses[n]} if n in losses else {}) | {"best_loss": best[n]}) for n in range(5)]
    report = {"held_out/loss": 1.5, "held_out/loss_of_EMA": 2.5, "held_out/kid_x_y": 7.0}
    images = {"coefficients": (900, 360), "images/EMA": (40, 48), "images/answer": (40, 48)}
    assert recorder.steps == [*told[:3], (2, {"coefficients": (900, 360)}), *told[3:], (4, report | images)]
    names = [[how[key] for key in ("group", "name", "resume")] for how in recorder.begun]
    assert names == [["curves", NAME, "never"], ["curves", NAME, "allow"]]


def test_a_tracker_that_fails_is_one_notice_and_gets_everything_later(
    functions: Any, recorder: Recorder, typed: Typed
) -> None:
    recorder.broken = True
    said = typed("run", "curves.yaml").err
    assert said.count(f"lcsc: {NAME}: trackio failed and is switched off") == said.count("offline") == 1
    recorder.broken = False
    typed("run", "curves.yaml")
    assert [step for step, _ in recorder.steps] == [0, 1, 2, 2]


def test_a_function_is_told_how_a_search_ends_and_may_fail(functions: Any, recorder: Recorder, typed: Typed) -> None:
    typed("run", "curves.yaml")
    functions.broken = True
    typed("run", "curves.yaml", "--budget", "8", status=1)
    best = recorder.steps[2][1]["best_loss"]
    assert [told[:3] for told in functions.told] == [(NAME, "ended", best), (NAME, "failed", best)]
    assert "no image" in functions.told[1][3]
    functions.broken, functions.tell = False, lambda: None
    assert "notify failed and is switched off" in typed("run", "curves.yaml", "name=other").err


def test_a_function_is_told_once_that_a_search_has_stalled(
    study: StoredStudy, functions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_POLL_SECONDS": 0.01, "_STALL_SECONDS": 0.02, "_STALL_TIMES": 0}.items():
        monkeypatch.setattr(trackers, name, value)
    with Reporting(study, (), "losses_of_trackers:tell"):
        while not functions.told:
            time.sleep(0.01)
        time.sleep(0.1)
    assert [told[:3] for told in functions.told] == [(NAME, "stalled", 1.0), (NAME, "ended", 1.0)]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seeds=[0]", r"pip install 'lcsc-opt\[trackio\]'"),
        ("log=[excel]", r"log\[0\]: expected .*'mlflow'"),
        ("notify=losses_of_trackers:nothing", "notify: 'losses_of_trackers:nothing' cannot be imported"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_stored(
    functions: Any, typed: Typed, monkeypatch: pytest.MonkeyPatch, override: str, line: str
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    others = ["log=[]"] if override.startswith("notify") else []
    assert re.search(line, typed.refused("run", "curves.yaml", *others, override))
    assert not Path("studies.db").exists()


def of_tensorboard() -> Any:
    events = import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(f"runs/{NAME}")
    events.Reload()
    return [(one.step, one.value) for one in events.Scalars("best_loss")]


def of_mlflow() -> Any:
    client = import_module("mlflow").MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("curves").experiment_id])
    return [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "best_loss")]


def of_trackio() -> Any:
    with contextlib.closing(sqlite3.connect(next(Path("trackio").glob("*.db")))) as found:
        rows = [(step, json.loads(text)) for step, text in found.execute("SELECT step, metrics FROM metrics")]
    return [(step, values["best_loss"]) for step, values in rows if "best_loss" in values]


def of_wandb() -> Any:
    files = sorted(Path("wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len({file.name for file in files}) == 1, "one run of two processes"
    found, record = [], import_module("wandb.proto.wandb_internal_pb2").Record
    for content in [file.read_bytes() for file in files]:
        at = 7
        while at < len(content):
            size = int.from_bytes(content[at + 4 : at + 6], "little")
            items = record.FromString(content[at + 7 : at + 7 + size]).history.item
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            found += [(values["trial"], values["best_loss"])] if "best_loss" in values else []
            at += 7 + size
    return found


@pytest.mark.filterwarnings("ignore")  # they are not ours
@pytest.mark.parametrize("read", [of_tensorboard, of_wandb, of_trackio, of_mlflow])
def test_the_real_tracker_has_one_run_of_both(
    read: Callable[[], Any], study: StoredStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(Path("trackio").absolute())}
    for variable, value in {**here, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}.items():
        monkeypatch.setenv(variable, value)
    pytest.importorskip(tracker := read.__name__.removeprefix("of_"))
    log_in_two_processes(study, tracker)
    assert read() == [(0, 3.0), (1, 3.0), (2, 2.0), (3, 2.0), (4, 1.0)]
