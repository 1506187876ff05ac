from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from lcsc_opt.base.records import Evaluation
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace
from lcsc_opt.optimizers import attach_evaluation

STEPS = tuple(range(100, 2100, 100))
AFFINE = AffineSpace(STEPS, default_origin(STEPS))


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
