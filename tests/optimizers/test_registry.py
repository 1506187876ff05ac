"""Ours and Nevergrad's own optimizers, built from a study file's entry, over each space of coefficients."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nevergrad as ng
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Evaluation
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.base.study_spec import OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin, ema_coefficients, window_ema_rates
from lcsc_opt.coefficients.spaces import CoefficientSpace, ConvexSpace
from lcsc_opt.database.names import BASELINES
from lcsc_opt.optimizers import build_optimizer, candidate_of, coefficient_array
from lcsc_opt.optimizers.registry import OURS, configure
from tests.optimizers import asking
from tests.optimizers.asking import AFFINE, STEPS

NEVERGRAD = ("CMA", "DE", "PSO", "OnePlusOne", "TwoPointsDE")
TARGET = np.linspace(-0.3, 0.4, 20)


def distance(coefficients: np.ndarray) -> float:
    """Bounded, since Nevergrad's PSO also asks coefficients of 10^14."""
    return min(float(np.square(coefficients - TARGET).sum()), 1e6)


def build(name: str, space: CoefficientSpace = AFFINE, *, seed: int = 0, **options: Any) -> Any:
    spec = OptimizerSpec(name=name, options=options)
    return build_optimizer(spec, space, budget=100, workers=1, seed=seed)


class Distance:
    @staticmethod
    def answer(candidate: Any) -> Evaluation:
        gradient = 2 * (candidate.value - TARGET) if candidate_of(candidate).gradient else None
        return Evaluation(distance(candidate.value), gradient=gradient)


def run(optimizer: Any, count: int) -> list[np.ndarray]:
    with threadpool_limits(1, user_api="blas"):
        return [np.array(candidate.value) for candidate in asking.run(optimizer, Distance, count)]


@pytest.mark.parametrize("name", [*OURS, *NEVERGRAD])
def test_every_optimizer_asks_coefficients_of_the_convex_space(name: str) -> None:
    """In the affine one it is a part of the contract of optimizers."""
    for value in run(build(name, ConvexSpace(STEPS, AFFINE.origin)), 30):
        assert value.shape == (20,)
        assert value.dtype == np.float64
        assert abs(math.fsum(value) - 1) <= 1e-12
        assert (value >= 0).all()


@pytest.mark.parametrize("name", [*OURS, *NEVERGRAD])
def test_another_seed_asks_others_where_an_optimizer_is_random(name: str) -> None:
    first, second = (np.array(run(build(name, seed=seed), 20)).tobytes() for seed in (1, 2))
    noise_only = ("LCSCGradient", "LCSCQuadratic")  # their noise is all that is random
    is_random = name not in (*BASELINES, "Landscape", *noise_only)
    assert (first != second) == is_random


ASK_IN_A_FRESH_PROCESS = """
import hashlib, json, random, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
before = random.getstate(), np.random.get_state()[1].tolist()
import lcsc_opt.optimizers
assert before == (random.getstate(), np.random.get_state()[1].tolist())
from tests.optimizers.test_registry import build, run
print(json.dumps({name: hashlib.sha256(np.array(run(build(name), 80)).tobytes()).hexdigest() for name in sys.argv[2:]}))
"""


