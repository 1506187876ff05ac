from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import random
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from lcsc_opt.base.errors import SearchFailedError, StudyStoreError
from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.base.study_spec import BudgetSpec, FailureSpec, OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Failure, InProcessEvaluator, Outcome, evaluate_safely
from lcsc_opt.objective.contract import CoefficientFunction, Objective
from lcsc_opt.optimizers import build_optimizer
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.optimizers.told_losses import FIRST_FAILURE_LOSS
from lcsc_opt.study.loop import Loop
from lcsc_opt.study.planning import most_in_flight
from tests.conftest import distance_to_target

STEPS = tuple(range(100, 2100, 100))
EVALUATIONS = 16


class Interrupted(BaseException):
    """What a signal does to a process."""


class ShuffledEvaluator:
    """Finishes candidates in another order than they came in."""

    def __init__(self, objective: Objective, seed: int) -> None:
        self._objective, self._random = objective, random.Random(seed)

    def submit(self, candidate: Candidate) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        delay = self._random.random() * 0.02
        outcome = evaluate_safely(self._objective, candidate)
        threading.Timer(delay, lambda: future.set_result(outcome)).start()
        return future

    def close(self) -> None: ...


def optimizer(name: str = "LCSC", *, workers: int = 1, seed: int = 0, **options: Any) -> Any:
    space = AffineSpace(STEPS, default_origin(STEPS))
    return build_optimizer(
        OptimizerSpec(name=name, options=options), space, budget=EVALUATIONS, workers=workers, seed=seed
    )


def open_study(url: str, name: str = "e/o/0") -> StoredStudy:
    return StoredStudy.open_or_create(open_storage(url, write=True), name, {})


def trials_of(study: StoredStudy) -> list[tuple[int, bytes, float | None]]:
    return [(t.number, coefficients_of(t).tobytes(), t.value) for t in study.trials()]


def run(
    study: StoredStudy,
    objective: Objective,
    name: str = "LCSC",
    evaluations: int = EVALUATIONS,
    *,
    stop_after: int = -1,
    asked: Any = None,
    shuffled: int | None = None,
    **options: Any,
) -> Loop:
    """Loop, with four workers that finish in the order of the seed ``shuffled``, or with none."""
    evaluator: Any = InProcessEvaluator(objective)
    if shuffled is not None:
        evaluator, options["in_flight"] = ShuffledEvaluator(objective, shuffled), most_in_flight(4)
    asked = asked or optimizer(name, workers=1 if shuffled is None else 4)

    def on_progress(running: Loop) -> None:
        if running.told == stop_after:
            raise Interrupted

    search = Loop(
        study, Driver(lambda: asked, "a test"), evaluator, budget=BudgetSpec(evaluations=evaluations), **options
    )
    search.on_progress = on_progress
    search.run()
    return search


_undisturbed: dict[str, list[tuple[int, bytes, float | None]]] = {}  # by the optimizer


@pytest.fixture
def undisturbed(tmp_path: Path, objective: Objective) -> Callable[[str], list[tuple[int, bytes, float | None]]]:
    def result(name: str) -> list[tuple[int, bytes, float | None]]:
        if name not in _undisturbed:
            study = open_study(f"sqlite:///{tmp_path / 'undisturbed.db'}", f"e/{name}/0")
            run(study, objective, name)
            _undisturbed[name] = trials_of(study)
        return _undisturbed[name]

    return result


def test_samples_that_pycma_mirrors_are_told_without_a_warning(url: str, objective: Objective) -> None:
    few = optimizer("CMA", popsize=4)  # mirrors; every warning is an error here
    assert run(open_study(url), objective, asked=few, evaluations=20).told == 20


