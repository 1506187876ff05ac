"""Study files with workers, run as ``lcsc run`` does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcsc_opt.base.study_file import read_study_file
from lcsc_opt.cli import run as lcsc
from lcsc_opt.coefficients.profiles import plain_averages
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, read_contents
from lcsc_opt.experiment.running import searches_of
from lcsc_opt.study.planning import Plan
from tests.commands import Typed
from tests.evaluation.staged_examples import IMAGES, SLOW_SECONDS, STEPS, Stages, is_running, study_file
from tests.processes import Lcsc, wait_until

OBJECTIVE = """
from tests.evaluation.staged_examples import Stages


def build(settings):
    settings.pop("device", None)
    return Stages(**settings)
"""
WITHOUT_STAGES = {"file": "function.py", "settings": {"callable": "loss:loss", "steps": [1, 2, 3]}}


@pytest.fixture
def folder(workplace: Path) -> Path:
    (workplace / "stages.py").write_text(OBJECTIVE)
    (workplace / "loss.py").write_text("def loss(coefficients):\n    return float(coefficients @ coefficients)\n")
    return workplace


def stored(name: str = "e/CMA/0") -> StoredStudy:
    return StoredStudy.open(open_storage("sqlite:///e.db", write=True), name)


def asked(name: str = "e/CMA/0") -> list[list[float]]:
    return [coefficients_of(trial).tolist() for trial in stored(name).trials()]


def begun_with(name: str = "e/CMA/0") -> int:
    in_flight: int = stored(name).attributes["parallelism"]["in_flight"]
    return in_flight


@pytest.mark.parametrize(
    ("optimizer", "settings", "expected"),
    [
        ("CMA", {}, 2),  # stages overlap here
        ("CMA", {"workers": 2}, 4),
        ("LCSCGradient", {"workers": 2}, 1),  # waits for each result
        ("LCSCGradient", {}, 1),
        ("Powell", {"workers": 2}, 1),
        ("Powell", {}, 1),
    ],
)
def test_how_candidates_are_evaluated_depends_on_optimizer_and_settings(
    folder: Path, optimizer: str, settings: dict[str, Any], expected: int
) -> None:
    [spec] = searches_of([read_study_file(Path(study_file(folder, optimizers=[optimizer], **settings)))])
    assert Plan(spec, Stages()).parallelism["in_flight"] == expected


AVERAGES = len(plain_averages(STEPS))
COMPLETE = "all of them"


@pytest.mark.parametrize(
    ("optimizer", "budget", "expected", "told"),
    [
        ("EMAGrid", {"evaluations": 300}, AVERAGES, COMPLETE),
        ("EMAGrid", {"evaluations": 2}, 2, f"covers 2 of the grid's {AVERAGES} candidates;"),
        ("EMAGrid", {"images": 10**6}, AVERAGES * IMAGES, COMPLETE),
        ("EMAGrid", {"seconds": 0.1}, 1, COMPLETE),
        ("Grid", {"images": 2 * IMAGES}, 2 * IMAGES, f"{2 * IMAGES} images covers 2 of the grid's"),
        ("CMA", {"images": 10**6}, 10**6, COMPLETE),
    ],
)
def test_a_grid_spends_no_more_than_its_candidates_and_says_if_it_cannot_cover_them(
    folder: Path, optimizer: str, budget: dict[str, int], expected: int, told: str
) -> None:
    [spec] = searches_of([read_study_file(Path(study_file(folder, optimizers=[optimizer], budget=budget)))])
    plan = Plan(spec, Stages())
    assert plan.budget.total == expected
    assert told in (plan.why_incomplete() or COMPLETE)


def test_images_spread_over_workers_change_no_candidate_and_no_loss(folder: Path) -> None:
    optimizers = ["LCSCGradient"]
    assert lcsc(["run", study_file(folder, optimizers=optimizers)]) == 0
    changes = {"name": "spread", "workers": 3, "held_out": {"images": 9}}
    assert lcsc(["run", study_file(folder, optimizers=optimizers, **changes)]) == 0
    alone, spread = stored("e/LCSCGradient/0"), stored("spread/LCSCGradient/0")
    np.testing.assert_allclose(asked(alone.name), asked(spread.name), rtol=1e-9)
    for one, other in zip(alone.trials(), spread.trials(), strict=True):
        assert other.value == pytest.approx(one.value, rel=1e-9)
    workers = {tuple(trial.user_attrs["metrics"].values()) for trial in spread.trials()}
    assert len(workers) == 1  # the same three for every candidate
    found = HistoryReader(spread.storage).read_study(spread.name).found
    assert found is not None
    assert set(found.metrics.values()) == set(next(iter(workers)))  # the same three have reported


@pytest.mark.parametrize(
    ("optimizer", "objective", "begun_on", "continued_on"),
    [
        ("CMA", {"file": "stages.py"}, 2, 1),
        ("CMA", WITHOUT_STAGES, 1, 3),
        ("LCSCGradient", {"file": "stages.py"}, 2, 1),
        ("LCSCGradient", {"file": "stages.py"}, 1, 3),
    ],
)
def test_a_search_goes_on_with_other_workers_as_if_it_had_not_ended(
    folder: Path, typed: Typed, optimizer: str, begun_on: int, continued_on: int, objective: dict[str, Any]
) -> None:
    study = {"optimizers": [optimizer], "objective": objective}
    for name in ("whole", "e"):
        assert lcsc(["run", study_file(folder, **study, workers=begun_on, name=name)]) == 0
    assert lcsc(["run", f"whole/{optimizer}/0", "--budget", "14", "--storage", "sqlite:///e.db"]) == 0
    began = begun_with(f"e/{optimizer}/0")
    file = study_file(folder, **study, workers=continued_on, budget={"evaluations": 14})
    said = typed("run", file).err
    assert f"continues with other workers; candidates are still asked {began} at a time" in said
    assert begun_with(f"e/{optimizer}/0") == began
    found, expected = asked(f"e/{optimizer}/0"), asked(f"whole/{optimizer}/0")
    assert len(found) == 14
    np.testing.assert_allclose(found, expected, rtol=1e-9)  # sums of images are rounded otherwise
    assert stored(f"e/{optimizer}/0").attributes["specification"]["workers"] == continued_on


def test_auto_is_one_worker_for_each_gpu_of_the_machine_that_continues_a_study(
    folder: Path, typed: Typed, set_devices: Any
) -> None:
    file = study_file(folder, workers="auto", budget={"evaluations": 4})
    set_devices("cuda:0", "cuda:1")
    assert lcsc(["run", file]) == 0
    assert stored().attributes["specification"]["workers"] == 2
    set_devices()
    assert "finished already" in typed("run", file).err
    began = stored().attributes["parallelism"]
    assert lcsc(["run", file, "--budget", "8"]) == 0
    assert stored().attributes["specification"]["workers"] == 1
    assert stored().attributes["parallelism"] == began, "candidates are asked as before"
    assert len(asked()) == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": ["cuda:7"]}, "device: cuda:7 is not available"),
        (
            {"workers": ["cpu", "cpu"], "objective": {"file": "stages.py", "settings": {"device": "cuda:1"}}},
            "workers: cpu, cpu and objective.settings.device cuda:1: give only one of them",
        ),
        ({"objective": WITHOUT_STAGES, "budget": {"images": 100}}, "budget.images: this objective samples no images"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_stored(
    folder: Path, typed: Typed, changes: dict[str, Any], said: str
) -> None:
    assert said in typed.refused("run", study_file(folder, **changes))
    assert list(read_contents(open_storage("sqlite:///e.db", write=True)).studies) == []


def test_what_every_worker_notices_is_said_once_a_command(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = "    notice('read from the disk')\n    return"
    (folder / "stages.py").write_text(
        "from lcsc_opt.base.progress import notice\n" + OBJECTIVE.replace("    return", said)
    )
    assert lcsc(["run", study_file(folder, workers=2, budget={"evaluations": 2})]) == 0
    assert capfd.readouterr().err.count("read from the disk") == 1  # not by each of the two workers


def test_ctrl_c_stops_evaluations_that_do_not_look_and_leaves_no_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = folder / "process"
    monkeypatch.setenv("LCSC_TEST_MARKER", str(marker))
    (folder / "stages.py").write_text(
        "from tests.evaluation.staged_examples import WritesItsProcess\n\n\n"
        "def build(settings):\n    return WritesItsProcess()\n"
    )
    running = Lcsc("run", study_file(folder, workers=2))

    def is_written() -> bool:  # a file exists before its content does
        return marker.exists() and bool(marker.read_text())

    wait_until(lambda: is_written() or running.process.exitcode is not None)
    assert running.process.exitcode is None, running.wait()
    worker = int(marker.read_text())
    os.kill(worker, signal.SIGINT)  # as a terminal does, which signals all processes of the command
    running.signal(signal.SIGINT)
    start = time.monotonic()
    ended = running.wait()
    assert ended.status == 130, ended
    assert time.monotonic() - start < SLOW_SECONDS / 2
    assert not is_running(worker)
