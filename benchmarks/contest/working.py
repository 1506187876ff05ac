"""Running and measuring studies, several at once, each in a process of its own with one thread."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

from contest.answers import answers, measured
from contest.entries import Cell, Contender, study_file
from lcsc_opt.base.errors import SearchFailedError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import HELD_OUT, Candidate, Noise
from lcsc_opt.base.study_spec import StudySpec
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.opened import Database
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.states import is_searched
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.urls import files_directory
from lcsc_opt.evaluation.base import Failure, evaluate_safely
from lcsc_opt.experiment.experiment import Experiment
from lcsc_opt.experiment.running import searches_of
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.of_study import ObjectiveLoader

MEASURED = "held_out_answers"
"""The study's attribute: ``images``, and ``trials``: number → ``loss`` and ``cross_check`` on held-out noise."""
UNSEEN = Noise(HELD_OUT.group, 1)  # settings of optimizers were chosen on group 0


FAILED = "FAILED"


@dataclasses.dataclass(frozen=True)
class Job:
    """One study: a cell, a contender and a seed, in a database."""

    url: str
    cell: Cell
    contender: Contender
    seed: int

    @property
    def spec(self) -> StudySpec:
        """The study."""
        [spec] = searches_of([study_file(self.cell, self.contender, self.seed)])
        return spec


def is_done(reader: HistoryReader, job: Job) -> bool:
    """Whether a study was searched and measured. Loads no objective."""
    spec = job.spec
    history = next(iter(reader.read_studies([spec.name])), None)
    if history is None:
        return False
    study = StoredStudy.open(reader.storage, spec.name)
    found = answers(reader.trials(history), job.cell.limits)
    return is_searched(spec, study.attributes) and measured(found, known_results(study, job.cell)) is not None


def known_results(study: StoredStudy, cell: Cell) -> dict[str, Any]:
    """Number of the trial → its measurement with as many images as the cell asks for."""
    stored = study.attributes.get(MEASURED) or {}
    return dict(stored["trials"]) if stored.get("images") == cell.held_out else {}


def work(jobs: Sequence[Job], processes: int) -> Iterator[str]:
    """Do jobs in their order, ``processes`` at once. Gives a line for each that ends or fails."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(_do, job) for job in jobs]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # a study continues from its committed trials
            raise


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process without a traceback


def _do(job: Job) -> str:
    start = time.perf_counter()
    said = io.StringIO()  # progress of several processes would mix on one terminal
    try:
        with contextlib.redirect_stderr(said):
            outcome = search_and_measure(job)
    except Exception as error:  # the other studies go on
        return f"{FAILED} {job.spec.name}: {type(error).__name__}: {error}"
    notices = [line for line in said.getvalue().splitlines() if line.startswith("lcsc: ")]
    return "\n".join([f"{job.spec.name}: {outcome}, {time.perf_counter() - start:.0f} s", *notices])


def search_and_measure(job: Job) -> str:
    """Search, report and measure one study, as far as that is not done yet."""
    loader = ObjectiveLoader(BuildContext(files=files_directory(job.url)))
    database = Database(job.url)
    with Experiment([job.spec], database, loader) as experiment:
        outcome = experiment.search(job.spec.name)
        experiment.report()
        study = StoredStudy.open(database.made(), job.spec.name)
        with study.hold():
            measure(study, experiment.objective, job.cell)
    return outcome


def measure(study: StoredStudy, objective: Objective, cell: Cell) -> None:
    """Evaluate each trial that is an answer once on held-out noise, and write each result at once."""
    reader = HistoryReader(study.storage)
    [history] = reader.read_studies([study.name])
    known = known_results(study, cell)
    trials = {trial.number: trial for trial in reader.trials(history)}
    numbers = dict.fromkeys(answer.trial for answer in answers(list(trials.values()), cell.limits))
    for number in [number for number in numbers if str(number) not in known]:
        candidate = Candidate(coefficients_of(trials[number]), images=cell.held_out, noise=UNSEEN)
        outcome = evaluate_safely(objective, candidate)
        if isinstance(outcome, Failure):
            raise SearchFailedError(f"{study.name}: trial {number} on held-out noise: {outcome.reason}")
        metric = objective.reported_metrics().cross_check
        cross_check = None if metric is None else outcome.metrics[metric]
        known[str(number)] = {"loss": outcome.loss, "cross_check": cross_check}
        study.set_attribute(MEASURED, {"images": cell.held_out, "trials": known})
