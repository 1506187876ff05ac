"""Common accidents of users, each with a kill at a random instant.

The accidents: training that goes back, a folder of checkpoints that grew, a smaller budget, a file of studies in two
terminals. Torch is used only in forked processes: its threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from stress_search import Child, ChildError, Row, Rows, rows, sqlite_url, verdict

from lcsc_opt.cli import run as lcsc
from lcsc_opt.trajectory import Trajectory, TrajectoryWriter

MODEL = '''
import time

from lcsc_opt.base.paths import cache_directory, given_path
from lcsc_opt.base.records import Evaluation
from lcsc_opt.objective.contract import Objective
from lcsc_opt.trajectory import open_or_pack


class Model(Objective):
    """How far the merged weights are from a target."""

    def __init__(self, trajectory):
        self.trajectory = trajectory

    @property
    def steps(self):
        return self.trajectory.steps

    def evaluate(self, candidate, *, gradient=False):
        time.sleep(0.005)
        merged = self.trajectory.merge(candidate.coefficients)
        return Evaluation(float(sum((weights - 0.3).square().sum() for weights in merged.values())))

    def describe(self):
        return {"trajectory": self.trajectory.sha256}


def build(settings):
    return Model(open_or_pack([given_path(settings["checkpoints"])], cache=cache_directory()))
'''
GROWN = """
name: grown
objective: {file: model.py, settings: {checkpoints: runs}}
optimizers: [LCSC]
budget: {evaluations: 10}
"""

DISTANCE = """
import time

import numpy as np
from lcsc_opt.coefficients.profiles import default_origin

ORIGIN = default_origin((1, 2, 3, 4, 5, 6))
TARGET = np.array([-0.4, 0.3, -0.2, 0.5, 0.1, 0.7])


def distance(coefficients):
    time.sleep(0.005)
    return float(np.square(coefficients - TARGET).sum())


def distance_of_no_ema(coefficients):
    average = (coefficients > 0).all() and np.ptp(np.diff(np.log(coefficients[1:]))) < 1e-6
    if average and not np.allclose(coefficients, ORIGIN):
        raise KeyError("an average over checkpoints")
    return distance(coefficients)
