"""The final choice: the best trials again, on noise that the search never saw.

A search on one group of noise overfits it a little, and the best of several values flatters itself. So the ``top``
trials of the search are scored on the *selection* noise, and the best of these is reported on the *held-out*
noise, which decided nothing: on one group of it, or on several, whose spread says how far the number can be trusted.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.analysis.comparison import BASELINES, best_ema, is_ours, split_name, summarize
from lcsc_opt.coefficients import default_origin
from lcsc_opt.errors import SearchFailedError, StudyStoreError
from lcsc_opt.evaluation import Failure, evaluate_safely
from lcsc_opt.objective import Objective
from lcsc_opt.progress import notice, progress
from lcsc_opt.records import HELD_OUT, SELECTION, Candidate, Coefficients, Evaluation, Noise
from lcsc_opt.study_spec import HeldOutSpec
from lcsc_opt.study_store import StoredStudy, TrialKey, study_names

DEFAULT_IMAGES = 50_000  # what FID is reported on (Liu et al. 2024, Section 5.1)
DEFAULT_TOP = 5
EMA = "EMA*"
LAST = "last checkpoint"
DEFAULT_EMA = "default EMA"

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class HeldOutPlan:
    """How a study's answer is measured.

    Attributes:
        images: for each trial and group of noise.
        top: of how many of the best trials the answer is chosen.
        groups: of held-out noise.
        first_group: the seed of the first of them; the others follow.
        baselines: whether EMA* is measured on the same noise, too.
    """

    images: int = DEFAULT_IMAGES
    top: int = DEFAULT_TOP
    groups: int = 1
    first_group: int = 0
    baselines: bool = False

    @classmethod
    def of(
        cls,
        spec: HeldOutSpec | None,
        *,
        images: int | None = None,
        top: int | None = None,
        groups: int = 1,
        first_group: int = 0,
    ) -> HeldOutPlan:
        """What ``lcsc evaluate`` was asked for; what it was not is the study file's, else the default."""
        stored = HeldOutSpec(images=DEFAULT_IMAGES, top=DEFAULT_TOP) if spec is None else spec
        return cls(images or stored.images, top or stored.top, groups, first_group, baselines=True)

    @property
    def noises(self) -> list[Noise]:
        """The groups of held-out noise."""
        return [Noise(HELD_OUT.group, self.first_group + group) for group in range(self.groups)]


def best_trials(trials: Sequence[FrozenTrial], top: int) -> list[FrozenTrial]:
    """The ``top`` complete trials of lowest loss with different coefficients, the best first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    distinct: dict[tuple[float, ...], FrozenTrial] = {}
    for trial in sorted(complete, key=lambda trial: (trial.value, trial.number)):
        distinct.setdefault(tuple(trial.user_attrs["coefficients"]), trial)
    return list(distinct.values())[:top]


def score_held_out(study: StoredStudy, objective: Objective, plan: HeldOutPlan) -> Report:
    """Choose among the best trials and report the chosen one; write both into the database.

    What an earlier call has measured with as many images, an interrupted one too, is not measured again.

    Args:
        study: its trials get ``selection``, the chosen one and the study get ``held_out``.
        objective: evaluates.
        plan: with how many images, on which noise.

    Returns:
        What the study's ``held_out`` attribute then is: ``trial``, ``loss``, ``metrics``, ``images``, ``groups`` (each
        with its ``seed``, ``loss`` and ``metrics``), ``chosen_from``; of several groups ``loss`` and ``metrics`` are
        means, and ``loss_std`` and ``metrics_std`` their sample standard deviations. With baselines, ``baselines``:
        name → ``loss``, ``metrics``, … and where it is from.

    Raises:
        StudyStoreError: when no trial is complete.
        SearchFailedError: when one of them cannot be evaluated.
    """
    trials = best_trials(study.trials(), plan.top)
    if not trials:
        raise StudyStoreError(f"{study.name}: no complete trial to evaluate; run it first")
    baselines = _baselines(study, objective) if plan.baselines else []
    with progress(f"{study.name} held out", len(trials) + plan.groups * (1 + len(baselines))) as advance:
        scored: list[tuple[float, FrozenTrial]] = []
        for trial in trials:
            scored.append((_selection_loss(study, objective, trial, plan.images), trial))
            advance()
        chosen = min(scored, key=lambda pair: (pair[0], pair[1].number))[1]
        reported = _held_out(study, objective, chosen, plan, advance)
        report = {"trial": chosen.number, **reported, "chosen_from": [trial.number for trial in trials]}
        study.set_attribute("held_out", report)
        if baselines:
            measured = {baseline.name: _measure_baseline(objective, baseline, plan, advance) for baseline in baselines}
            report["baselines"] = {name: result for name, result in measured.items() if result is not None}
            study.set_attribute("held_out", report)
    return report


def _selection_loss(study: StoredStudy, objective: Objective, trial: FrozenTrial, images: int) -> float:
    known = trial.user_attrs.get(SELECTION.group)
    if known is None or known["images"] != images:
        evaluation = _evaluate(
            objective, _coefficients(trial), SELECTION, images, f"{study.name}: trial {trial.number}"
        )
        known = {**_numbers(evaluation), "images": images}
        study.annotate(TrialKey.of(trial), {SELECTION.group: known})
    return float(known["loss"])


def _held_out(
    study: StoredStudy, objective: Objective, trial: FrozenTrial, plan: HeldOutPlan, advance: Callable[..., None]
) -> Report:
    """Every group of a trial; each is written as soon as it is known."""
    groups = _known_groups(trial.user_attrs.get("held_out"), plan.images)
    for noise in plan.noises:
        if noise.seed not in groups:
            where = f"{study.name}: trial {trial.number}"
            groups[noise.seed] = _numbers(_evaluate(objective, _coefficients(trial), noise, plan.images, where))
            study.annotate(TrialKey.of(trial), {"held_out": _summary(groups, plan.images)})
        advance(note=f"{groups[noise.seed]['loss']:.4g}")
    return _summary({noise.seed: groups[noise.seed] for noise in plan.noises}, plan.images)


def _known_groups(stored: Any, images: int) -> dict[int, Report]:
    """Seed → what was measured already with so many images. Before there were groups, seed 0 was the only one."""
    if not stored or stored["images"] != images:
        return {}
    listed = stored.get("groups") or [{"seed": HELD_OUT.seed, "loss": stored["loss"], "metrics": stored["metrics"]}]
    return {group["seed"]: {"loss": group["loss"], "metrics": group["metrics"]} for group in listed}


def _evaluate(objective: Objective, coefficients: Coefficients, noise: Noise, images: int, where: str) -> Evaluation:
    outcome = evaluate_safely(objective, Candidate(coefficients, images=images, noise=noise))
    if isinstance(outcome, Failure):
        raise SearchFailedError(f"{where} on {noise.group} noise: {outcome.reason}")
    return outcome


def _coefficients(trial: FrozenTrial) -> Coefficients:
    return np.array(trial.user_attrs["coefficients"], dtype=np.float64)


def _numbers(evaluation: Evaluation) -> Report:
    return {"loss": evaluation.loss, "metrics": dict(evaluation.metrics)}


def _summary(groups: Mapping[int, Report], images: int) -> Report:
    """Mean and spread over groups of noise; a single group's own numbers."""
    results = [groups[seed] for seed in sorted(groups)]
    names = [name for name in results[0]["metrics"] if all(name in result["metrics"] for result in results)]
    columns = {name: [result["metrics"][name] for result in results] for name in names}
    losses = [result["loss"] for result in results]
    summary = {
        "loss": statistics.fmean(losses),
        "metrics": {name: statistics.fmean(values) for name, values in columns.items()},
        "images": images,
        "groups": [{"seed": seed, **groups[seed]} for seed in sorted(groups)],
    }
    if len(results) > 1:
        summary["loss_std"] = statistics.stdev(losses)
        summary["metrics_std"] = {name: statistics.stdev(values) for name, values in columns.items()}
    return summary


