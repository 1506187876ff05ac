"""What begins where a study ended: forks, and refinements of its model or of the best EMA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcsc_opt.base.catalog import find
from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.paths import expanded_path
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import Candidate, Coefficients
from lcsc_opt.base.study_file import ObjectiveSpec, OptimizerSpec, check_experiment, only_one, read_studies
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.coefficients.profiles import plain_averages
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.kept_bound import KEPT_BOUND, KeptBound
from lcsc_opt.database.names import is_ours
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.database.urls import storage_url
from lcsc_opt.evaluation.base import Failure, evaluate_safely
from lcsc_opt.exports.recipe import packed_trajectory
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.search.bound import known_ema
from lcsc_opt.search.execution import Executor, objective_of
from lcsc_opt.search.held_out import DEFAULT_IMAGES, HeldOutPlan
from lcsc_opt.search.plan import CHECKPOINTS, Plan
from lcsc_opt.search.resolving import Penalty, Resolved, accepted_changes
from lcsc_opt.search.resources import read_database

if TYPE_CHECKING:  # the import loads torch
    from lcsc_opt.trajectory import Trajectory

_INHERITED = ("fingerprint", "changes", "checkpoints", KEPT_BOUND, "plane")
"""Attributes of a study that belong to its trials, and to a fork that takes these over."""


def fork(
    source: StoredStudy,
    experiment: str,
    *,
    optimizer: OptimizerSpec | None = None,
    seed: int | None = None,
    budget: int | None = None,
    checkpoints: Sequence[str] = (),
    rows: Rule | None = None,
    accept_changes: bool = False,
) -> Plan:
    """Create a study that begins where another one ended.

    The new study is called ``experiment/optimizer/seed``. On the same checkpoints it takes over every finished trial,
    without evaluating any again. These trials are told to its optimizer in their order before its first ask, and it
    starts from the best one. Losses that do not compare are told only to optimizers that follow gradients. The budget
    counts new evaluations only. Where a metric is kept, and the losses of the two studies have different penalties, the
    new study takes over no trials, and starts from the best coefficients. With ``checkpoints``, which must include
    those of the source, it takes over no trials, either, and starts from the best coefficients of the source. With
    ``rows`` every layer group begins with the coefficients that a source without rows found for all.

    Returns:
        The plan to run.

    Raises:
        StudySpecError: the source has other rows.
        StudyStoreError: the source has no complete trial, the new study exists, the objective has changed since the
            source was searched, or ``checkpoints`` lack some of the source's.
        LcscError: the new study could never be searched; nothing is stored then.
    """
    source_plan = Plan.of(source)
    plan = _forked_plan(
        source_plan,
        check_experiment(experiment),
        optimizer=optimizer,
        seed=seed,
        budget=budget,
        checkpoints=checkpoints,
        rows=rows,
    )
    if plan.name in our_studies(source.storage):
        raise StudyStoreError(f"{plan.name}: exists already; give the fork another name")
    _, origin, _ = source.chosen_trial()
    executor = Executor(source.storage, accept_changes=accept_changes)
    evidence = executor.loaded_evidence(source_plan)
    trials = read_database(source.storage).trials
    changes = accepted_changes(source.name, source.attributes, trials, evidence.fingerprint, accept=accept_changes)
    if checkpoints:
        before = packed_trajectory(executor.objective(source_plan))
        now = packed_trajectory(executor.objective(plan))
        origin = _coefficients_on(origin, before, now, source=source.name)

    resolved = executor.resolve(dataclasses.replace(plan, origin=origin.tolist()))
    source_penalty = Penalty.of(source_plan, source.attributes, keeps=evidence.keeps)
    if not checkpoints and _losses_compare(source, source_penalty, resolved):
        _create_with_trials(source, resolved, changes)
    else:
        executor.create(resolved, {"forked_from": source.name})
    return resolved.plan


def _losses_compare(source: StoredStudy, source_penalty: Penalty, resolved: Resolved) -> bool:
    """Whether a kept metric penalizes the losses of a study and of its fork, and by the same bound, or of neither.

    A notice says if they do not compare.
    """
    penalty = resolved.penalty
    if source_penalty.bound == "none" or penalty.bound == "none":
        compare = source_penalty.bound == penalty.bound
    else:
        compare = KeptBound.of(source.attributes) is not None
    if not compare:
        name = resolved.plan.name
        notice(f"{name}: starts from the best coefficients, without trials: losses of {source.name} do not compare")
    return compare


def _create_with_trials(source: StoredStudy, resolved: Resolved, changes: Mapping[str, Any]) -> None:
    """Create a fork that takes over the trials of its source, and what belongs to them.

    Args:
        source: the study with the trials.
        resolved: the fork.
        changes: attributes that the source would have if it continued now.
    """
    assert resolved.objective is not None  # the evidence was of the loaded objective
    for line in resolved.plan.advice(resolved.objective):
        notice(line)
    inherited = {name: value for name, value in source.attributes.items() if name in _INHERITED}
    attributes = {**resolved.attributes, **inherited, **changes, "forked_from": source.name}
    source.copy(resolved.plan.name, attributes)
    count = sum(trial.state.is_finished() for trial in source.trials())
    notice(f"{resolved.plan.name}: begins with the {count} trials of {source.name}; its budget counts new ones only")


def _forked_plan(
    source_plan: Plan,
    experiment: str,
    *,
    optimizer: OptimizerSpec | None,
    seed: int | None,
    budget: int | None,
    checkpoints: Sequence[str],
    rows: Rule | None,
) -> Plan:
    """The specification of a fork: the source's, but for what was given."""
    spec = source_plan.spec
    changes: dict[str, Any] = {"name": experiment}
    if checkpoints:
        changes["objective"] = _on_checkpoints(spec.objective, checkpoints)
    if rows is not None:
        if spec.space.rows not in (None, rows):
            raise StudySpecError(
                f"--rows: {source_plan.name} has a row for each of its {spec.space.rows}; leave --rows out"
            )
        changes["space"] = spec.space.model_copy(update={"rows": rows})
    if optimizer is not None:
        changes["optimizers"] = (optimizer,)
    if seed is not None:
        changes["seeds"] = (seed,)
    if budget is not None:
        changes["budget"] = spec.budget.with_total(budget)
    plan = source_plan.changed(**changes)
    configure(plan.optimizer)
    return plan


