"""The final choice: the best trials again, on noise that the search never saw.

A search on one group of noise overfits it a little, and the best of several values flatters itself. So the ``top``
trials of the search are scored on the *selection* noise, and the best of these is reported on the *held-out*
noise, which decided nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.errors import SearchFailedError, StudyStoreError
from lcsc_opt.evaluation import Failure, evaluate_safely
from lcsc_opt.objective import Objective
from lcsc_opt.progress import progress
from lcsc_opt.records import HELD_OUT, SELECTION, Candidate, Evaluation, Noise
from lcsc_opt.study_store import StoredStudy, TrialKey


def best_trials(trials: Sequence[FrozenTrial], top: int) -> list[FrozenTrial]:
    """The ``top`` complete trials of lowest loss with different coefficients, the best first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    distinct: dict[tuple[float, ...], FrozenTrial] = {}
    for trial in sorted(complete, key=lambda trial: (trial.value, trial.number)):
        distinct.setdefault(tuple(trial.user_attrs["coefficients"]), trial)
    return list(distinct.values())[:top]


def score_held_out(study: StoredStudy, objective: Objective, *, images: int, top: int) -> dict[str, Any]:
    """Choose among the best ``top`` trials and report the chosen one; write both into the database.

    Args:
        study: its trials get ``selection``, the chosen one and the study get ``held_out``.
        objective: evaluates.
        images: how many, for each trial.
        top: how many of the best trials.

    Returns:
        What the study's ``held_out`` attribute then is: ``trial``, ``loss``, ``metrics``, ``images``, ``chosen_from``.

    Raises:
        StudyStoreError: when no trial is complete.
        SearchFailedError: when none of them can be evaluated.
    """
    trials = best_trials(study.trials(), top)
    if not trials:
        raise StudyStoreError(f"{study.name}: no complete trial to evaluate; run it first")
    with progress(f"{study.name} held out", len(trials) + 1) as advance:
        scored: list[tuple[float, FrozenTrial]] = []
        for trial in trials:
            result = _evaluate(study, objective, trial, SELECTION, images)
            scored.append((result["loss"], trial))
            advance()
        chosen = min(scored, key=lambda pair: (pair[0], pair[1].number))[1]
        reported = _evaluate(study, objective, chosen, HELD_OUT, images)
        advance(note=f"{reported['loss']:.4g}")
    report = {"trial": chosen.number, **reported, "chosen_from": [trial.number for trial in trials]}
    study.set_attribute("held_out", report)
    return report


def _evaluate(
    study: StoredStudy, objective: Objective, trial: FrozenTrial, noise: Noise, images: int
) -> dict[str, Any]:
    attribute = noise.group.replace("-", "_")
    known = trial.user_attrs.get(attribute)
    if known is not None and known["images"] == images:
        return dict(known)
    coefficients = np.array(trial.user_attrs["coefficients"], dtype=np.float64)
    outcome = evaluate_safely(objective, Candidate(coefficients, images=images, noise=noise))
    if isinstance(outcome, Failure):
        raise SearchFailedError(f"{study.name}: trial {trial.number} on {noise.group} noise: {outcome.reason}")
    result = _result(outcome, images)
    study.annotate(TrialKey.of(trial), {attribute: result})
    return result


def _result(evaluation: Evaluation, images: int) -> dict[str, Any]:
    return {"loss": evaluation.loss, "metrics": dict(evaluation.metrics), "images": images}
