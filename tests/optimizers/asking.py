from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from lcsc_opt.base.records import Candidate, Evaluation
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.optimizers import attach_evaluation, candidate_of

STEPS = tuple(range(100, 2100, 100))
AFFINE = AffineSpace(STEPS, default_origin(STEPS))


def how(candidate: Candidate) -> dict[str, Any]:
    """How it is to be evaluated: whatever an optimizer may ask besides coefficients."""
    return {name: value for name, value in vars(candidate).items() if name != "coefficients"}


PLAIN_ASK = how(Candidate(AFFINE.origin))


def tell(optimizer: Any, candidate: Any, evaluation: Evaluation | None, loss: float | None = None) -> None:
    attach_evaluation(candidate, evaluation)
    optimizer.tell(candidate, loss if evaluation is None else evaluation.loss)


def run(
    optimizer: Any, objective: Any, count: int, *, in_flight: int = 1, failing: Callable[[int], bool] = lambda _: False
) -> list[Any]:
    """Ask and tell ``count`` candidates, ``in_flight`` of them at once; what was asked."""
    waiting: deque[Any] = deque()
    asked: list[Any] = []

    def tell_next() -> None:
        candidate = waiting.popleft()
        evaluation = None if failing(len(asked) - len(waiting)) else objective.answer(candidate)
        tell(optimizer, candidate, evaluation, loss=1e6)

    for _ in range(count):
        if len(waiting) == in_flight:
            tell_next()
        waiting.append(optimizer.ask())
        asked.append(waiting[-1])
    while waiting:
        tell_next()
    return asked


def spend(
    optimizer: Any, objective: Any, *, images: int | None, evaluations: int | None = None, in_flight: int = 1
) -> tuple[list[Candidate], int]:
    """Plan a budget, of 1000 images an evaluation, and ask until it is spent; what was asked, and what is left."""
    optimizer.plan_budget(evaluations=evaluations, images=images, images_per_evaluation=1000)
    asked, left = [], evaluations or images or 0
    while left > 0:
        asked.append(optimizer.ask())
        left -= 1 if images is None else candidate_of(asked[-1]).images or 1000
        if len(asked) >= in_flight:
            tell(optimizer, asked[-in_flight], objective.answer(asked[-in_flight]))
    return [candidate_of(parameter) for parameter in asked], left
