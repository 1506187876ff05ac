"""Commands that are killed after an accident of their user, and called again."""

from __future__ import annotations

import functools
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from stress_search import Child, Found, Rows, rows, sqlite_url

from lcsc_opt.cli import run as lcsc

OBJECTIVE = '''
"""How far the merged weights are from a target."""

import time

from lcsc_opt.base.records import Evaluation
from lcsc_opt.objective.contract import Objective
from lcsc_opt.trajectory import open_or_pack


class Model(Objective):
    def __init__(self, trajectory):
        self.trajectory = trajectory

    @property
    def steps(self):
        return self.trajectory.steps

    def evaluate(self, candidate):
        time.sleep(0.005)
        merged = self.trajectory.merge(candidate.coefficients)
        return Evaluation(float(sum((weights - 0.3).square().sum() for weights in merged.values())))

    def describe(self):
        return {"trajectory": self.trajectory.sha256}


def build(settings, context):
    path = context.path(settings["checkpoints"])
    return Model(open_or_pack([path], folder=context.files, study_checkpoints=context.checkpoints))
'''
STUDY = """
name: model
objective: {file: model.py, settings: {checkpoints: runs}}
optimizers: [OnePlusOne, CMA]
seeds: [0, 1]
budget: {evaluations: 10}
"""
NAMES = tuple(f"model/{optimizer}/{seed}" for optimizer in ("OnePlusOne", "CMA") for seed in (0, 1))


def grown_folder(folder: Path, *, kills: int) -> Found:
    """A study's folder of checkpoints grows, a file is touched, all is moved; ``lcsc run`` is killed."""
    begun, resume = _place(folder / "grown"), ("run", NAMES[0], "--budget", "40")
    _call(begun, "run", "study.yaml")
    expected = _undisturbed(begun, resume)
    Child(functools.partial(_save, begun / "runs", (70, 80))).value()
    os.utime(begun / "runs" / "model20.safetensors")
    return _killed(begun, expected, resume, lambda place: [_call(place, *resume)], kills=kills)


def two_terminals(folder: Path, *, kills: int) -> Found:
    """A file of four studies is run; the command is killed; then two run the file at once."""
    begun, run = _place(folder / "terminals"), ("run", "study.yaml")

    def go_on(place: Path) -> list[int]:
        second = Child(functools.partial(_lcsc, place, run))
        return [_call(place, *run), int(second.value())]

    return _killed(begun, _undisturbed(begun, run), run, go_on, kills=kills)


def _killed(
    begun: Path,
    expected: dict[str, Rows],
    command: tuple[str, ...],
    go_on: Callable[[Path], list[int]],
    *,
    kills: int,
) -> Found:
    """Start a command in a copy of a place, kill it, continue, and compare the studies with the expected ones."""
    chance, problems, done, inside = random.Random(2), list[str](), 0, 0
    before = {name: len(trials) for name, trials in _rows(begun).items()}
    clock = time.perf_counter()
    _call(_copy(begun, "timed"), *command)
    seconds = time.perf_counter() - clock
    while done < kills:
        place = _copy(begun, str(done))
        child = Child(functools.partial(_lcsc, place, command))
        child.wait(chance.uniform(0, 0.95 * seconds))
        child.kill()
        done += child.was_killed
        inside += any(before[name] < len(found) < len(expected[name]) for name, found in _rows(place).items())
        problems += [f"a command ended with {status}" for status in go_on(place) if status]
        problems += [f"{name} differs" for name, found in _rows(place).items() if found != expected[name]]
        shutil.rmtree(place)
    return Found(f"{done} kills, {inside} of them within a search", problems)


def _place(place: Path) -> Path:
    """A working directory with the study."""
    place.mkdir()
    (place / "model.py").write_text(OBJECTIVE)
    (place / "study.yaml").write_text(STUDY)
    Child(functools.partial(_save, place / "runs", range(10, 70, 10))).value()
    return place


def _save(runs: Path, steps: Sequence[int]) -> None:
    runs.mkdir(exist_ok=True)
    for step in steps:
        weights = torch.randn(2000, generator=torch.Generator().manual_seed(step))
        save_file({"w": weights}, runs / f"model{step}.safetensors")


def _copy(begun: Path, name: str) -> Path:
    return Path(shutil.copytree(begun, begun.with_name(f"{begun.name}-{name}")))


def _lcsc(place: Path, arguments: Sequence[str]) -> int:
    """``lcsc`` in a process of its own."""
    os.chdir(place)
    return lcsc(arguments)


def _call(place: Path, *arguments: str) -> int:
    return int(Child(functools.partial(_lcsc, place, arguments)).value())


def _undisturbed(begun: Path, command: tuple[str, ...]) -> dict[str, Rows]:
    """The trials after the command in a copy of the place."""
    place = _copy(begun, "clean")
    if status := _call(place, *command):
        raise RuntimeError(f"{' '.join(command)} ended with {status}")
    return _rows(place)


def _rows(place: Path) -> dict[str, Rows]:
    return {name: rows(sqlite_url(place), name) for name in NAMES}
