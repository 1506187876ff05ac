"""Optimizers that draw from global generators repeat, those that compute in a thread end, and errors are sentences."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import Any

import numpy as np
import pytest
from nevergrad.optimization.base import Optimizer

from lcsc_opt.base.study_spec import OptimizerSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.optimizers.registry import build_optimizer

STEPS = (10, 20, 30, 40)


def driver(name: str, seed: int = 0) -> Driver:
    def build() -> Optimizer:
        space = AffineSpace(STEPS, default_origin(STEPS))
        return build_optimizer(OptimizerSpec(name=name), space, budget=30, workers=1, seed=seed)

    return Driver(build, name, seed)


def asked(name: str, seed: int = 0) -> list[list[float]]:
    found = []
    with driver(name, seed) as running:
        for _ in range(30):
            candidate = running.ask()
            found.append(candidate.value.tolist())
            np.random.rand(random.randrange(4) + 1)  # noqa: NPY002 - as a score may
            running.tell(candidate, float(np.sum(candidate.value**2)))
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["CmaFmin2", "LognormalDiscreteOnePlusOne", "DSproba", "Powell", "CMA"])
def test_the_seed_alone_decides_the_candidates(name: str) -> None:
    np.random.seed(1)  # noqa: NPY002
    first = asked(name)
    np.random.seed(2)  # noqa: NPY002
    random.seed(2)
    assert asked(name) == first
    assert asked(name, seed=1) != first or name == "Powell"


def test_the_caller_s_generators_go_on_as_if_nobody_had_drawn() -> None:
    def drawn(between: Any) -> list[float]:
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        first = [np.random.rand(), random.random()]  # noqa: NPY002
        between()
        return [*first, np.random.rand(), random.random()]  # noqa: NPY002

    def search() -> None:
        with driver("LognormalDiscreteOnePlusOne") as running:
            candidate = running.ask()
            running.tell(candidate, 1.0)

    assert drawn(search) == drawn(lambda: None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["Powell", "Cobyla", "CmaFmin2"])
@pytest.mark.parametrize("tells", [0, 3])
def test_no_thread_outlives_it(name: str, tells: int) -> None:
    before = set(threading.enumerate())
    with contextlib.suppress(KeyError), driver(name) as running:
        for _ in range(tells):
            running.tell(running.ask(), 1.0)
        running.ask()
        started = set(threading.enumerate()) - before
        assert started
        raise KeyError("of a callback")
    for thread in started:
        thread.join(10)
    alive: list[Any] = [thread for thread in started if thread.is_alive()]
    for thread in alive:
        thread.stop()  # or the tests would not end
    assert not alive
