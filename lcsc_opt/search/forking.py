"""Forks: studies that begin where another one ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.paths import expanded_path
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.study_file import ObjectiveSpec, OptimizerSpec, check_experiment
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.database.kept_bound import KEPT_BOUND, KeptBound
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.exports.recipe import packed_trajectory
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.search.execution import Executor
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
    digests = dict(zip(now.steps, now.checkpoint_sha256, strict=True))
    for step, digest in zip(before.steps, before.checkpoint_sha256, strict=True):
        if digests.get(step) != digest:
            difference = "other weights" if step in digests else "no checkpoint"
            raise StudyStoreError(
                f"--checkpoints: {difference} there for step {step} of {source}; give all checkpoints of that study, "
                "and later ones"
            )
    extended = np.zeros((*coefficients.shape[:-1], len(now)))
    steps_before = set(before.steps)
    extended[..., [step in steps_before for step in now.steps]] = coefficients
    return extended
