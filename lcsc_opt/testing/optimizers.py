"""The contract of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lcsc_opt.base.records import Coefficients, Evaluation
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.profiles import check_coefficients, default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.optimizers.registry import asks_one_at_a_time, build_optimizer, needs_gradient
from lcsc_opt.optimizers.requests import attach_evaluation, candidate_of
from lcsc_opt.testing.requiring import require

STEPS = tuple(range(100, 1300, 100))
TARGET = np.linspace(-0.6, 0.9, len(STEPS)) / np.linspace(-0.6, 0.9, len(STEPS)).sum()
LARGEST_LOSS = 1e20  # Nevergrad clips above 5e20


def check_optimizer(name: str, options: Mapping[str, Any] | None = None, *, budget: int = 60) -> None:
    """Search a quadratic function of 12 coefficients, and check what an optimizer asks.

    * Every candidate, and the recommendation, is ``[K]``, finite, and sums to one.
    * The same seed and the same losses give the same candidates, bit for bit. A search resumes by repeating them.
    * All randomness comes from the seed: numpy's global generator changes nothing, and is not changed.
    * Several candidates may be asked before the first tell, unless the optimizer says that it asks one at a time.
    * A failed evaluation, told as a very large loss, does not end the search.

    Args:
        name: in Nevergrad's registry, which includes ours.
        options: of the study file.
        budget: evaluations.

    Raises:
        AssertionError: one of these is not kept.
        StudySpecError: a candidate's coefficients are not valid, or there is no such optimizer or option.
    """
    spec = OptimizerSpec(name=name, options=dict(options or {}))
    state = _global_state()
    first = _Run(spec, budget)
    require(_global_state() == state, "draws from numpy's global generator")
    _same(first, _Run(spec, budget), "the same seed and answers gave other candidates")
    in_flight = 1 if asks_one_at_a_time(spec) else 3
    _same(
        _Run(spec, budget, in_flight=in_flight),
        _Run(spec, budget, in_flight=in_flight),
        f"{in_flight} at once: another sequence",
    )
    _Run(spec, budget, fails=True)


class _Run:
    """One search; checks each candidate as it is asked."""

    def __init__(self, spec: OptimizerSpec, budget: int, *, in_flight: int = 1, fails: bool = False) -> None:
        space = AffineSpace(STEPS, default_origin(STEPS))
        self.optimizer = build_optimizer(spec, space, budget=budget, workers=in_flight, seed=3)
        self.asked: list[Coefficients] = []
        self.losses: list[float] = []
        self._gradient = needs_gradient(spec)
        waiting: list[Any] = []
        while len(self.asked) < budget and not getattr(self.optimizer, "finished", False):
            if len(waiting) == in_flight:
                self._tell(waiting.pop(0), fails=fails and len(self.losses) % 5 == 2)
            waiting.append(self.optimizer.ask())
            self.asked.append(_checked(waiting[-1].value))
        for parameter in waiting:
            self._tell(parameter, fails=False)
        _checked(self.optimizer.recommend().value)

    def _tell(self, parameter: Any, *, fails: bool) -> None:
        candidate = candidate_of(parameter)
        loss = 1e6 if fails else min(_loss(candidate.coefficients), LARGEST_LOSS)
        gradient = 2 * (candidate.coefficients - TARGET) if self._gradient else None
        attach_evaluation(parameter, None if fails else Evaluation(loss, gradient=gradient))
        self.optimizer.tell(parameter, loss)
        self.losses.append(loss)


def _global_state() -> str:
    return str(np.random.get_state())  # noqa: NPY002 - compared, not drawn from


def _loss(coefficients: Coefficients) -> float:
    return float(np.square(coefficients - TARGET).sum()) + 1.0


def _checked(coefficients: Coefficients) -> Coefficients:
    return check_coefficients(np.array(coefficients, dtype=np.float64), len(STEPS))


def _same(first: _Run, second: _Run, broken: str) -> None:
    same = [one.tobytes() for one in first.asked] == [one.tobytes() for one in second.asked]
    require(same, broken)
