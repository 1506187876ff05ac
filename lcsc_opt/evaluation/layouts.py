"""Which layout of the network's weights is the faster one: measured before a search, and the same for all candidates.

It depends on the network, the processor and whether gradients are computed, and nobody can know it in advance.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

from lcsc_opt.base.records import CONTIGUOUS, Candidate, Cost, Evaluation
from lcsc_opt.evaluation.base import Outcome
from lcsc_opt.objective.contract import Objective

ROUNDS = 3
MOST_SECONDS = 10.0  # no new round begins after that
WORTH = 0.95  # of the time; what gains less stays contiguous
SAME_LOSS = 0.01  # relative: in another layout the loss differs in its last bits


@dataclasses.dataclass(frozen=True)
class Choice:
    """A layout.

    Attributes:
        layout: its name.
        relative_seconds: the time of sampling in it, relative to that in the contiguous one.
        seconds: of a whole evaluation in it; ``None`` where nothing was compared.
    """

    layout: str = CONTIGUOUS
    relative_seconds: float = 1.0
    seconds: float | None = None


def fastest_layout(objective: Objective, evaluate: Callable[[Candidate], Outcome], candidate: Candidate) -> Choice:
    """Evaluate a candidate in all layouts in turns, and choose. Noise adds time: the shortest of each counts.

    A layout in which the candidate fails, or has another loss, is not chosen.

    Args:
        objective: offers the layouts.
        evaluate: evaluates a candidate where trials will be evaluated.
        candidate: is evaluated in each round, in each layout.
    """
    layouts = list(objective.layouts)
    losses: dict[str, float] = {}
    seconds = dict.fromkeys(layouts, math.inf)
    sampling_seconds = dict.fromkeys(layouts, math.inf)
    begin = time.perf_counter()
    for number in range(1 + ROUNDS):
        if number > 1 and time.perf_counter() - begin > MOST_SECONDS:
            break
        for layout in layouts:
            start = time.perf_counter()
            outcome = evaluate(dataclasses.replace(candidate, layout=layout))
            if not isinstance(outcome, Evaluation):
                return Choice()
            losses[layout] = outcome.loss
            if number > 0:  # the first evaluation in a layout takes longer
                seconds[layout] = min(seconds[layout], time.perf_counter() - start)
                sampling_seconds[layout] = min(sampling_seconds[layout], _sampling_seconds(outcome.cost))
        layouts.reverse()  # workers that take turns get both
    fastest = min(layouts, key=lambda layout: sampling_seconds[layout])
    relative = sampling_seconds[fastest] / sampling_seconds[CONTIGUOUS]
    if relative < WORTH and math.isclose(losses[fastest], losses[CONTIGUOUS], rel_tol=SAME_LOSS):
        return Choice(fastest, relative, seconds[fastest])
    return Choice(seconds=seconds[CONTIGUOUS])


def _sampling_seconds(cost: Cost) -> float:
    """Without what no layout changes. Of a gradient on a device, a part may be waited for in the merge."""
    return cost.seconds - cost.features_seconds - cost.metric_seconds