def test_a_fresh_process_with_other_hashes_asks_the_same_bits_and_its_imports_draw_no_numbers() -> None:
    """Nevergrad draws from the global generators while it is imported."""
    names = ["LCSC", "LCSCGradient", "LCSCQuadratic", *NEVERGRAD]
    here = {name: hashlib.sha256(np.array(run(build(name), 80)).tobytes()).hexdigest() for name in names}
    command = [sys.executable, "-c", ASK_IN_A_FRESH_PROCESS, str(Path(__file__).parents[2]), *names]
    environment = {**os.environ, "PYTHONHASHSEED": "4242" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert json.loads(printed) == here


@pytest.mark.parametrize(
    ("name", "options", "plain"),
    [
        ("OnePlusOne", {"mutation": "cauchy"}, ng.families.ParametrizedOnePlusOne(mutation="cauchy")),
        ("DE", {"popsize": 7}, ng.families.DifferentialEvolution(popsize=7)),
        ("CMA", {}, ng.optimizers.CMA),
    ],
)
def test_nevergrads_optimizers_are_used_as_they_are(name: str, options: dict[str, Any], plain: Any) -> None:
    array = coefficient_array(AFFINE, step_size=0.1, seed=derive_seed(0, "optimizer", name, bits=32))
    expected = np.array(run(plain(array, budget=100), 50))
    assert np.array(run(build(name, step_size=0.1, **options), 50)).tobytes() == expected.tobytes()
    if options:
        assert np.array(run(build(name, step_size=0.1), 50)).tobytes() != expected.tobytes()


@pytest.mark.parametrize("name", ["LCSC", "Landscape", *BASELINES])
def test_ours_run_with_plain_nevergrad_on_a_plain_array(name: str) -> None:
    optimizer = ng.optimizers.registry[name](ng.p.Array(shape=(20,)), budget=50)
    asked: list[np.ndarray] = []
    optimizer.register_callback("tell", lambda _, candidate, __: asked.append(candidate.value))
    recommended = optimizer.minimize(distance).value
    assert np.abs(np.array([*asked, recommended]).sum(axis=1) - 1).max() < 1e-12
    if name == "LCSC":
        emas = [ema_coefficients(range(1, 21), rate) for rate in window_ema_rates(range(1, 21))]
        np.testing.assert_allclose(asked[:7], emas)
        assert distance(recommended) < min(map(distance, emas))


@pytest.mark.parametrize("name", ["LCSCGradient", "LCSCQuadratic"])
def test_ours_that_follow_a_model_start_at_coefficients_that_sum_to_one_on_a_plain_array(name: str) -> None:
    optimizer = ng.optimizers.registry[name](ng.p.Array(shape=(20,)), budget=60)
    asked = asking.run(optimizer, Distance, 60)
    np.testing.assert_array_equal(asked[0].value, default_origin(range(1, 21)))
    assert max(abs(math.fsum(candidate.value) - 1) for candidate in asked) < 1e-12
    assert distance(optimizer.recommend().value) < 0.8 * distance(asked[0].value)


@pytest.mark.parametrize("parametrization", [ng.p.Choice(["a", "b"]), ng.p.Array(shape=(2, 3))])
@pytest.mark.parametrize("name", OURS)
def test_ours_refuse_a_parametrization_that_is_no_vector(name: str, parametrization: ng.p.Parameter) -> None:
    with pytest.raises(StudySpecError, match="one vector of coefficients"):
        ng.optimizers.registry[name](parametrization, budget=50)


@pytest.mark.parametrize(
    ("name", "one_at_a_time", "workers"),
    [
        *[("LCSC", False, 8), ("CMA", False, 8), ("EMAGrid", False, 8)],
        *[("LCSCGradient", True, 8), ("Powell", True, 1)],
    ],
)
def test_who_asks_one_at_a_time_and_how_many_workers_it_can_have(name: str, one_at_a_time: bool, workers: int) -> None:
    spec = OptimizerSpec(name=name)
    assert configure(spec).prefers_sequential_asks is one_at_a_time
    steps, images = configure(spec).steps_of_check(1000)
    assert (steps, images) == ((20.0, 200) if name == "LCSCGradient" else (1.0, 1000))
    built = build_optimizer(spec, AFFINE, budget=77, workers=workers, seed=0)
    assert (built.budget, built.num_workers) == (77, workers)
    if workers == 1:
        with pytest.raises(StudySpecError, match=f"^{name}: asks one candidate at a time and cannot use 2 workers"):
            build_optimizer(spec, AFFINE, budget=77, workers=2, seed=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("CMAA", {}, "CMAA: no such optimizer (did you mean 'CMA'?); ours are LCSC, LCSCGradient, LCSCQuadratic"),
        (
            "LCSC",
            {"max_parent": 3},
            "LCSC: max_parent: unknown key (did you mean 'max_parents'?); expected one of max_par",
        ),
        ("LCSC", {"mutation": -1}, "LCSC: mutation: Input should be greater than 0, got -1"),
        ("LCSC", {"max_parents": 1.5}, "LCSC: max_parents: Input should be a valid integer, got 1.5"),
        ("LCSC", {"crossover": True}, "LCSC: crossover: Input should be a valid number, got True"),
        ("LCSCGradient", {"checks": 0}, "LCSCGradient: checks: Input should be greater than 0, got 0"),
        ("LCSCQuadratic", {"share": 0}, "LCSCQuadratic: share: Input should be greater than 0, got 0"),
        ("EMAGrid", {"values": "0.9"}, "EMAGrid: values: 'str' instances are not allowed"),
        ("EMAGrid", {"profile": "power"}, "EMAGrid: profile: unknown key; expected one of values"),
        ("Grid", {"profile": "powers"}, "Grid: profile: Input should be 'ema', 'power', 'uniform'"),
        ("DE", {"popsiz": 3}, "DE.popsiz: no such option (did you mean 'popsize'?); it has"),
        ("CMA", {"scale": "a"}, "CMA: scale: Input should be a valid number, got 'a'"),
        ("CMA", {"elitist": "maybe"}, "CMA: elitist: Input should be a valid boolean, got 'maybe'"),
        ("DiagonalCMA", {"popsize": 2.5}, "DiagonalCMA: popsize: Input should be a valid integer, got 2.5"),
        ("PSO", {"omega": [1]}, "PSO: omega: Input should be a valid number"),
        ("DE", {"crossover": "nope"}, "DE: {'crossover': 'nope'} does not work: AssertionError"),
        ("CMA", {"step_size": "big"}, "CMA: step_size: Input should be a valid number, got 'big'"),
    ],
)
def test_unknown_optimizers_and_wrong_options_are_named_with_what_there_is(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudySpecError) as caught:
        configure(OptimizerSpec(name=name, options=options))
    assert str(caught.value).startswith(f"optimizers.{message}")
    assert "\n" not in str(caught.value)
