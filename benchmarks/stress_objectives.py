"""Faults of objectives, their checkpoints and their environment; the time to open and replay a long study."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState, create_trial
from stress_kills import with_workers
from stress_search import Child, Clean, Row, Work, digest, opened, rows, search, sqlite_url, verdict

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.reproducibility import blas_threads
from lcsc_opt.base.study_file import BudgetSpec, FailureSpec, parse_study
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, create
from lcsc_opt.evaluation import InProcessEvaluator
from lcsc_opt.objective.function import CoefficientFunction
from lcsc_opt.search.plan import plans
from lcsc_opt.search.runner import Search, most_in_flight
from lcsc_opt.search.study import ObjectiveSource, run_study

ANSWERS: dict[str, tuple[Any, str]] = {
    "NaN": (math.nan, "the loss is nan"),
    "+inf": (math.inf, "the loss is inf"),
    "-inf": (-math.inf, "the loss is -inf"),
    "None": (None, "ObjectiveError: the objective returned None, expected a number"),
    "a string": ("low", "ObjectiveError: the objective returned 'low', expected a number"),
    "raises": (ValueError("no image"), "ValueError: no image"),
}
DIED = "the worker process died"
OBJECTIVE = '''
import numpy as np
from lcsc_opt.objective.contract import Evaluation, Objective
from lcsc_opt.trajectory import Trajectory

class Norm(Objective):
    """The size of the merged weights, described as merge_sample_score describes its trajectory."""

    def __init__(self, trajectory):
        self.trajectory = trajectory

    @property
    def steps(self):
        return self.trajectory.steps

    def evaluate(self, candidate):
        return Evaluation(float(self.trajectory.merge(candidate.coefficients)["weight"].square().sum()))

    def describe(self):
        return {"trajectory": self.trajectory.sha256}

def build(settings):
    return Norm(Trajectory.open(settings["path"]))
'''


def failing_objective(folder: Path) -> Row:
    """Return something that is no finite number, or raise, for some candidates and then for all."""
    problems = []
    for name, (answer, reason) in ANSWERS.items():
        problems += Child(
            functools.partial(_some_fail, sqlite_url(folder, f"some {name}"), name, answer, reason)
        ).value()
        problems += Child(functools.partial(_all_fail, sqlite_url(folder, f"all {name}"), name, answer)).value()
    found, ok = verdict(
        problems,
        "FAIL with its reason after 3 attempts (1 where no number came), never best, told finite; where all fail, "
        "SearchFailedError at trial 10 of 12, at the first one where an error was raised",
    )
    return Row(
        f"objective returns {', '.join(list(ANSWERS)[:-1])}; raises",
        "every third candidate, each time; then every candidate",
        "FAIL with reason; never best; the study ends as documented",
        found,
        ok,
    )


def _answering(answer: Any, fails: Callable[[np.ndarray], bool]) -> InProcessEvaluator:
    work = Work(pause=0)

    def function(coefficients: np.ndarray) -> Any:
        if not fails(coefficients):
            return work.loss(coefficients)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return InProcessEvaluator(CoefficientFunction(function, work.steps, name="stress:answer"))


def _some_fail(url: str, name: str, answer: Any, reason: str) -> list[str]:
    work, told = Work(evaluations=30, pause=0), list[float]()
    evaluator = _answering(answer, lambda coefficients: int(digest(coefficients), 16) % 3 == 0)
    asked = work.build_optimizer()
    tell = asked.tell

    def noted(parameter: Any, loss: float) -> None:
        told.append(loss)
        tell(parameter, loss)

    asked.tell = noted
    with opened(url, write=True) as storage:
        study = StoredStudy.open_or_create(storage, work.name, {})
        with study.hold():
            running = Search(
                study, asked, evaluator, budget=BudgetSpec(evaluations=30), failures=FailureSpec(stop_share=1)
            )
            running.run()
        trials = study.trials()
        best = optuna.load_study(study_name=work.name, storage=storage).best_trial
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    problems = []
    if not failed or len(failed) + len(complete) != 30 or running.failures != len(failed):
        problems.append(f"{len(failed)} failed, {len(complete)} complete")
    reasons = {attempt["reason"] for trial in failed for attempt in trial.user_attrs["attempts"]}
    if reasons != {reason} or {trial.user_attrs["reason"] for trial in failed} != {reason}:
        problems.append(f"reasons {reasons}")
    expected = 1 if reason.startswith(ObjectiveError.__name__) else 3  # the library's refusals are not retried
    if {len(trial.user_attrs["attempts"]) for trial in failed} != {expected} or not all(map(math.isfinite, told)):
        problems.append("attempts, or a loss told that is not finite")
    lowest = min((trial.value, trial.number) for trial in complete if trial.value is not None)
    if best.number != lowest[1] or running.best != lowest:
        problems.append(f"best {best.number}")
    return [f"{name}: {problem}" for problem in problems]


def _all_fail(url: str, name: str, answer: Any) -> list[str]:
    work = Work(evaluations=12, pause=0)
    error = ""
    try:
        search(url, work, evaluator=_answering(answer, lambda _: True), failures=FailureSpec())
    except Exception as raised:
        error = type(raised).__name__
    states = [row[3] for row in rows(url, work.name)]
    expected = 10 if isinstance(answer, float) else 1  # not a float, so no number or an exception: the code is broken
    return [f"{name}: {error or 'no error'}, {states}"] * (
        error != "SearchFailedError" or states != ["FAIL"] * expected
    )


def failing_worker(folder: Path, clean: Clean) -> Row:
    """Kill the worker process, for one candidate and then for all."""
    work = Work("LCSC", workers=2, evaluations=8)
    expected = clean.rows(work)
    deadly, log = digest(np.frombuffer(expected[3][1])), folder / "deadly.log"
    url = sqlite_url(folder, "deadly")
    once = FailureSpec(retries=1)
    Child(lambda: with_workers(url, work, log, deadly=deadly, failures=once)).value()
    found = rows(url, work.name)
    states = [row[3] for row in found]
    problems = []
    if states != ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 4:
        problems.append(f"states {states}")
    if len(found[3][5]) != 2 or any(DIED not in reason for reason in found[3][5]):
        problems.append(f"attempts {found[3][5]}")
    none = FailureSpec(retries=0)
    work = Work("LCSC", workers=2, evaluations=3)
    answer = Child(
        lambda: with_workers(sqlite_url(folder, "all-deadly"), work, log, deadly="*", failures=none)
    ).result()
    if answer[0] != "SearchFailedError" or DIED not in answer[1]:
        problems.append(f"all: {answer}")
    text, ok = verdict(
        problems, "that trial FAIL after 2 attempts, the other 7 complete; all: SearchFailedError, all 3 trials failed"
    )
    return Row(
        "objective always kills its worker process",
        "one candidate of 8, W = 2, 1 retry; then every candidate",
        "FAIL with reason; never best; the study ends as documented",
        text,
        ok,
    )


def trajectory_swapped(folder: Path) -> Row:
    """Put another trajectory in the place of the first one, then the first again."""
    place, _, run = _study_of_trajectory(folder / "swapped")
    shutil.copytree(place / "run1", place / "run", dirs_exist_ok=True)
    other = Child(functools.partial(run, 12)).result()
    shutil.copytree(place / "run0", place / "run", dirs_exist_ok=True)
    same = Child(functools.partial(run, 12)).result()
    problems = [] if _names(other, "fingerprint.objective.trajectory was") else [f"other trajectory: {other}"]
    problems += [f"the first again: {same}"] * bool(same[0])
    found, ok = verdict(problems, f"{other[0]}: … {other[1][:75]}…; continued with the first one again")
    return Row(
        "a checkpoint of the trajectory swapped",
        "another trajectory at the same path (weights.bin and manifest.json)",
        "refused, named",
        found,
        ok,
    )


def weights_swapped(folder: Path) -> Row:
    """Put the weights of another trajectory under the manifest of the first one."""
    place, _, run = _study_of_trajectory(folder / "weights")
    shutil.copyfile(place / "run1" / "weights.bin", place / "run" / "weights.bin")
    answer = Child(functools.partial(run, 12)).result()
    named = answer[0] == "TrajectoryError" and "the weights of step 100 are damaged" in str(answer[1])
    found, ok = verdict([] if named else [f"{answer}"], f"{answer[0]}: … {str(answer[1])[-55:]}")
    return Row(
        "the weights of a trajectory swapped behind its manifest",
        "weights.bin rewritten, manifest.json untouched",
        "refused, named",
        found,
        ok,
    )


def _study_of_trajectory(place: Path) -> tuple[Path, str, Callable[..., str]]:
    """A study of 8 trials whose objective reads ``run``. ``run0`` is a copy of ``run``, ``run1`` another trajectory."""
    place.mkdir()
    (place / "norm.py").write_text(OBJECTIVE)
    for seed in (0, 1):
        Child(functools.partial(_write_trajectory, place / f"run{seed}", seed)).value()
    shutil.copytree(place / "run0", place / "run")
    url = sqlite_url(place, "studies")
    run = functools.partial(_run_norm, place, url)
    Child(functools.partial(run, 8)).value()
    return place, url, run


def _names(answer: tuple[str, Any], what: str) -> bool:
    return answer[0] == "StudyStoreError" and what in str(answer[1])


def environment_changed(folder: Path) -> Row:
    """Change one package's version in the stored fingerprint."""
    _, url, run = _study_of_trajectory(folder / "environment")
    Child(functools.partial(_change_fingerprint, url)).value()
    other = Child(functools.partial(run, 12)).result()
    accepted = Child(functools.partial(run, 12, accept_changes=True)).result()
    problems = [] if _names(other, "nevergrad 0.0.1 →") else [f"{other}"]
    problems += [f"--accept-changes: {accepted}"] * bool(accepted[0])
    found, ok = verdict(problems, f"{other[0]}: … {other[1][:75]}…; continued with --accept-changes")
    return Row("one package version changed in the fingerprint", "nevergrad 0.0.1 stored", "refused, named", found, ok)