@dataclasses.dataclass(frozen=True, eq=False)
class _Baseline:
    """What the answer is compared with: its coefficients, where they are from, and what is known of them."""

    name: str
    coefficients: Coefficients
    origin: Report
    stored: Any = None


def _baselines(study: StoredStudy, objective: Objective) -> list[_Baseline]:
    """EMA* of the same experiment; where there is no EMA grid, the last checkpoint and a default EMA."""
    experiment, optimizer, _ = split_name(study.name)
    if BASELINES.get(optimizer) == EMA:
        return []
    fingerprint = (study.attributes.get("fingerprint") or {}).get("objective")
    names = [name for name in study_names(study.storage) if is_ours(name) and split_name(name)[0] == experiment]
    opened = {name: StoredStudy.open(study.storage, name) for name in names}
    grids = [
        summarize(other)
        for name, other in opened.items()
        if BASELINES.get(split_name(name)[1]) == EMA
        and (other.attributes.get("fingerprint") or {}).get("objective") == fingerprint
    ]
    ema = best_ema(grids)
    if ema is not None and ema.best_coefficients is not None:
        [trial] = [trial for trial in opened[ema.study].trials() if trial.number == ema.best_trial]
        origin = {"study": ema.study, "trial": trial.number}
        return [_Baseline(EMA, ema.best_coefficients, origin, trial.user_attrs.get("held_out"))]
    notice(
        f"{experiment} has no EMAGrid study of the same objective, so EMA* is not known: the last checkpoint and one "
        "EMA are measured instead; for EMA* run the study file with --optimizer EMAGrid"
    )
    last = np.eye(len(objective.steps))[-1]
    return [_Baseline(LAST, last, {}), _Baseline(DEFAULT_EMA, default_origin(objective.steps), {})]


def _measure_baseline(
    objective: Objective, baseline: _Baseline, plan: HeldOutPlan, advance: Callable[..., None]
) -> Report | None:
    """On the same noise as the answer; ``None``, and a line about it, where it cannot be evaluated."""
    groups = _known_groups(baseline.stored, plan.images)
    try:
        for noise in plan.noises:
            if noise.seed not in groups:
                evaluation = _evaluate(objective, baseline.coefficients, noise, plan.images, baseline.name)
                groups[noise.seed] = _numbers(evaluation)
            advance()
    except SearchFailedError as error:
        notice(f"{error}; it is left out")
        return None
    return {**baseline.origin, **_summary({noise.seed: groups[noise.seed] for noise in plan.noises}, plan.images)}
