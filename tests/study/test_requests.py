"""What an optimizer asks besides coefficients reaches the objective, the database and, told, the optimizer again."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import nevergrad as ng
import numpy as np
import pytest
import torch
from optuna.trial import TrialState

from lcsc_opt.base.errors import ObjectiveError, SearchFailedError, StudyStoreError
from lcsc_opt.base.records import SEARCH, Candidate, Cost, Evaluation, Noise
from lcsc_opt.base.study_spec import BudgetSpec, FailureSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.database.arrays import array_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy, candidate_attributes
from lcsc_opt.evaluation.base import Failure, InProcessEvaluator, evaluate_safely
from lcsc_opt.objective.contract import Objective, Samples
from lcsc_opt.optimizers import LCSCGradient, ask_with, candidate_of, coefficient_array, evaluation_of
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.study.loop import Loop
from tests.optimizers.asking import how

STEPS = (10, 20, 30)
FAILING = 3  # the ask whose evaluation fails


class Descent(ng.optimizers.base.Optimizer):  # type: ignore[misc]
    """Steps of one length down the gradient, each on fresh noise of 20 images; every third ask is a plain check."""

    needs_gradient = True

    def __init__(self, parametrization: Any, shift: int = 0) -> None:
        super().__init__(parametrization)
        self._at = parametrization.value
        self._asks, self._shift = 0, shift
        self.heard: list[tuple[dict[str, Any], Evaluation | None]] = []

    def _internal_ask_candidate(self) -> Any:
        parameter = self.parametrization.spawn_child(new_value=self._at)
        if self._asks % 3 != 2:
            noise = Noise("gradient", self._asks + self._shift)
            ask_with(parameter, Candidate(parameter.value, images=20, noise=noise, gradient=True))
        self._asks += 1
        return parameter

    def _internal_tell_candidate(self, candidate: Any, loss: float) -> None:
        evaluation = evaluation_of(candidate)
        self.heard.append((how(candidate_of(candidate)), evaluation))
        if evaluation is not None and evaluation.gradient is not None:
            slope = evaluation.gradient - evaluation.gradient.mean()
            self._at = self._at - 0.001 * slope / (
                np.linalg.norm(slope) or 1.0
            )  # of any length: losses are told in a unit


class Bowl(Objective):
    """(a - target)², and a little noise that depends on which noise was asked for."""

    steps = STEPS
    samples = Samples(per_evaluation=100)

    def __init__(self) -> None:
        self.seen: list[tuple[int | None, Noise, bool]] = []

    def why_no_gradient(self) -> str | None:
        return None

    def evaluate(self, candidate: Candidate) -> Evaluation:
        self.seen.append((candidate.images, candidate.noise, candidate.gradient))
        if candidate.noise == Noise("gradient", FAILING):
            raise ValueError("no luck")
        away = candidate.coefficients - [0.25, 0.25, 0.5] + candidate.noise.seed / 7e3
        cost = Cost(images=candidate.images or self.samples.per_evaluation)
        found = Evaluation(float(away @ away), cost=cost)
        if candidate.gradient:
            return dataclasses.replace(found, gradient=2 * away, violation=float(away[0]))
        return found

    def describe(self) -> dict[str, Any]:
        return {}


def gradients(optimizer: Descent) -> list[bytes | None]:
    """Of each trial that the optimizer has heard of."""
    found = [None if heard is None else heard.gradient for _, heard in optimizer.heard]
    return [None if gradient is None else gradient.tobytes() for gradient in found]


def descent(shift: int = 0) -> Descent:
    return Descent(coefficient_array(AffineSpace(STEPS, default_origin(STEPS)), seed=0), shift)


def search(study: StoredStudy, optimizer: Descent, budget: BudgetSpec, objective: Objective | None = None) -> Loop:
    evaluator = InProcessEvaluator(Bowl() if objective is None else objective)
    failures = FailureSpec(retries=0)
    running = Loop(
        study,
        Driver(lambda: optimizer, "a test"),
        evaluator,
        budget=budget,
        images_per_evaluation=100,
        failures=failures,
    )
    running.run()
    return running


@pytest.fixture
def study(url: str) -> StoredStudy:
    return StoredStudy.open_or_create(open_storage(url, write=True), "e/Descent/0", {})


def unit_of(study: StoredStudy) -> float:
    """The power of two in which an optimizer hears losses."""
    value = study.trials()[0].value
    assert value is not None
    return float(2.0 ** np.floor(np.log2(value)))


def test_the_objective_and_the_trial_get_what_was_asked_and_the_optimizer_the_whole_evaluation(
    study: StoredStudy,
) -> None:
    objective, optimizer = Bowl(), descent()
    search(study, optimizer, BudgetSpec(evaluations=6), objective)
    first, _, check, failed, *_ = (trial.user_attrs for trial in study.trials())
    assert first["images"] == 20
    assert first["noise"] == {"group": "gradient", "seed": 0}
    assert (array_of(first["gradient"]) / unit_of(study)).tobytes() == gradients(optimizer)[0]
    assert not {"images", "noise", "gradient"} & set(check)
    assert failed["noise"]["seed"] == FAILING
    assert "gradient" not in failed
    assert objective.seen[:3] == [
        (20, Noise("gradient", 0), True),
        (20, Noise("gradient", 1), True),
        (None, SEARCH, False),
    ]
    assert [evaluation is None for _, evaluation in optimizer.heard] == [number == FAILING for number in range(6)]
    assert [known is not None for known in gradients(optimizer)] == [True, True, False, False, True, False]
    heard = [evaluation for _, evaluation in optimizer.heard if evaluation is not None]
    assert heard[0].cost.images == 20
    assert heard[-1].loss < heard[0].loss


def test_a_continued_search_hears_the_same_gradients_again(study: StoredStudy) -> None:
    once, again = descent(), descent()
    search(study, once, BudgetSpec(evaluations=7))
    objective = Bowl()
    search(study, again, BudgetSpec(evaluations=9), objective)
    assert len(objective.seen) == 2
    assert gradients(again)[:7] == gradients(once)
    assert again.heard[:7] == once.heard
    heard = [evaluation for _, evaluation in again.heard if evaluation is not None]
    assert {one.violation is None for one in heard} == {True, False}


def test_a_search_that_would_ask_with_other_noise_is_not_continued(study: StoredStudy) -> None:
    search(study, descent(), BudgetSpec(evaluations=2))
    with pytest.raises(StudyStoreError, match="trial 0"):
        search(study, descent(shift=1), BudgetSpec(evaluations=4))


@pytest.mark.parametrize(("images", "asks"), [(20, 1), (140, 3), (141, 4)])
def test_a_budget_in_images_counts_what_was_asked(study: StoredStudy, images: int, asks: int) -> None:
    running = search(study, descent(), BudgetSpec(images=images))  # 20, 20, 100, 20, 20, 100, …
    assert running.told == len(study.trials()) == asks
    assert running.spent >= images > running.spent - 100


def follower(planned: int) -> Any:
    """``LCSCGradient`` with the plan that a study stores when it begins."""
    optimizer = LCSCGradient(images=20)(coefficient_array(AffineSpace(STEPS, default_origin(STEPS)), seed=0))
    optimizer.plan_budget(evaluations=planned, images=None, images_per_evaluation=100)
    return optimizer


class Interrupted(Bowl):
    """Like Ctrl-C in an evaluation."""

    def evaluate(self, candidate: Candidate) -> Evaluation:
        if len(self.seen) == 9:
            raise KeyboardInterrupt
        return super().evaluate(candidate)


@pytest.mark.parametrize(("first", "later"), [(1, 2), (4, 6), (12, 15), (60, 12)], ids=str)
def test_a_search_along_the_gradient_ends_with_a_check_whatever_becomes_of_its_budget(
    study: StoredStudy, first: int, later: int
) -> None:
    """Else its last steps could not be the answer."""
    with contextlib.suppress(KeyboardInterrupt):
        search(study, follower(first), BudgetSpec(evaluations=first), Interrupted() if first > later else None)
    if first < later:
        assert study.trials()[-1].state == TrialState.COMPLETE
    search(study, follower(first), BudgetSpec(evaluations=later))
    *_, step, check = study.trials()
    assert len(study.trials()) == later
    assert (step.state, check.state) == (TrialState.PRUNED, TrialState.COMPLETE)
    assert "gradient" not in check.user_attrs


def test_a_time_that_is_over_leaves_a_step_and_its_check(study: StoredStudy) -> None:
    search(study, follower(60), BudgetSpec(seconds=1e-9))
    assert [trial.state for trial in study.trials()] == [TrialState.PRUNED, TrialState.COMPLETE]


@dataclasses.dataclass
class Answering(Objective):
    """Answers with what it is given."""

    answer: Any
    steps: tuple[int, ...] = STEPS

    def evaluate(self, candidate: Candidate) -> Any:
        return self.answer() if callable(self.answer) else self.answer

    def describe(self) -> dict[str, Any]:
        return {}


def test_numbers_of_numpy_and_torch_are_stored_like_others(study: StoredStudy) -> None:
    answer = Evaluation(
        torch.tensor(1.5, dtype=torch.float64, requires_grad=True),  # type: ignore[arg-type]
        {"fid": np.float32(1.5), "recall": torch.tensor(0.25), "near": float("nan")},  # type: ignore[dict-item]
        Cost(images=np.int64(7), seconds=np.float32(0.5)),  # type: ignore[arg-type]
        gradient=torch.zeros(3),  # type: ignore[arg-type]
    )
    Loop(
        study,
        Driver(descent, "a test"),
        InProcessEvaluator(Answering(answer)),
        budget=BudgetSpec(evaluations=2),
    ).run()
    trial = study.trials()[0]
    assert trial.value == 1.5
    assert trial.user_attrs["metrics"] | {"near": None} == {"fid": 1.5, "recall": 0.25, "near": None}
    assert trial.user_attrs["cost"] | {"images": 7, "seconds": 0.5} == trial.user_attrs["cost"]


@pytest.mark.parametrize(
    ("answer", "reason", "retry"),
    [
        (None, "ObjectiveError: evaluate gave NoneType, expected an Evaluation", False),
        (lambda: Evaluation("low"), "ValueError: could not convert string to float: 'low'", True),  # type: ignore[arg-type]
        (lambda: Evaluation(1.0, {"fid": None}), "TypeError: float() argument must be", True),  # type: ignore[dict-item]
        (Evaluation(1.0), "the objective gave no gradient", False),
        (Evaluation(1.0, gradient=np.zeros(4)), "the gradient has the shape [4], expected [3]", False),
        (Evaluation(1.0, gradient=np.array([0.0, np.nan, 0.0])), "the gradient is not finite", True),
    ],
)
def test_what_is_no_evaluation_or_has_no_right_gradient_fails_the_trial(answer: Any, reason: str, retry: bool) -> None:
    """An answer that cannot even be made is made by the objective."""
    outcome = evaluate_safely(Answering(answer), Candidate(np.ones(3) / 3, gradient=True))
    assert isinstance(outcome, Failure)
    assert outcome.reason.startswith(reason)
    assert outcome.retry == retry


def test_what_the_library_refuses_is_not_tried_again(study: StoredStudy) -> None:
    class Refusing(Bowl):
        def evaluate(self, candidate: Candidate) -> Evaluation:
            self.seen.append((candidate.images, candidate.noise, candidate.gradient))
            raise ObjectiveError("no graph") if candidate.noise.seed == 0 else OSError("a disk that was away")

    objective = Refusing()
    budget, failures = BudgetSpec(evaluations=2), FailureSpec(in_a_row=None)
    running = Loop(study, Driver(descent, "a test"), InProcessEvaluator(objective), budget=budget, failures=failures)
    with pytest.raises(SearchFailedError, match="all 2 trials failed"):
        running.run()
    assert [noise.seed for _, noise, _ in objective.seen] == [0, 1, 1, 1]
    assert [len(trial.user_attrs["attempts"]) for trial in study.trials()] == [1, 3]


def test_a_trial_says_that_its_loss_is_corrected() -> None:
    plain = candidate_attributes(Candidate(np.ones(3) / 3))
    corrected = candidate_attributes(Candidate(np.ones(3) / 3, unbiased=True))
    assert set(corrected) - set(plain) == {"unbiased"}
