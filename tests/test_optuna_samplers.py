"""The OptunaHub package: the same candidates as lcsc_opt's own optimizers, in a study that may end at any time."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from lcsc_opt.base.records import Evaluation
from lcsc_opt.base.study_spec import OptimizerSpec
from lcsc_opt.coefficients import AffineSpace, default_origin
from lcsc_opt.optimizers import attach_evaluation, build_optimizer, candidate_of

_SPEC = importlib.util.spec_from_file_location(
    "optuna_lcsc", Path(__file__).parents[1] / "package/samplers/lcsc/__init__.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
lcsc = sys.modules["optuna_lcsc"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(lcsc)

K = 5
BEST = np.array([0.5, -0.25, 0.0, -0.5, 1.25])
SCALES = np.arange(1, K + 1)
SAMPLERS = [lcsc.LCSCSampler, lcsc.LCSCQuadraticSampler, lcsc.LCSCGradientSampler]
BROKEN, PRUNED, ENQUEUED, KILLED = 4, 8, 12, 15  # of a gradient search a length, a check, two steps


def loss(coefficients: Any) -> float:
    return float(SCALES @ (coefficients - BEST) ** 2)


def objective(sampler: Any, sign: int = 1, accident: Callable[[optuna.Trial], None] = lambda _: None) -> Any:
    def evaluate(trial: optuna.Trial) -> float:
        coefficients = sampler.suggest(trial)
        accident(trial)
        if sampler.candidate(trial).gradient:
            trial.set_user_attr("gradient", (sign * 2 * SCALES * (coefficients - BEST)).tolist())
        return sign * loss(coefficients)

    return evaluate


def vectors(study: optuna.Study) -> list[list[float]]:
    return [[trial.params[f"c{i}"] for i in range(K)] for trial in study.trials]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    yield
    optuna.logging.set_verbosity(before)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_candidates_are_those_of_the_optimizer_alone(kind: Any) -> None:
    steps = (10, 20, 30, 40, 50)
    sampler = kind(steps, seed=3, budget=40)
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective(sampler), n_trials=40)
    space = AffineSpace(steps, default_origin(steps))
    optimizer = build_optimizer(OptimizerSpec(name=kind.optimizer), space, budget=40, workers=1, seed=3)
    if hasattr(optimizer, "plan_budget"):
        optimizer.plan_budget(evaluations=40, images=None, images_per_evaluation=0)
    asked = []
    for _ in range(40):
        candidate = optimizer.ask()
        asked.append(candidate.value.tolist())
        gradient = 2 * SCALES * (candidate.value - BEST) if candidate_of(candidate).gradient else None
        attach_evaluation(candidate, Evaluation(loss(candidate.value), gradient=gradient))
        optimizer.tell(candidate, loss(candidate.value))
    assert vectors(study) == asked
    assert study.best_value < loss(default_origin(steps))


def with_accidents(kind: Any, file: Path, stops: Sequence[int], *, sign: int = 1, kill: bool = False) -> list[Any]:
    """What a study asks that fails, is pruned, and gets a trial of its user's; at each of ``stops`` it begins anew."""

    def accident(trial: optuna.Trial) -> None:
        if trial.number == PRUNED and not kill:
            trial.report(-1e9 * sign, 0)  # not the trial's result
            raise optuna.TrialPruned
        if trial.number in (BROKEN, PRUNED, KILLED):
            raise FloatingPointError

    for stop in stops:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
        direction: Any = "minimize" if sign == 1 else "maximize"
        sampler = kind(K, budget=30)
        study = optuna.create_study(
            study_name="s", storage=storage, sampler=sampler, direction=direction, load_if_exists=True
        )
        while (count := len(study.trials)) < stop:
            if count == ENQUEUED:
                study.enqueue_trial({f"c{i}": float(value) for i, value in enumerate(BEST[::-1])})
            if count == KILLED and kill:
                sampler.suggest(study.ask())  # and nothing is ever told
                break
            study.optimize(objective(sampler, sign, accident), n_trials=1, catch=FloatingPointError)
    return vectors(study)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_study_goes_on_from_its_storage(kind: Any, tmp_path: Path) -> None:
    once = with_accidents(kind, tmp_path / "once", [30])
    # a step begins where the best length ends, and after a failure it goes back to where it was
    assert len({tuple(vector) for vector in once}) == 30 - 2 * (kind is lcsc.LCSCGradientSampler)
    again = with_accidents(kind, tmp_path / "again", [7, 13, 16, 23, 30], kill=True)
    assert again == once
    assert with_accidents(kind, tmp_path / "up", [30], sign=-1) == once, "maximized, it is the negative loss"


@pytest.mark.parametrize("kind", SAMPLERS[1:])
def test_a_study_of_another_sampler_is_taken_over_at_its_best(kind: Any) -> None:
    study = optuna.create_study(sampler=lcsc.LCSCSampler(K, seed=5))
    study.optimize(objective(study.sampler), n_trials=30)
    best = study.best_params
    study.sampler = kind(K, seed=6)
    study.optimize(objective(study.sampler), n_trials=10)
    assert study.trials[30].params == pytest.approx(best)
    assert study.best_trial.number > 30


@pytest.mark.parametrize("declared", [1, 4])
def test_results_of_trials_that_run_at_once_are_heard(declared: int) -> None:
    sampler = lcsc.LCSCSampler(K, num_workers=declared, seed=0, mutation=0.1)
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective(sampler), n_trials=80, n_jobs=4)
    assert len({tuple(vector) for vector in vectors(study)}) == 80
    assert study.best_value < 0.4 * min(map(loss, vectors(study)[:7]))


def test_a_gradient_on_noise_of_its_own_is_heard_though_its_loss_does_not_compare() -> None:
    sampler = lcsc.LCSCGradientSampler(K, images=1000, seed=0, budget=60)
    study = optuna.create_study(sampler=sampler)
    asked = []

    def evaluate(trial: optuna.Trial) -> float:
        value = objective(sampler)(trial)
        asked.append(sampler.candidate(trial))
        if asked[-1].compares(1000):
            return float(value)
        trial.report(value + 1, 0)
        raise optuna.TrialPruned

    study.optimize(evaluate, n_trials=60)
    steps = [candidate for candidate in asked if candidate.gradient]
    lengths = [candidate for candidate in asked if candidate.unbiased and not candidate.gradient]
    assert {candidate.images for candidate in (*steps, *lengths)} == {200}
    assert len({candidate.noise for candidate in steps}) == len(steps) == 57 - len(lengths)
    assert len({candidate.noise for candidate in lengths}) == 1
    assert study.best_value < 0.2 * study.trials[0].value


def test_what_cannot_be_sampled_is_refused() -> None:
    study = optuna.create_study(sampler=lcsc.LCSCSampler(K))
    with pytest.raises(ValueError, match=r"take them from sampler.suggest\(trial\)"):
        study.ask().suggest_float("c0", 0.9, 1)
    study.enqueue_trial({"c0": 0.5})
    with pytest.raises(ValueError, match="searches c0 to c4, all at once"):
        study.sampler.suggest(study.ask())
    study.sampler = lcsc.LCSCGradientSampler(K)
    study.tell(study.ask({f"c{i}": optuna.distributions.FloatDistribution(-1e6, 1e6) for i in range(K)}), 1)
    with pytest.raises(ValueError, match="trial 2 has no gradient"):
        study.sampler.suggest(study.ask())
    with pytest.raises(ValueError, match="multi-objective"):
        lcsc.LCSCSampler(K).suggest(optuna.create_study(directions=["minimize"] * 2, sampler=lcsc.LCSCSampler(K)).ask())