def _write_trajectory(path: Path, seed: int) -> None:
    import torch

    from lcsc_opt.trajectory import TrajectoryWriter

    generator = torch.Generator().manual_seed(seed)
    with TrajectoryWriter(path) as writer:
        for step in range(100, 600, 100):
            writer.append(step, {"weight": torch.randn(4, 5, generator=generator)})


def _run_norm(place: Path, url: str, evaluations: int, *, accept_changes: bool = False) -> str:
    content = {
        "name": "swapped",
        "objective": {"file": "norm.py", "settings": {"path": str(place / "run")}},
        "optimizers": ["LCSC"],
        "budget": {"evaluations": evaluations},
    }
    (plan,) = plans(parse_study(content, source="stress"), place)
    with opened(url, write=True) as storage:
        return run_study(plan, ObjectiveSource(storage, plan), accept_changes=accept_changes)


def _change_fingerprint(url: str) -> None:
    with opened(url, write=True) as storage:
        study = StoredStudy.open(storage, "swapped/LCSC/0")
        fingerprint = study.attributes["fingerprint"]
        fingerprint["environment"]["packages"]["nevergrad"] = "0.0.1"
        study.set_attribute("fingerprint", fingerprint)


def replay(folder: Path, *, trials: int) -> Row:
    """Open and replay long studies."""
    problems, figures = [], []
    for optimizer in ("OnePlusOne", "LCSC", "CMA"):
        work = Work(optimizer, evaluations=trials, checkpoints=200, pause=0)
        url = sqlite_url(folder, f"long-{optimizer}")
        building = Child(functools.partial(_build, url, work)).value()
        opening, replaying, told = Child(functools.partial(_replay, url, work)).value()
        if opening >= 30 or replaying >= 10 or told != trials:
            problems.append(f"{optimizer}: opened in {opening:.1f} s, replayed {told} trials in {replaying:.1f} s")
        figures.append(f"{optimizer} {opening:.1f} + {replaying:.1f} s (built in {building:.0f} s)")
        with contextlib.suppress(OSError):
            Path(url.removeprefix("sqlite:///")).unlink()
    found, ok = verdict(problems, f"open and read + replay: {', '.join(figures)}")
    return Row(
        f"a study of {trials:,} trials at K = 200", "SQLite", "opened and read in 30 s; replayed in 10 s", found, ok
    )


