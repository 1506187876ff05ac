"""A rehearsal: one candidate, on one batch of images, by the code that a search and its report will run.

What is broken fails here, in seconds, and not after an hour: a sampler without a graph where an optimizer follows the
gradient, features that expect other channels, a missing file, too little memory.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import HELD_OUT, SEARCH, SELECTION, Candidate, Coefficients
from lcsc_opt.evaluation.base import Failure, Outcome
from lcsc_opt.objective.contract import Objective
from lcsc_opt.study.failure_policy import innermost_frame

_NOTICED_SECONDS = 1.0  # the first evaluation in a process takes longer than others


def rehearse(
    name: str,
    objective: Objective,
    evaluate: Callable[..., Outcome],
    coefficients: Coefficients,
    *,
    gradient: bool,
    report: bool,
) -> None:
    """Evaluate a candidate once, and say how long a trial will take.

    Args:
        name: of the experiment, for messages.
        objective: what is searched.
        evaluate: ``evaluate(candidate, gradient=…)``, where and as often as trials will be.
        coefficients: ``[K]`` or ``[S, K]``, of the candidate.
        gradient: whether an optimizer follows the gradient.
        report: whether results will be measured on selection and held-out noise.

    Raises:
        ObjectiveError: the candidate could not be evaluated.
    """
    noises = [SEARCH]
    if report and objective.why_nothing_held_out() is None:
        noises += [SELECTION, HELD_OUT]
    for noise in noises:
        candidate = Candidate(coefficients, noise=noise, rehearsal=True)
        with_gradient = gradient and noise is SEARCH
        start = time.perf_counter()
        outcome = evaluate(candidate, gradient=with_gradient)
        if isinstance(outcome, Failure):
            if outcome.traceback or (with_gradient and not outcome.retry):
                raise ObjectiveError(f"{name}: {_sentence(outcome, candidate, with_gradient)}")
            continue  # this candidate could not be scored, which says nothing about others
        if noise is SEARCH:
            seconds = time.perf_counter() - start
            if outcome.cost.images:
                seconds *= objective.samples.per_evaluation / outcome.cost.images
            _say_duration(name, seconds, gradient=gradient)


def _sentence(failure: Failure, candidate: Candidate, gradient: bool) -> str:
    """Why the first evaluation failed, and where it was raised."""
    what = f"the first evaluation on {candidate.noise.group} noise"
    if gradient:
        what += " with a gradient"
    place = "\n".join(innermost_frame(failure.traceback))
    return f"{what} failed: {failure.reason.rstrip('.')}\n{place}".rstrip()


def _say_duration(name: str, seconds: float, *, gradient: bool) -> None:
    """Print how long a trial takes, where anybody would notice."""
    if seconds < _NOTICED_SECONDS:
        return
    duration = f"{seconds:.2g} s"
    if seconds >= 100:
        duration = str(datetime.timedelta(seconds=round(seconds)))
    kind = "a trial with its gradient" if gradient else "a trial"
    notice(f"{name}: {kind} takes about {duration}")
