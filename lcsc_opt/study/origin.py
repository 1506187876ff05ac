"""Where a new search begins: at the answer of a stored study, its ``start`` or the experiment's EMA grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.database.names import is_ranked, split_name
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.trajectory import Trajectory


def ended_grid(experiment: str, studies: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The name of the experiment's first EMA grid that has ended, whose answer is EMA*; ``None`` if none has."""
    for name in filter(is_ranked, studies):
        is_grid = split_name(name)[:2] == (experiment, EMA_GRID)
        if is_grid and studies[name].get("search_ended") is not None:
            return name
    return None


def origin_at(source: StoredStudy, objective: Objective, rows: Rule | None) -> Coefficients:
    """``[K]`` or ``[S, K]``: the coefficients of the source's answer, zero for checkpoints that the source lacks.

    Args:
        source: the study at whose answer the new one begins.
        objective: of the new study.
        rows: of the new study. A source with one row starts all of them.

    Raises:
        StudySpecError: the source has other rows.
        StudyStoreError: it has no complete trial, or the objective lacks one of its checkpoints, or has other weights.
    """
    _, coefficients, _ = source.chosen_trial()
    source_rows = source.attributes["specification"]["space"]["rows"]
    if coefficients.ndim > 1 and source_rows != rows:
        raise StudySpecError(f"start: {source.name} has space.rows {source_rows}; give the new study the same")
    _check_checkpoints(source, objective)
    steps = objective.steps
    extended = np.zeros((*coefficients.shape[:-1], len(steps)))
    extended[..., np.isin(steps, source.attributes["steps"])] = coefficients
    return extended


def _check_checkpoints(source: StoredStudy, objective: Objective) -> None:
    """Refuse an objective that does not have all checkpoints of a study, with the same weights.

    Raises:
        StudyStoreError: it lacks one, or has other weights.
    """
    steps = tuple(source.attributes["steps"])
    digest = source.attributes["checkpoints"]
    trajectory = objective.trajectory
    missing = sorted(set(steps) - set(objective.steps))
    if missing:
        problem = f"no checkpoint of step {missing[0]} is here"
    elif isinstance(trajectory, Trajectory):
        # a study whose checkpoints were not packed has no digest of them
        if digest is not None and Trajectory.holding(trajectory.path, KnownCheckpoints(digest, steps)) is not None:
            return
        problem = "its checkpoints have other weights here"
    else:
        if digest is None and steps == tuple(objective.steps):
            return
        problem = "it combines other checkpoints"
    raise StudyStoreError(
        f"start: {source.name}: {problem}; give all checkpoints of that study (later ones may be added)"
    )
