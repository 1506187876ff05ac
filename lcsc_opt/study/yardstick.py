"""What losses are relative to: one average of the checkpoints, measured once on each noise.

It is stored with the study and serves the whole experiment. On the noise of a report, too, the average has a loss of 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lcsc_opt.base.errors import LcscError, ObjectiveError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import SEARCH, Candidate, Noise, Yardstick
from lcsc_opt.database.names import split_name
from lcsc_opt.database.report import YARDSTICKS, sample_key
from lcsc_opt.database.siblings import siblings
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Failure, Outcome
from lcsc_opt.objective.contract import Objective


def yardstick_on(
    noise: Noise,
    study: StoredStudy,
    objective: Objective,
    evaluate: Callable[[Candidate], Outcome],
    *,
    images: int = 0,
    sampler: int = 0,
) -> Yardstick | None:
    """The yardstick of the study's experiment, measured if nobody has yet; ``None`` where losses are absolute.

    It is stored with the study. If it was measured on the search's noise, a notice says its metrics.

    Args:
        noise: the group that it is measured on.
        study: the study that something is measured for.
        objective: of the study.
        evaluate: evaluates one candidate.
        images: how many; 0 for as many as an evaluation of the search has.
        sampler: which of the objective's samplers makes them; searches use the first.

    Raises:
        ObjectiveError: it cannot be measured, or nothing can be relative to it.
    """
    average = objective.fixed_average
    if average is None:
        return None
    title = objective.samples.samplers[sampler] if sampler else None  # keys leave out the first sampler
    key = sample_key(images or objective.samples.per_evaluation, noise, title)
    stored = _stored(study, key)
    if stored is None:
        candidate = Candidate(average, images=images or None, noise=noise, sampler=sampler)
        stored = dataclasses.asdict(_measured(candidate, objective, evaluate))
        if noise == SEARCH:
            values = ", ".join(f"{name} {value:.4g}" for name, value in stored["metrics"].items())
            notice(f"{split_name(study.name)[0]}: losses are relative to an average of the checkpoints: {values}")
    if key not in _known(study.attributes):
        study.set_attribute(YARDSTICKS, {**_known(study.attributes), key: stored})
    return Yardstick(**stored)


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    """What a study has stored: the key of the sample → the fields of its yardstick."""
    return attributes.get(YARDSTICKS) or {}


def _stored(study: StoredStudy, key: str) -> dict[str, Any] | None:
    """The fields of the yardstick that the study or a sibling of it has stored; ``None`` if nobody has yet."""
    for attributes in (study.attributes, *siblings(study).values()):
        if key in _known(attributes):
            yardstick: dict[str, Any] = _known(attributes)[key]
            return yardstick
    return None


def _measured(candidate: Candidate, objective: Objective, evaluate: Callable[[Candidate], Outcome]) -> Yardstick:
    """The yardstick from the average's evaluation; raises as :func:`yardstick_on`."""
    outcome = evaluate(candidate)
    reason = ""
    if isinstance(outcome, Failure):
        reason = outcome.reason
    else:
        try:
            return objective.yardstick(outcome)
        except LcscError as error:
            reason = str(error)
    raise ObjectiveError(
        f"the loss is relative to an average of the checkpoints, and this average cannot be scored: {reason}; "
        "use loss: fid, or leave out the checkpoints that cannot sample"
    )