class Timed(CoefficientFunction):
    """Evaluations that take a second each, by a clock that nothing else moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def evaluate(self, candidate: Candidate) -> Evaluation:
        self.now += 1
        return dataclasses.replace(super().evaluate(candidate), cost=Cost(seconds=1.0))


def timed(study: StoredStudy, name: str, seconds: float, *, workers: int = 1) -> int:
    """How many trials a new process evaluates until the time of the study is over."""
    timed = Timed(distance_to_target, STEPS, name="timed", gradient=lambda coefficients: 2 * coefficients)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lcsc_opt.study.loop.time", timed)
        driver = Driver(lambda: optimizer(name, workers=workers), "a test")
        budget = BudgetSpec(seconds=seconds)
        search = Loop(study, driver, InProcessEvaluator(timed), budget=budget, in_flight=most_in_flight(workers))
        search.run()
    return int(timed.now)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_search_that_its_time_ended_continues_exactly(workers: int, tmp_path: Path, url: str) -> None:
    whole = open_study(f"sqlite:///{tmp_path / 'whole.db'}")
    timed(whole, "LCSC", 12, workers=workers)
    study = open_study(url)
    begun = timed(study, "LCSC", 4, workers=workers)
    assert 4 <= begun < 4 + most_in_flight(workers)
    assert timed(study, "LCSC", 4, workers=workers) == 0, "what is stored is replayed, whatever the clock says"
    assert timed(study, "LCSC", 12, workers=workers) < 12 - 4 + most_in_flight(workers), "earlier evaluations count"
    assert trials_of(study)[:12] == trials_of(whole)[:12]
    assert timed(open_study(url, "e/none/0"), "LCSC", 1e-9, workers=workers) == most_in_flight(workers), "some compare"


@pytest.mark.parametrize("name", ["LCSC", "CMA", "EMAGrid"])
def test_a_search_interrupted_anywhere_asks_the_same_candidates(
    name: str, url: str, objective: Objective, undisturbed: Any
) -> None:
    clean = undisturbed(name)
    study = open_study(url)
    original = objective.evaluate
    chance = random.Random(1)

    def evaluate(candidate: Candidate) -> Evaluation:
        if chance.random() < 0.2:
            raise Interrupted
        return original(candidate)

    objective.evaluate = evaluate  # type: ignore[assignment, method-assign]
    interruptions = 0
    while len(study.trials()) == 0 or study.trials()[-1].state == TrialState.RUNNING:
        with contextlib.suppress(Interrupted):
            run(study, objective, name)
            break
        interruptions += 1
    assert interruptions >= 1
    assert trials_of(study) == clean


@pytest.mark.parametrize(
    ("call", "written"), [("add_candidate", False), ("finish", False), ("finish", True)], ids=["ask", "result", "tell"]
)
def test_a_search_that_dies_around_a_commit_loses_and_doubles_nothing(
    call: str, written: bool, url: str, objective: Objective, undisturbed: Any
) -> None:
    original, calls = getattr(StoredStudy, call), itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == 12
        if last and not written:
            raise Interrupted
        result = original(*args, **kwargs)
        if last:
            raise Interrupted
        return result

    study = open_study(url)
    with pytest.raises(Interrupted):
        run(type("Dying", (StoredStudy,), {call: dying}).open(study.storage, study.name), objective)
    run(study, objective)
    assert trials_of(study) == undisturbed("LCSC")


def test_neither_the_order_in_which_workers_finish_nor_interruptions_change_anything(
    tmp_path: Path, url: str, objective: Objective
) -> None:
    found = []
    for seed in (0, 1):
        study = open_study(f"sqlite:///{tmp_path / f'{seed}.db'}")
        run(study, objective, "CMA", shuffled=seed)
        found.append(trials_of(study))
    study = open_study(url)
    for stop in (3, 11, 12):
        with pytest.raises(Interrupted):
            run(study, objective, "CMA", shuffled=stop, stop_after=stop)
    run(study, objective, "CMA", shuffled=0)
    assert [trials == trials_of(study) for trials in found] == 2 * [True]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (float("nan"), "the loss is nan"),
        (ValueError("no image,\n  today"), "ValueError: no image, today"),
    ],
)
def test_a_failed_trial_keeps_its_reason_and_the_search_goes_on(answer: Any, reason: str, url: str) -> None:
    calls = itertools.count(1)

    def sometimes(coefficients: np.ndarray) -> Any:
        if next(calls) % 3:
            return float(np.square(coefficients).sum())
        if isinstance(answer, Exception):
            raise answer
        return answer

    study = open_study(url)
    objective = CoefficientFunction(sometimes, STEPS, name="sometimes")
    search = run(study, objective, evaluations=6, failures=FailureSpec(retries=0))
    failed = [trial for trial in study.trials() if trial.state == TrialState.FAIL]
    assert [trial.number for trial in failed] == [2, 5]
    assert {trial.user_attrs["reason"] for trial in failed} == {reason}
    assert search.failed == 2
    assert search.best is not None
    assert search.best[1] not in {2, 5}


def test_a_failed_trial_is_told_the_worst_loss_so_far(url: str) -> None:
    losses = iter([float("nan"), 3.0, 7.0, float("-inf"), 5.0])
    told = []
    asked = optimizer()
    original = asked.tell
    asked.tell = lambda parameter, loss: (told.append(loss), original(parameter, loss))
    objective = CoefficientFunction(lambda _: next(losses), STEPS, name="losses")
    once = FailureSpec(retries=0)
    run(open_study(url), objective, evaluations=5, asked=asked, failures=once)
    assert told == [FIRST_FAILURE_LOSS, 1.5, 3.5, 3.5, 2.5]  # in units of 2


def scaled(objective: Objective, factor: float) -> Objective:
    """The same objective with its loss in another unit."""
    return CoefficientFunction(lambda coefficients: factor * objective(coefficients), STEPS, name="scaled")


def test_the_unit_of_the_loss_changes_no_candidate(url: str, objective: Objective) -> None:
    """Of any optimizer: none is told the losses themselves."""
    run(open_study(url, "e/plain/0"), objective, "CMA")
    plain = trials_of(open_study(url, "e/plain/0"))
    for exponent in (300, -300):
        study = open_study(url, f"e/scaled by {exponent}/0")
        search = run(study, scaled(objective, 2.0**exponent), "CMA")
        assert [trial[:2] for trial in trials_of(study)] == [trial[:2] for trial in plain]
        values = [trial[2] for trial in trials_of(study)]
        assert values == [(value or 0.0) * 2.0**exponent for *_, value in plain], "the database has what was measured"
        assert search.best is not None
        assert search.best == min(zip(values, range(len(values)), strict=True))


def test_a_study_whose_candidates_do_not_come_again_is_refused(url: str, objective: Objective) -> None:
    study = open_study(url)
    run(study, objective, evaluations=10)
    with pytest.raises(StudyStoreError, match=r"trial 7 .* torch 1 → 2"):  # the seven EMA rates are the same
        run(study, objective, evaluations=12, asked=optimizer(seed=1), changed="torch 1 → 2")
    assert len(study.trials()) == 10


def test_attempts_are_counted_across_an_interruption(url: str) -> None:
    calls: list[None] = []

    def always(coefficients: np.ndarray) -> float:
        calls.append(None)
        if len(calls) == 2:
            raise Interrupted
        raise RuntimeError("no")

    objective = CoefficientFunction(always, STEPS, name="always")
    study = open_study(url)
    with pytest.raises(Interrupted):
        run(study, objective, evaluations=1)
    assert len(study.trials()[0].user_attrs["attempts"]) == 1
    with pytest.raises(SearchFailedError):
        run(study, objective, evaluations=1)
    assert len(study.trials()[0].user_attrs["attempts"]) == 3
    assert len(calls) == 4  # one of them was interrupted


def test_a_failed_attempt_gives_its_memory_back() -> None:
    class Tensor:
        """Stands for gigabytes."""

    held: list[weakref.ref[Tensor]] = []

    def out_of_memory(_: np.ndarray) -> float:
        big = Tensor()
        big.itself = big  # type: ignore[attr-defined]  # only the garbage collector frees it
        held.append(weakref.ref(big))
        raise MemoryError("CUDA out of memory")

    objective = CoefficientFunction(out_of_memory, STEPS, name="oom")
    gc.disable()
    try:
        outcome = evaluate_safely(objective, Candidate(np.full(20, 0.05)))
    finally:
        gc.enable()
    assert isinstance(outcome, Failure)
    assert outcome.reason == "MemoryError: CUDA out of memory"
    assert held[0]() is None