def _on_checkpoints(spec: ObjectiveSpec, patterns: Sequence[str]) -> ObjectiveSpec:
    """The objective's specification with all of these checkpoints; a selection of checkpoints is dropped."""
    if CHECKPOINTS not in spec.settings:
        raise StudySpecError(f"--checkpoints: {spec.file} has no setting {CHECKPOINTS}")
    paths: list[Any] = [str(expanded_path(pattern, error=StudySpecError).absolute()) for pattern in patterns]
    settings = {name: value for name, value in spec.settings.items() if name != "select"}
    settings[CHECKPOINTS] = paths[0] if len(paths) == 1 else paths
    return spec.model_copy(update={"settings": settings})


def _coefficients_on(coefficients: Coefficients, before: Trajectory, now: Trajectory, *, source: str) -> Coefficients:
    """Coefficients of ``before`` as coefficients of ``now``: zero for the checkpoints that are new.

    Raises:
        StudyStoreError: ``now`` lacks one of the checkpoints, or has other weights for it.
    """
    digests = dict(zip(now.rows, now.checkpoint_sha256, strict=True))
    for row, digest in zip(before.rows, before.checkpoint_sha256, strict=True):
        if digests.get(row) != digest:
            difference = "other weights" if row in digests else "no checkpoint"
            raise StudyStoreError(
                f"--checkpoints: {difference} there for {row} of {source}; give all checkpoints of that study, "
                "and later ones"
            )
    extended = np.zeros((*coefficients.shape[:-1], len(now)))
    rows_before = set(before.rows)
    extended[..., [row in rows_before for row in now.rows]] = coefficients
    return extended


def starting_point(
    source: str, storage: str | None, *, best: bool
) -> tuple[Objective, Callable[[], Coefficients], int]:
    """The objective to refine, what finds the coefficients ``[K]`` to begin with, and the images of a held-out report.

    Args:
        source: ``experiment/optimizer/seed``, or a study file.
        storage: the database's URL, if it is not the usual one.
        best: begin with the study's answer; else with EMA*, as the experiment's EMAGrid found it, or with the best
            average on the search's noise.

    Raises:
        LcscError: the study file is wrong, its objective cannot be built, there is no such study, or its objective has
            changed.
    """
    if not is_ours(source):
        if best:
            raise StudySpecError(
                "--from best: a study file has no best coefficients yet; give experiment/optimizer/seed"
            )
        path = find("studies", source)
        spec = only_one(read_studies(path), source="a refinement")
        objective = load_objective(spec.objective, study_folder=path.parent)
        images = DEFAULT_IMAGES
        if spec.held_out is not None:
            images = spec.held_out.images_with(objective.report_images)
        return objective, lambda: _best_average(objective), images
    study = StoredStudy.open(open_storage(storage_url(storage), write=False), source)
    objective = objective_of(study)
    current = {"objective": objective.describe()}
    accepted_changes(study.name, study.attributes, read_database(study.storage).trials, current, accept=False)

    def start() -> Coefficients:
        if best:
            return study.chosen_trial()[1]
        ema = known_ema(study)
        if ema is None:
            return _best_average(objective)
        return ema[1]

    return objective, start, HeldOutPlan.of(study).images


def _best_average(objective: Objective) -> Coefficients:
    """``[K]`` of the best average on the search's noise.

    Raises:
        ObjectiveError: none of the averages can be evaluated.
    """
    averages = plain_averages(objective.steps)
    losses: dict[int, float] = {}
    with progress("EMA*", len(averages)) as advance:
        for i, average in enumerate(averages):
            outcome = evaluate_safely(objective, Candidate(average))
            if not isinstance(outcome, Failure):
                losses[i] = outcome.loss
            advance(note=f"loss {min(losses.values(), default=float('nan')):.4g}")
    if not losses:
        raise ObjectiveError("no average of these checkpoints can be evaluated; `lcsc run` says why")
    return averages[min(losses, key=losses.__getitem__)]
