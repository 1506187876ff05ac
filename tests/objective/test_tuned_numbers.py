"""Tuned numbers in the objective: images change with them, gradients are finite differences, settings come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import nn

from lcsc_opt.base.records import HELD_OUT, Candidate
from lcsc_opt.evaluation.base import Failure, evaluate_safely
from lcsc_opt.trajectory import Trajectory
from tests.objective.test_objective_gradient import EMA, STEPS, build
from tests.objective.test_objective_gradient import trajectory as trajectory  # a fixture
from tests.sampling.test_gradient_sampling import Smooth, diffusers, heun

GUIDED: dict[str, Callable[[nn.Module], Any]] = {
    "DDIM": lambda network: diffusers(network, "ddim", guided=True),
    "DPM-Solver++": lambda network: diffusers(network, "dpm-solver++", 5, guided=True),
    "Heun with autoguidance": lambda network: heun(network, guide=Smooth(seed=9).double(), guidance=1.4),
}


@pytest.mark.parametrize("name", list(GUIDED))
def test_the_derivative_in_guidance_is_the_finite_difference_of_the_loss(name: str, trajectory: Trajectory) -> None:
    objective = build(trajectory, GUIDED[name](Smooth().double()), gradient_batch_size=7)
    scale = 2.0

    def loss(guidance: float) -> float:
        return objective.evaluate(Candidate(EMA, tuned={"guidance": guidance})).loss

    evaluation = objective.evaluate(Candidate(EMA, tuned={"guidance": scale}), gradient=True)
    assert evaluation.gradient is not None
    assert evaluation.gradient.shape == (len(STEPS) + 1,)
    step = 2**-10  # exact in float32, in which the number is given to the graph
    difference = (loss(scale + step) - loss(scale - step)) / (2 * step)
    assert evaluation.gradient[-1] == pytest.approx(difference, rel=1e-4)
    assert abs(difference) > 1e-3
    assert evaluation.loss == pytest.approx(loss(scale), rel=1e-9)


def test_coefficients_have_the_same_gradient_with_a_tuned_number_as_with_that_setting(trajectory: Trajectory) -> None:
    objective = build(trajectory, GUIDED["DDIM"](Smooth().double()))
    of_settings = objective.evaluate(Candidate(EMA), gradient=True).gradient
    tuned = objective.evaluate(Candidate(EMA, tuned={"guidance": 1.5}), gradient=True).gradient
    assert of_settings is not None
    assert tuned is not None
    np.testing.assert_allclose(tuned[:-1], of_settings, rtol=1e-12)


@pytest.mark.parametrize("name", list(GUIDED))
def test_a_candidate_without_numbers_has_those_of_the_settings(name: str, trajectory: Trajectory) -> None:
    objective = build(trajectory, GUIDED[name](Smooth().double()))
    before = objective.evaluate(Candidate(EMA)).loss
    described = objective.describe()
    changed = objective.evaluate(Candidate(EMA, tuned={"guidance": 3.0}), gradient=True).loss
    assert changed != before
    assert objective.evaluate(Candidate(EMA)).loss == before
    assert objective.describe() == described


def test_numbers_of_a_schedule_are_tuned_without_a_gradient(trajectory: Trajectory) -> None:
    objective = build(trajectory, heun(Smooth().double()))
    assert {name: number.differentiable for name, number in objective.tunable.items()} == {
        "s_churn": False,
        "sigma_min": False,
    }
    losses = {objective.evaluate(Candidate(EMA, tuned={"s_churn": churn})).loss for churn in (0.0, 0.3, 1.0)}
    assert len(losses) == 3


def test_a_number_without_a_derivative_has_none_in_a_gradient(trajectory: Trajectory) -> None:
    """The images of the gradient are those of a plain evaluation with the same numbers."""
    objective = build(trajectory, heun(Smooth().double(), guide=Smooth(seed=9).double(), guidance=1.4))
    candidate = Candidate(EMA, tuned={"s_churn": 0.3, "guidance": 2.0})
    evaluation = objective.evaluate(candidate, gradient=True)
    assert evaluation.gradient is not None
    assert evaluation.gradient[-2] == 0
    assert evaluation.gradient[-1] != 0
    assert evaluation.loss == pytest.approx(objective.evaluate(candidate).loss, rel=1e-9)
    assert evaluation.loss != pytest.approx(objective.evaluate(Candidate(EMA, tuned={"guidance": 2.0})).loss, rel=1e-6)


def test_images_for_people_are_sampled_with_the_numbers(trajectory: Trajectory) -> None:
    objective = build(trajectory, GUIDED["DDIM"](Smooth().double()))
    plain = objective.images(EMA, HELD_OUT, 4)
    tuned = objective.images(EMA, HELD_OUT, 4, tuned={"guidance": 3.0})
    assert not np.allclose(plain, tuned)
    np.testing.assert_array_equal(objective.images(EMA, HELD_OUT, 4), plain)


def test_a_gradient_without_the_numbers_derivatives_fails_the_trial(trajectory: Trajectory) -> None:
    objective = build(trajectory, GUIDED["DDIM"](Smooth().double()))

    class Short:
        def evaluate(self, candidate: Candidate, *, gradient: bool = False) -> Any:
            return objective.evaluate(Candidate(candidate.coefficients), gradient=gradient)

    outcome = evaluate_safely(Short(), Candidate(EMA, tuned={"guidance": 2.0}), gradient=True)  # type: ignore[arg-type]
    assert isinstance(outcome, Failure)
    assert "shape" in outcome.reason