"""
FUNCTION = """
name: {name}
objective: {{file: function.py, settings: {{callable: "distances:{function}", steps: [1, 2, 3, 4, 5, 6]}}}}
optimizers: {optimizers}
seeds: {seeds}
budget: {{evaluations: {evaluations}}}
"""


def rewound_training(folder: Path, *, kills: int) -> Row:
    """Training restarts from step 15 of a trajectory of 20 steps, and is killed while it goes back; repeatedly."""
    chance, problems = random.Random(1), list[str]()
    Child(functools.partial(_train, folder / "rewound", None, range(1, 21), 0)).value()
    start = time.perf_counter()
    Child(functools.partial(_train, _copy(folder / "rewound", folder / "timed"), 15, range(16, 21), 1)).value()
    seconds, done = time.perf_counter() - start, 0
    while done < kills:
        path = _copy(folder / "rewound", folder / f"rewound{done}")
        for _ in range(2):  # killed twice, before it may finish
            child = Child(functools.partial(_train, path, 15, range(16, 21), 1))
            child.wait(chance.uniform(0, seconds))
            child.kill()
            done += child.status != 0
            problems += Child(functools.partial(_other_weights, path, whole=False)).value()
        Child(functools.partial(_train, path, 15, range(16, 21), 1)).value()
        problems += Child(functools.partial(_other_weights, path, whole=True)).value()
        shutil.rmtree(path)
    found, ok = verdict(problems, f"{done} kills, every trajectory whole; continued training equal")
    return Row(
        "training restarts from an earlier step; SIGKILL while its writer goes back",
        f"{done} times, step 15 of 20",
        "after a kill the steps before it and whole later ones; then what undisturbed training leaves",
        found,
        ok,
    )


def _train(path: Path, resume: int | None, steps: Sequence[int], seed: int) -> None:
    with TrajectoryWriter(path, resume=resume) as writer:
        for step in steps:
            writer.append(step, {"w": torch.full((50_000,), float(_weight(step, seed)))}, wait=True)


def _weight(step: int, seed: int) -> int:
    return step + 1000 * seed


def _other_weights(path: Path, *, whole: bool) -> list[str]:
    """Problems: weights that the trajectory should not hold. ``whole``: training has come to its end."""
    try:
        trajectory = Trajectory.open(path)
        with contextlib.redirect_stderr(io.StringIO()):
            trajectory.verify()
    except Exception as error:
        return [f"unreadable: {error}"]
    weights = [int(trajectory.checkpoint(i)["w"][0]) for i in range(len(trajectory.steps))]
    first = [_weight(step, 0) for step in range(1, 21)]
    second = first[:15] + [_weight(step, 1) for step in range(16, 21)]
    allowed = [second] if whole else [first, *(second[:n] for n in range(15, 21))]
    return [] if weights in allowed else [f"holds {weights[14:]}"]


def grown_folder(folder: Path, *, kills: int) -> Row:
    """A study's folder grows and one file is touched. The study is resumed, killed, and resumed in another place."""
    begun = _place(folder / "grown", {"model.py": MODEL, "grown.yaml": GROWN})
    Child(functools.partial(_save, begun / "runs", range(10, 70, 10))).value()
    _call(begun, "run", "grown.yaml")
    resume = ("resume", "grown/LCSC/0", "--budget", "40")
    expected = _called(_copy(begun, folder / "grown-clean"), resume, "grown/LCSC/0")
    Child(functools.partial(_save, begun / "runs", (70, 80))).value()
    os.utime(begun / "runs" / "model20.safetensors")
    return _killed(
        ("a folder of checkpoints grew and a file was touched; SIGKILL of lcsc resume", "the folder moved, too"),
        begun,
        {"grown/LCSC/0": expected},
        lambda place: _wrong(_call(place, *resume)),
        start=resume,
        kills=kills,
    )


def smaller_budget(folder: Path, *, kills: int) -> Row:
    """``resume --budget 60`` is killed. ``run`` of the file, which says 20, continues to 60 if 60 was stored."""
    begun = _function_study(folder / "budget", name="total", function="distance", optimizers="[CMA]", evaluations=20)
    _call(begun, "run", "study.yaml")
    resume, name = ("resume", "total/CMA/0", "--budget", "60"), "total/CMA/0"
    expected = _called(_copy(begun, folder / "budget-clean"), resume, name)

    def go_on(place: Path) -> list[str]:
        before = len(_rows(place, name))
        status = _call(place, "run", "study.yaml")
        total = len(_rows(place, name))
        if total != 60 and (before > 20 or total != 20):
            return [f"{before} trials became {total}"]
        return _wrong(status, _call(place, *resume))

    what = ("a larger budget, SIGKILL, then lcsc run of the file with the smaller one", "60, and 20 in the file")
    return _killed(what, begun, {name: expected}, go_on, start=resume, kills=kills)


def file_of_studies(folder: Path, *, kills: int) -> Row:
    """A file of six studies runs in two terminals; two of the studies fail. Both commands are killed, and run again."""
    begun = _function_study(
        folder / "several",
        name="several",
        function="distance_of_no_ema",
        optimizers="[{name: EMAGrid, options: {rates: [0.1, 0.2]}}, OnePlusOne, CMA]",
        seeds="[0, 1]",
        evaluations=12,
    )
    clean = _copy(begun, folder / "several-clean")
    run = ("run", "study.yaml")
    if (status := _call(clean, *run)) != 1:
        raise ChildError(f"the clean run ended with {status}")
    names = [f"several/{optimizer}/{seed}" for optimizer in ("OnePlusOne", "CMA") for seed in (0, 1)]
    expected = {name: _rows(clean, name) for name in names}
    failing = [f"several/EMAGrid/{seed}" for seed in (0, 1)]

    def go_on(place: Path) -> list[str]:
        second = Child(functools.partial(_lcsc, place, run))
        statuses = [_call(place, *run), second.value()]
        succeeded = [name for name in failing if any(row[3] != "FAIL" for row in _rows(place, name))]
        return _wrong(*statuses, required=1) + [f"{name} did not fail" for name in succeeded]

    what = ("a file of studies, one optimizer's fail, in two terminals; SIGKILL of the first", "then both again")
    return _killed(what, begun, expected, go_on, start=run, kills=kills)