def _build(url: str, work: Work) -> float:
    """Store a study as a search would leave it, in one transaction. Returns the seconds."""
    start = time.perf_counter()
    asking, trials = work.build_optimizer(), []
    for number in range(work.evaluations):
        with blas_threads(1):
            parameter = asking.ask()
            value = work.loss(parameter.value)
            asking.tell(parameter, value)
        attributes = {"coefficients": parameter.value.tolist(), "metrics": {}, "cost": {}, "tell_index": number}
        trials.append(create_trial(state=TrialState.COMPLETE, value=value, user_attrs=attributes))
    with opened(url, write=True) as storage:
        create(storage, work.name, {"steps": list(work.steps)}, trials)
    return time.perf_counter() - start


def _replay(url: str, work: Work) -> tuple[float, float, int]:
    """Seconds to open and read, seconds to replay, and the number of replayed trials."""
    start = time.perf_counter()
    storage = open_storage(url, write=True)
    study = StoredStudy.open(storage, work.name)
    budget, width = BudgetSpec(evaluations=work.evaluations), most_in_flight(work.workers)
    running = Search(study, work.build_optimizer(), work.evaluator(), budget=budget, in_flight=width)
    opened_at = time.perf_counter()
    running.run()
    return opened_at - start, time.perf_counter() - opened_at, running.told
