"""Which layout of the network's weights is the faster one: measured before a search, and the same for all candidates.

It depends on the network, the processor and whether gradients are computed, and nobody can know it in advance.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from lcsc_opt.base.records import CONTIGUOUS, Candidate, Cost, Evaluation
from lcsc_opt.evaluation.base import Evaluator, Outcome
from lcsc_opt.objective.contract import Objective

ROUNDS = 5
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

    Each round costs as much as a trial in every layout, so two in a row with the same clear winner are enough. A layout
    in which the candidate fails, or has another loss, is not chosen.

    Args:
        objective: offers the layouts.
        evaluate: evaluates a candidate where trials will be evaluated.
        candidate: has been evaluated before, in the contiguous layout.
    """
    whole: dict[str, float] = {}  # layout → the shortest seconds of an evaluation
    sampling: dict[str, float] = {}  # of sampling alone
    losses: dict[str, float] = {}
    winner: str | None = None
    layouts = list(objective.layouts)
    begin = time.perf_counter()
    for layout in layouts:  # the first evaluation in a layout takes longer
        if layout != CONTIGUOUS and not isinstance(evaluate(dataclasses.replace(candidate, layout=layout)), Evaluation):
            return Choice()
    for number in range(ROUNDS):
        if number > 0 and time.perf_counter() - begin > MOST_SECONDS:
            break
        sampling_now: dict[str, float] = {}
        for layout in layouts:
            start = time.perf_counter()
            outcome = evaluate(dataclasses.replace(candidate, layout=layout))
            if not isinstance(outcome, Evaluation):
                return Choice()
            whole[layout] = min(whole.get(layout, math.inf), time.perf_counter() - start)
            losses[layout] = outcome.loss
            sampling_now[layout] = _sampling_seconds(outcome.cost)
        layouts.reverse()  # workers that take turns get both
        for layout, seconds in sampling_now.items():
            sampling[layout] = min(sampling.get(layout, math.inf), seconds)
        winner_before, winner = winner, _clear_winner(sampling_now)
        if winner is not None and winner == winner_before:
            break
    for layout, seconds in sampling.items():
        relative = seconds / sampling[CONTIGUOUS]
        if relative < WORTH and math.isclose(losses[layout], losses[CONTIGUOUS], rel_tol=SAME_LOSS):
            return Choice(layout, relative, whole[layout])
    return Choice(seconds=whole[CONTIGUOUS])


def _clear_winner(seconds: Mapping[str, float]) -> str | None:
    """The layout that is clearly faster than all others in one round; ``None`` if there is none."""
    fastest, *others = sorted(seconds, key=lambda layout: seconds[layout])
    is_clear = all(seconds[fastest] < WORTH * seconds[other] for other in others)
    return fastest if is_clear else None


def _sampling_seconds(cost: Cost) -> float:
    """Without what no layout changes. Of a gradient on a device, a part may be waited for in the merge."""
    return cost.seconds - cost.features_seconds - cost.metric_seconds


class InLayout:
    """Evaluates every candidate in one layout.

    Args:
        evaluator: evaluates it.
        layout: one of the objective's.
    """

    def __init__(self, evaluator: Evaluator, layout: str) -> None:
        self._evaluator = evaluator
        self._layout = layout

    def submit(self, candidate: Candidate) -> Future[Outcome]:
        """Start an evaluation in the layout."""
        return self._evaluator.submit(dataclasses.replace(candidate, layout=self._layout))

    def close(self) -> None:
        """Close the evaluator."""
        self._evaluator.close()