def _killed(
    what: tuple[str, str],
    begun: Path,
    expected: dict[str, Rows],
    go_on: Callable[[Path], list[str]],
    *,
    start: tuple[str, ...],
    kills: int,
) -> Row:
    """Start a command in a copy of a place, kill it, continue, and compare the studies with the expected ones."""
    chance, problems, done, inside = random.Random(2), list[str](), 0, 0
    before = {name: len(_rows(begun, name)) for name in expected}
    timed = _copy(begun, begun.with_name(f"{begun.name}-timed"))
    clock = time.perf_counter()
    _call(timed, *start)
    seconds = time.perf_counter() - clock
    while done < kills:
        place = _copy(begun, begun.with_name(f"{begun.name}{done}"))
        child = Child(functools.partial(_lcsc, place, start))
        child.wait(chance.uniform(0, 0.95 * seconds))
        child.kill()
        done += child.status == -signal.SIGKILL
        counted = {name: len(_rows(place, name)) for name in expected}
        inside += any(before[name] < counted[name] < len(rows) for name, rows in expected.items())
        problems += go_on(place)
        problems += [f"{name} differs" for name, rows in expected.items() if _rows(place, name) != rows]
        shutil.rmtree(place)
    found, ok = verdict(problems, f"{done} kills, {inside} of them within a search; all equal")
    return Row(what[0], f"{done} times; {what[1]}", "ends as it would have without the kill; trials equal", found, ok)


def _function_study(
    place: Path, *, name: str, function: str, optimizers: str, evaluations: int, seeds: str = "[0]"
) -> Path:
    study = FUNCTION.format(name=name, function=function, optimizers=optimizers, seeds=seeds, evaluations=evaluations)
    return _place(place, {"distances.py": DISTANCE, "study.yaml": study})


def _place(place: Path, files: dict[str, str]) -> Path:
    """A working directory with these files."""
    place.mkdir()
    for name, content in files.items():
        (place / name).write_text(content)
    return place


def _save(runs: Path, steps: Sequence[int]) -> None:
    runs.mkdir(exist_ok=True)
    for step in steps:
        weights = torch.randn(2000, generator=torch.Generator().manual_seed(step))
        save_file({"w": weights}, runs / f"model{step}.safetensors")


def _copy(begun: Path, place: Path) -> Path:
    shutil.copytree(begun, place)
    return place


def _lcsc(place: Path, arguments: Sequence[str]) -> int:
    """``lcsc`` in a process of its own, with a cache of its own."""
    os.chdir(place)
    os.environ["LCSC_CACHE"] = str(place / "cache")
    return lcsc(arguments)


def _call(place: Path, *arguments: str) -> int:
    return int(Child(functools.partial(_lcsc, place, arguments)).value())


def _called(place: Path, arguments: Sequence[str], name: str) -> Rows:
    """Run a command; gives the study's trials after it."""
    if status := _call(place, *arguments):
        raise ChildError(f"{' '.join(arguments)} ended with {status}")
    return _rows(place, name)


def _wrong(*statuses: int, required: int = 0) -> list[str]:
    return [f"a command ended with {status}" for status in statuses if status != required]


def _rows(place: Path, name: str) -> Rows:
    """The study's trials; empty if there is no such study yet."""
    with contextlib.suppress(Exception):
        return rows(sqlite_url(place, "studies"), name)
    return []
