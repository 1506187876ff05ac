"""The paper's tables on models that two cores train: runs ``studies/paper/*.yaml``, and writes ``docs/paper.md``.

    python benchmarks/paper.py [--quick] [--table NAME …] [--seeds 5] [--jobs 2] [--tables]

Models are trained first, by ``lcsc train``, into ``results/models/``. All studies are in ``results/paper.db``: after
an interruption, the same command continues. ``--tables`` only writes the
page of the finished studies. A study file is run once for each combination of the values in ``VARIED``, as the loop in
its first lines does. ``--jobs`` processes run at once, each with one thread and one experiment with one seed. EMA grids
are run first and once; then all experiments run with one seed before any with the next. ``--quick`` has short
trainings, short searches and two seeds, in ``results/paper_quick.*``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import COMMANDS, RESULTS, machine, training_command
from reproduction.claims import OPTIMIZERS, Points
from reproduction.costs import MEASURED, cost_lines
from reproduction.page import page
from reproduction.published import TABLES

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.progress import progress
from lcsc_opt.base.study_file import StudyFile, read_study_file
from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import Standing
from lcsc_opt.database.names import BASELINES
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy

ROOT = Path(__file__).parents[1]
_running: set[subprocess.Popen[str]] = set()
TEACHER = "edm"
TAUGHT = ("cd", "cd_32")

CHECKPOINTS = "objective.settings.checkpoints"
LAST_STEP = "objective.settings.select.last_step"
NFE = "objective.settings.nfe"
IMAGES = "objective.settings.images"
INTERVAL = "objective.settings.select.interval"
WINDOW = "objective.settings.select.window"
EVALUATIONS = "budget.evaluations"


def _models(*names: str) -> list[str]:
    return [f"models/{name}.trajectory" for name in names]


VARIED: dict[str, dict[str, Sequence[Any]]] = {
    "cd": {CHECKPOINTS: _models("cd", "cd_32"), LAST_STEP: [250, 1000], NFE: [1, 2]},
    "ct": {CHECKPOINTS: _models("ct", "ct_32"), LAST_STEP: [1000, 2000]},
    "dm": {NFE: [10, 8, 6]},
    "samples": {CHECKPOINTS: _models("digits", "digits_ddpm"), IMAGES: [100, 250, 500]},
    "iterations": {CHECKPOINTS: _models("digits", "digits_ddpm"), EVALUATIONS: [50, 100, 200]},
    "interval": {INTERVAL: [20, 40, 80]},
    "window": {WINDOW: [800, 3200, 3980]},
    "convex": {CHECKPOINTS: _models("digits", "digits_ddpm"), "space": ["affine", "convex"]},
    "ema": {CHECKPOINTS: _models("digits", "digits_ddpm", "photographs")},
    "features": {CHECKPOINTS: _models("digits", "digits_ddpm", "photographs")},
}
"""Study file → the keys that are varied, and their values: an experiment for each combination."""

QUICK_VARIED: dict[str, dict[str, Sequence[Any]]] = {
    "cd": {LAST_STEP: [50, 100]},
    "ct": {LAST_STEP: [50, 100]},
    "samples": {CHECKPOINTS: _models("digits")},
    "iterations": {CHECKPOINTS: _models("digits"), EVALUATIONS: [15, 30, 60]},
    "convex": {CHECKPOINTS: _models("digits")},
    "window": {WINDOW: [200, 800, 980]},
    "ema": {CHECKPOINTS: _models("digits", "digits_ddpm")},
    "features": {CHECKPOINTS: _models("digits", "digits_ddpm")},
}
"""Other values of ``--quick``."""

QUICK = ("held_out.images=2000", "held_out.top=2", f"{EVALUATIONS}=20")
FEWER = (f"{IMAGES}=200", f"{EVALUATIONS}=15", "held_out.top=1")
QUICK_CHANGES = {"cd": FEWER, "ct": FEWER, "dm": FEWER}
QUICK_STEPS = {"digits": 1000, "digits_ddpm": 1000, "photographs": 1000}  # of trainings; 100 of all others


@dataclasses.dataclass(frozen=True)
class Job:
    """One experiment with one seed: its searches, or the EMA grids that the searches are compared with.

    Attributes:
        study: the name of its study file.
        point: varied key → its value.
        seed: of the searches.
        overrides: other changes of the study file.
        folder: where it is run, with the trajectories in ``models/``.
        grids: whether it runs the grids.
    """

    study: str
    point: Mapping[str, Any]
    seed: int
    overrides: tuple[str, ...]
    folder: Path
    grids: bool = False

    @property
    def path(self) -> Path:
        """The path of the study file."""
        return ROOT / "studies" / "paper" / f"{self.study}.yaml"

    @property
    def experiment(self) -> str:
        """Its name: of the study file, and the values."""
        return "-".join([f"paper_{self.study}", *(Path(str(value)).stem for value in self.point.values())])

    @property
    def changes(self) -> tuple[str, ...]:
        """All overrides of the study file."""
        return (*self.overrides, f"name={self.experiment}", *(f"{key}={value}" for key, value in self.point.items()))

    def study_file(self) -> StudyFile:
        """The study file with its changes."""
        return _read(self.path, self.changes)

    @property
    def optimizers(self) -> list[str]:
        """The optimizers of the file that this job runs."""
        return [one.name for one in self.study_file().optimizers if (one.name in BASELINES) == self.grids]

    def studies(self) -> list[str]:
        """The names of all its studies."""
        return [f"{self.experiment}/{optimizer}/{self.seed}" for optimizer in self.optimizers]

    def run(self, url: str) -> str | None:
        """Run the job in a process of its own; gives the last line of its errors if it failed."""
        program = "from lcsc_opt.cli import main; main()"
        command = [sys.executable, "-c", program, "run", str(self.path), *self.changes]
        chosen = [f"--optimizer={optimizer}" for optimizer in self.optimizers]
        return _failure([*command, *chosen, "--seed", str(self.seed), "--storage", url], self.folder)

    def __str__(self) -> str:
        return f"{self.experiment}, {'EMA grids' if self.grids else f'seed {self.seed}'}"


@functools.cache
def _read(path: Path, overrides: tuple[str, ...]) -> StudyFile:
    return read_study_file(path, overrides)


def points(study: str, *, quick: bool) -> list[dict[str, Any]]:
    """Varied key → its value, for each experiment of a study file; the last key changes fastest."""
    varied = VARIED.get(study, {})
    if quick:
        varied = {**varied, **QUICK_VARIED.get(study, {})}
    return [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]


def jobs(chosen: Sequence[str], seeds: int | None, *, quick: bool) -> list[Job]:
    """All jobs: EMA grids once, since they do not depend on chance; then searches, seed by seed.

    A table that shares the searches of another one has only grids. Without a number of seeds, each table has as many as
    it needs.
    """
    wanted = {table.study: seeds or table.seeds for table in TABLES}
    folder = RESULTS / "paper_quick" if quick else RESULTS
    borrowed = {table.study for table in TABLES if table.beside in chosen}

    def of_study(study: str, seed: int, *, grids: bool = False) -> list[Job]:
        overrides = (*QUICK, *QUICK_CHANGES.get(study, ())) if quick else ()
        return [Job(study, point, seed, overrides, folder, grids) for point in points(study, quick=quick)]

    made = [job for study in chosen for job in of_study(study, 0, grids=True)]
    for seed in range(max(wanted[study] for study in chosen)):
        for study in chosen:
            if seed < wanted[study] and study not in borrowed:
                made += of_study(study, seed)
    return made


def main() -> None:
    """Run the missing jobs, then write the page of all finished studies."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    name = "paper_quick" if arguments.quick else "paper"
    url = f"sqlite:///{RESULTS / name}.db"
    RESULTS.mkdir(exist_ok=True)
    seeds = arguments.seeds or (2 if arguments.quick else None)
    studies = [table.study for table in TABLES if table.settings or not arguments.quick]
    everything = jobs(studies, seeds, quick=arguments.quick)
    chosen = [job for job in everything if job.study in (arguments.table or [job.study])]
    try:
        failed = 0 if arguments.tables else run(chosen, url, arguments.jobs, quick=arguments.quick)
        out = RESULTS / f"{name}.md" if arguments.quick else ROOT / "docs" / "paper.md"
        out.write_text(written(everything, url, quick=arguments.quick))
        print(out)
    except LcscError as error:
        sys.exit(f"paper.py: {error}")
    except KeyboardInterrupt:
        print("interrupted: nothing is lost; the same command continues, --tables shows what is there", file=sys.stderr)
        sys.exit(130)
    if failed:
        sys.exit(f"{failed} runs of study files failed; mend the cause and run the same command again")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short trainings and searches, two seeds: minutes")
    parser.add_argument("--table", action="append", choices=[table.study for table in TABLES], help="only this one")
    parser.add_argument("--seeds", type=int, help="how many: 5, or 3 where these decide; with --quick 2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once: one for each core")
    parser.add_argument("--tables", action="store_true", help="run nothing: the page of what is there")
    return parser.parse_args()


