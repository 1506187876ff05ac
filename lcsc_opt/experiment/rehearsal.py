"""A rehearsal: one candidate, on one batch of images, by the code that a search and its report will run.

What is broken fails here, in seconds, and not after an hour: a sampler without a graph where an optimizer follows the
gradient, features that expect other channels, a missing file, too little memory. It also chooses the layout of the
network's weights, and says how long a trial and the whole run will take.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable

import numpy as np

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import HELD_OUT, SELECTION, Candidate
from lcsc_opt.evaluation.base import Failure, Outcome
from lcsc_opt.evaluation.layouts import Choice, fastest_layout
from lcsc_opt.experiment.timing import Pace
from lcsc_opt.objective.contract import Objective

SECONDS_TO_SHORTEN = 0.3  # of a trial: another layout of a shorter one is worth no measurement
_NOTICED_SECONDS = 1.0  # the first evaluation in a process takes longer than others


def rehearse(
    name: str,
    objective: Objective,
    evaluate: Callable[[Candidate], Outcome],
    first: Candidate,
    *,
    report: bool,
    chooses_layout: bool,
) -> Pace:
    """Evaluate a candidate on each noise, choose a layout, and say how long a trial will take.

    A score that seems to ignore the model that it is given is said, too.

    Args:
        name: of the experiment, for messages.
        objective: what is searched.
        evaluate: evaluates a candidate where and as often as trials will be.
        first: a candidate of a search, with its gradient if an optimizer follows it.
        report: whether results will be measured on selection and held-out noise.
        chooses_layout: whether the network's layout is still to be chosen; if not, it is the candidate's.

    Returns:
        How long each takes with as many images as a search's, and the layout in which it takes that long.

    Raises:
        ObjectiveError: the code failed, or gave no gradient where one is followed. Without a gradient, a candidate
            whose loss is not finite is passed over.
    """
    first = dataclasses.replace(first, rehearsal=True)
    plain = dataclasses.replace(first, gradient=False)
    seconds: dict[str, float] = {}
    loss = None
    choice = Choice(first.layout)
    for kind, planned in _candidates(first, plain, objective, report=report).items():
        candidate = dataclasses.replace(planned, layout=choice.layout)
        start = time.perf_counter()
        outcome = evaluate(candidate)
        if isinstance(outcome, Failure):
            if outcome.traceback or (candidate.gradient and not outcome.retry):
                raise ObjectiveError(f"{name}: {_sentence(outcome, candidate)}")
            continue  # this candidate could not be scored, which says nothing about others
        seconds[kind] = time.perf_counter() - start
        batches = 1.0
        if outcome.cost.images:
            batches = objective.samples.per_evaluation / outcome.cost.images
        if planned is first:
            loss = outcome.loss
            if chooses_layout and objective.layouts and seconds[kind] * batches >= SECONDS_TO_SHORTEN:
                choice = fastest_layout(objective, evaluate, candidate)
        if planned is first and choice.seconds is not None:
            seconds[kind] = choice.seconds
        elif outcome.cost.images:
            start = time.perf_counter()
            evaluate(candidate)  # again: only the first evaluation of a run loads networks and real images
            seconds[kind] = time.perf_counter() - start
        seconds[kind] *= batches
    if loss is not None and _ignores_the_weights(loss, plain, objective, evaluate):
        notice(
            f"{name}: the first checkpoint, the last one and the start of the search have the same loss, {loss:.4g}: "
            "does the score evaluate the model that it is given?"
        )
    trial_seconds = seconds.get("gradient", seconds.get("search", 0.0))
    if choice.layout != first.layout:
        share = f"{choice.relative_seconds:.2f} times as long"
        notice(f"{name}: the network's weights are stored {choice.layout}: sampling takes {share}")
    if trial_seconds >= _NOTICED_SECONDS:
        what_is_timed = "a trial with its gradient" if first.gradient else "a trial"
        notice(f"{name}: {what_is_timed} takes {about(trial_seconds)}")
    return Pace(**seconds, layout=choice.layout)


def _candidates(first: Candidate, plain: Candidate, objective: Objective, *, report: bool) -> dict[str, Candidate]:
    """What is evaluated, by what :class:`Pace` calls it: the search's, and the report's if there will be one.

    ``plain`` is ``first`` without its gradient.
    """
    candidates = {"gradient" if first.gradient else "search": first}
    if report and objective.why_nothing_held_out() is None:
        candidates["selection"] = dataclasses.replace(plain, noise=SELECTION)
        candidates["held_out"] = dataclasses.replace(plain, noise=HELD_OUT)
        if len(objective.samples.samplers) > 1:
            candidates["also"] = dataclasses.replace(plain, noise=HELD_OUT, sampler=1)
    return candidates


def _ignores_the_weights(
    loss: float, plain: Candidate, objective: Objective, evaluate: Callable[[Candidate], Outcome]
) -> bool:
    """Whether the first and the last checkpoint have this loss, too; the last is evaluated only if the first has it."""
    if objective.trajectory is None:
        return False
    for row in (0, -1):
        alone = np.zeros(len(objective.steps))
        alone[row] = 1.0
        outcome = evaluate(dataclasses.replace(plain, coefficients=alone))
        if isinstance(outcome, Failure) or outcome.loss != loss:
            return False
    return True


def _sentence(failure: Failure, candidate: Candidate) -> str:
    """Why the first evaluation failed, and where it was raised."""
    what = f"{candidate.noise.group} noise"
    if candidate.gradient:
        what += ", with the gradient"
    return f"the evaluation of one batch failed ({what}): {failure.reason.rstrip('.')}\n{failure.raised_at}".rstrip()


def about(seconds: float) -> str:
    """A duration, for people."""
    if seconds >= 100:
        return f"about {datetime.timedelta(seconds=round(seconds))}"
    return f"about {seconds:.2g} s"
