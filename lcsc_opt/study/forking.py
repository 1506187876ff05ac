"""Forks: studies that start at the best coefficients of another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.paths import expanded_path
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.study_file import ObjectiveSpec, OptimizerSpec, check_experiment
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.database.kept_bound import KEPT_BOUND
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.exports.recipe import packed_trajectory
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.study.comparison import accepted_changes
from lcsc_opt.study.plan import CHECKPOINTS, Plan
from lcsc_opt.study.resources import ObjectiveLoader, fingerprint_of, read_trials

if TYPE_CHECKING:  # the import loads torch
    from lcsc_opt.trajectory import Trajectory


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
    objectives: ObjectiveLoader,
) -> Plan:
    """The plan of a study that starts at the best coefficients of another one.

    The new study is called ``experiment/optimizer/seed``; it has the bound of a kept metric from its source. With
    ``checkpoints``, which must include those of the source, it searches these, and the bound is that of the new
    experiment's EMA grid. With ``rows`` every layer group begins with the coefficients that a source without rows found
    for all. ``objectives`` keeps the objective that was loaded for this.

    Raises:
        StudySpecError: the source has other rows.
        StudyStoreError: the source has no complete trial, the new study exists, the objective has changed since the
            source was searched, or ``checkpoints`` lack some of the source's.
        LcscError: the objective cannot be loaded.
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
    studies = our_studies(source.storage)
    objective = objectives.load(source_plan, studies)
    accepted_changes(
        source.name,
        source.attributes,
        lambda name: read_trials(source.storage, name),
        fingerprint_of(objective),
        accept=accept_changes,
    )
    further: dict[str, Any] = {"forked_from": source.name}
    if checkpoints:
        before = packed_trajectory(objective)
        now = packed_trajectory(objectives.load(plan, studies))
        origin = _coefficients_on(origin, before, now, source=source.name)
    elif not plan.is_grid:
        further[KEPT_BOUND] = source.attributes.get(KEPT_BOUND)
    return dataclasses.replace(plan, origin=origin.tolist(), further=further)


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
