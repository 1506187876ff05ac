"""What begins where a study ended: forks, and refinements of its model or of the best EMA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcsc_opt.base.catalog import find
from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import Candidate, Coefficients
from lcsc_opt.base.study_file import ObjectiveSpec, OptimizerSpec, check_experiment, only_one, read_studies
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.coefficients.profiles import plain_averages
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.history import NODES
from lcsc_opt.database.kept_bound import KEPT_BOUND, KeptBound
from lcsc_opt.database.names import BASELINES, HOLDER, LOGGED, is_ours, split_name
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.database.summary import SUMMARY
from lcsc_opt.database.urls import storage_url
from lcsc_opt.evaluation.base import Failure, evaluate_safely
from lcsc_opt.exports.recipe import packed_trajectory
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.search.execution import Executor, objective_of
from lcsc_opt.search.failure_policy import ACCEPTED_FAILURES
from lcsc_opt.search.held_out import DEFAULT_IMAGES, HeldOutPlan, known_ema
from lcsc_opt.search.plan import CHECKPOINTS, Plan
from lcsc_opt.search.resolving import accepted_changes
from lcsc_opt.search.resources import read_database

if TYPE_CHECKING:  # the import loads torch
    from lcsc_opt.trajectory import Trajectory

# attributes of the source that a fork does not begin with
_NOT_INHERITED = ("search_ended", "held_out", NODES, HOLDER, LOGGED, SUMMARY, "measured", "retry", ACCEPTED_FAILURES)


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
    origin = source.chosen_trial()[1]
    executor = Executor(source.storage, accept_changes=accept_changes)
    source_objective = executor.objective(source_plan)
    changes = accepted_changes(
        source.name,
        source.attributes,
        read_database(source.storage).trials,
        executor.fingerprint(source_plan),
        accept=accept_changes,
    )
    if checkpoints:
        before = packed_trajectory(source_objective)
        now = packed_trajectory(executor.objective(plan))
        plan = dataclasses.replace(plan, origin=_coefficients_on(origin, before, now, source=source.name))
        executor.create(executor.resolve(plan), {"forked_from": source.name})
        return plan
    plan = dataclasses.replace(plan, origin=origin.tolist())
    resolved = executor.resolve(plan)
    if source_objective.images_for_bound and not _have_same_penalty(source, plan):
        notice(
            f"{plan.name}: starts from the best coefficients, without trials: losses of {source.name} do not compare"
        )
        executor.create(resolved, {"forked_from": source.name})
        return plan
    for line in resolved.notices:
        notice(line)
    attributes = {**source.attributes, **changes}
    attributes |= plan.following
    attributes |= plan.beginning(executor.objective(plan))
    attributes |= dict.fromkeys(_NOT_INHERITED)
    attributes["forked_from"] = source.name
    attributes.setdefault(KEPT_BOUND, None)  # a grid of 0.2.0 lacks it; the fork's losses have no penalty
    source.copy(plan.name, attributes)
    taken_over = sum(trial.state.is_finished() for trial in source.trials())
    notice(f"{plan.name}: begins with the {taken_over} trials of {source.name}; its budget counts new ones only")
    return plan


def _have_same_penalty(source: StoredStudy, fork: Plan) -> bool:
    """Whether a kept metric is bounded in the losses of both studies, and by the same EMA*, or in none of them.

    Only grids have no penalty. Studies of 0.2.0 have one, but no stored EMA*.
    """
    source_is_grid = split_name(source.name)[1] in BASELINES
    fork_is_grid = fork.optimizer.name in BASELINES
    if source_is_grid or fork_is_grid:
        return source_is_grid and fork_is_grid
    return KeptBound.of(source.attributes) is not None


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
    paths: list[Any] = [str(Path(pattern).expanduser().absolute()) for pattern in patterns]
    settings = {name: value for name, value in spec.settings.items() if name != "select"}
    settings[CHECKPOINTS] = paths[0] if len(paths) == 1 else paths
    return spec.model_copy(update={"settings": settings})


def _coefficients_on(coefficients: Coefficients, before: Trajectory, now: Trajectory, *, source: str) -> list[Any]:
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
    extended[..., np.isin(now.steps, before.steps)] = coefficients
    listed: list[Any] = extended.tolist()
    return listed


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
        images = DEFAULT_IMAGES if spec.held_out is None else spec.held_out.images
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