def unfinished(job: Job, reader: HistoryReader) -> list[str]:
    """The studies of a job that have not ended yet."""
    known = set(reader.names())
    ended = {study.study for study in reader.read_studies(known.intersection(job.studies())) if study.ended}
    return [study for study in job.studies() if study not in ended]


def run(chosen: Sequence[Job], url: str, processes: int, *, quick: bool) -> int:
    """Run the missing jobs; returns how many failed."""
    reader = HistoryReader(open_storage(url, write=True))
    missing = [job for job in chosen if unfinished(job, reader)]
    print(f"{machine()}\n{len(chosen)} runs of study files, {len(chosen) - len(missing)} of them done", flush=True)
    train(missing, processes, quick=quick)
    failed = _run_all([job for job in missing if job.grids], url, processes)
    lacking = {job.experiment for job in failed}  # without EMA*, which every search is compared with at its end
    searches = [job for job in missing if not job.grids and job.experiment not in lacking]
    return len([*failed, *_run_all(searches, url, processes)])


def _run_all(missing: Sequence[Job], url: str, processes: int) -> list[Job]:
    """Run several jobs at once; returns those that failed."""
    failed = []
    with (
        progress("study files", len(missing)) as advance,
        concurrent.futures.ThreadPoolExecutor(processes) as pool,
    ):
        running = {pool.submit(job.run, url): job for job in missing}
        try:
            for done in concurrent.futures.as_completed(running):
                job, failure = running[done], done.result()
                advance(note=str(job))
                if failure is not None:
                    failed.append(job)
                    print(f"{job}: {failure}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def train(missing: Sequence[Job], processes: int, *, quick: bool) -> None:
    """Train every model that the jobs need, in one thread each; a teacher before its students."""
    if not missing:
        return
    folder = missing[0].folder
    (folder / "models").mkdir(parents=True, exist_ok=True)
    named = {Path(str(job.study_file().objective.settings["checkpoints"])).stem for job in missing}
    students = [name for name in COMMANDS if name in named]
    teachers = [TEACHER] if named.intersection(TAUGHT) else []

    def train_one(name: str) -> str | None:
        options = ["--steps", str(QUICK_STEPS.get(name, 100))] if quick else []
        command = training_command(name, *options, folder=folder)
        return None if command is None else _failure(command, folder)

    with (
        progress("trainings", len(teachers) + len(students)) as advance,
        concurrent.futures.ThreadPoolExecutor(processes) as pool,
    ):
        for names in (teachers, students):
            for name, failure in zip(names, pool.map(train_one, names), strict=True):
                advance(note=name)
                if failure is not None:
                    print(f"training of {name}: {failure}", flush=True)


def _failure(command: Sequence[str], folder: Path) -> str | None:
    """Run a command in a folder, in one thread; gives the last line of its errors if it failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=folder) as process:
        _running.add(process)
        _, errors = process.communicate()
        _running.remove(process)
    return None if process.returncode == 0 else (errors.strip().splitlines() or ["no output"])[-1]


def _interrupt(*_: object) -> None:
    """End all running processes, as Ctrl-C at a terminal does."""
    for process in list(_running):
        process.terminate()
    raise KeyboardInterrupt


def written(everything: Sequence[Job], url: str, *, quick: bool) -> str:
    """The page of the finished studies."""
    reader = HistoryReader(open_storage(url, write=False))
    left = {study for job in everything for study in unfinished(job, reader)}
    total = sum(len(job.studies()) for job in everything)
    missing = f"{len(left)} of {total} studies" if left else ""
    of_study: dict[str, list[Job]] = {}
    for job in everything:
        if job.grids:  # each experiment has one such job
            of_study.setdefault(job.study, []).append(job)
    tables = [table for table in TABLES if table.study in of_study]
    found = {table.study: _points(of_study[table.study], of_study.get(table.beside or ""), reader) for table in tables}
    return page(found, _costs(found, reader), missing=missing, machine=machine(), quick=quick)


def _points(of_study: Sequence[Job], beside: Sequence[Job] | None, reader: HistoryReader) -> Points:
    """The results of the experiments of a study file; those of another file stand in for searches that it lacks."""
    values = {
        key.rpartition(".")[2]: list(dict.fromkeys(str(job.point[key]) for job in of_study))
        for key in of_study[0].point
    }
    found, training = {}, {}
    for i, job in enumerate(of_study):
        place = tuple(str(value) for value in job.point.values())
        names = [other[i].experiment for other in (beside, of_study) if other is not None]  # its own take precedence
        studies = [study for name in names for study in _ended(name, reader)]
        found[place] = {
            optimizer: {study.seed: study for study in studies if study.optimizer == optimizer}
            for optimizer in (*OPTIMIZERS, EMA_GRID)
        }
        seconds = _training_seconds(job.study_file().objective.settings, job.folder)
        if seconds is not None:
            training[place] = seconds
    return Points(values, found, training)


def _training_seconds(settings: Mapping[str, Any], folder: Path) -> float | None:
    """The seconds that training took up to the last selected checkpoint; ``None`` if that is not known."""
    state_file = folder / Path(settings["checkpoints"]).with_suffix(".state") if "checkpoints" in settings else None
    if state_file is None or not state_file.is_file():
        return None
    state = torch.load(state_file, map_location="cpu", weights_only=True)
    last_step = min(settings.get("select", {}).get("last_step", math.inf), state["step"])
    return float(state["seconds"] * last_step / state["step"])


def _ended(experiment: str, reader: HistoryReader) -> list[Standing]:
    """The studies of an experiment with a held-out result; empty before it has begun."""
    if experiment not in reader.experiments():
        return []
    return [study for study in reader.read(experiment) if study.ended and study.found is not None]


def _costs(found: Mapping[str, Points], reader: HistoryReader) -> list[str]:
    stages: dict[str, list[dict[str, float]]] = {}
    totals = []
    for objective, study, where in MEASURED:
        for optimizer in OPTIMIZERS:
            studies = list(found[study].at(where, optimizer).values())
            if not studies:
                continue
            numbers = ("evaluations", "images", "seconds")
            middle = [statistics.median(getattr(study, name) for study in studies) for name in numbers]
            totals.append([objective, optimizer, *(f"{value:,.0f}" for value in middle)])
            if optimizer == OPTIMIZERS[0]:
                trials = StoredStudy.open(reader.storage, studies[0].study).trials()
                stages[objective] = [trial.user_attrs["cost"] for trial in trials if trial.value is not None]
    return cost_lines(stages, totals)


if __name__ == "__main__":
    main()
