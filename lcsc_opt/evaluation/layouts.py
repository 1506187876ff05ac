"""Which layout of the network's weights is the faster one: measured before a search, and the same for all candidates.

It depends on the network, the processor and whether gradients are computed, and nobody can know it in advance.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
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


@dataclasses.dataclass(frozen=True)
class _Timed:
    """One evaluation in a layout: its loss, its seconds, and those of sampling alone."""

    loss: float
    seconds: float
    sampling_seconds: float


def fastest_layout(objective: Objective, evaluate: Callable[[Candidate], Outcome], candidate: Candidate) -> Choice:
    """Evaluate a candidate in all layouts in turns, and choose. Noise adds time: the shortest of each counts.

    Each round costs as much as a trial in every layout, so two in a row with the same clear winner are enough. A layout
    in which the candidate fails, or has another loss, is not chosen.

    Args:
        objective: offers the layouts.
        evaluate: evaluates a candidate where trials will be evaluated.
        candidate: has been evaluated before, in the contiguous layout.
    """
    layouts = list(objective.layouts)
    rounds: list[dict[str, _Timed]] = []
    winner: str | None = None  # of the last round
    begin = time.perf_counter()
    for layout in layouts:
        is_warm = layout == CONTIGUOUS
        if not is_warm and _timed(evaluate, candidate, layout) is None:  # the first evaluation in a layout takes longer
            return Choice()
    for number in range(ROUNDS):
        if number > 0 and time.perf_counter() - begin > MOST_SECONDS:
            break
        timed_now: dict[str, _Timed] = {}
        for layout in layouts:
            timed = _timed(evaluate, candidate, layout)
            if timed is None:
                return Choice()
            timed_now[layout] = timed
        layouts.reverse()  # workers that take turns get both
        rounds.append(timed_now)
        winner_before = winner
        winner = _clear_winner(timed_now)
        if winner is not None and winner == winner_before:
            break
    return _choice(rounds)


def _timed(evaluate: Callable[[Candidate], Outcome], candidate: Candidate, layout: str) -> _Timed | None:
    """Evaluate the candidate in a layout; ``None`` if that fails."""
    start = time.perf_counter()
    outcome = evaluate(dataclasses.replace(candidate, layout=layout))
    if not isinstance(outcome, Evaluation):
        return None
    return _Timed(outcome.loss, time.perf_counter() - start, _sampling_seconds(outcome.cost))


def _choice(rounds: Sequence[Mapping[str, _Timed]]) -> Choice:
    """The layout whose shortest sampling is worth it and whose loss is the same; else the contiguous one."""
    loss = rounds[-1][CONTIGUOUS].loss
    contiguous_seconds = min(each[CONTIGUOUS].sampling_seconds for each in rounds)
    for layout in rounds[0]:
        relative = min(each[layout].sampling_seconds for each in rounds) / contiguous_seconds
        has_same_loss = math.isclose(rounds[-1][layout].loss, loss, rel_tol=SAME_LOSS)
        if relative < WORTH and has_same_loss:
            return Choice(layout, relative, min(each[layout].seconds for each in rounds))
    return Choice(seconds=min(each[CONTIGUOUS].seconds for each in rounds))


def _clear_winner(timed: Mapping[str, _Timed]) -> str | None:
    """The layout in which sampling is clearly faster than in all others in one round; ``None`` if there is none."""
    fastest, *others = sorted(timed, key=lambda layout: timed[layout].sampling_seconds)
    most = WORTH * min((timed[other].sampling_seconds for other in others), default=math.inf)
    return fastest if timed[fastest].sampling_seconds < most else None


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
