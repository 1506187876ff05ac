"""Where a new search begins: at the answer of a stored study, its ``start`` or the experiment's EMA grid."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.coefficients.layer_groups import Rule
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.names import split_name
from lcsc_opt.database.report import REPORT, Report
from lcsc_opt.database.states import Attributes
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective
from lcsc_opt.trajectory import Trajectory


def ended_grid(studies: Mapping[str, Attributes]) -> str | None:
    """The name of the first EMA grid of these studies that has ended, whose best is EMA*; ``None`` if none has."""
    grids = [name for name in studies if split_name(name)[1] == EMA_GRID]
    return next((name for name in grids if studies[name].get("search_ended") is not None), None)


def origin_at(
    source: StoredStudy, experiment: Attributes, objective: Objective, rows: Rule | None, *, by_report: bool
) -> Coefficients:
    """``[K]`` or ``[S, K]``: the coefficients of the source's best, zero for checkpoints that the source lacks.

    Args:
        source: the study at whose best the new one begins.
        experiment: the attributes of the source's experiment.
        objective: of the new study.
        rows: of the new study. A source with one row starts all of them.
        by_report: whether the best is that of its report, if there is one; else it is the best of the search, which is
            the same whenever the new one begins.

    Raises:
        StudySpecError: the source has other rows.
        StudyStoreError: it has no complete trial, or the objective lacks one of its checkpoints, or has other weights.
    """
    number = _reported_trial(source.name, experiment) if by_report else None
    coefficients = coefficients_of(source.trial_or_best(number))
    source_rows = source.attributes["specification"]["space"]["rows"]
    if coefficients.ndim > 1 and source_rows != rows:
        raise StudySpecError(f"start: {source.name} has space.rows {source_rows}; give the new study the same")
    _check_checkpoints(source.name, experiment, objective)
    steps = objective.steps
    extended = np.zeros((*coefficients.shape[:-1], len(steps)))
    extended[..., np.isin(steps, experiment["steps"])] = coefficients
    return extended


def _reported_trial(study: str, experiment: Attributes) -> int | None:
    """The number of the trial that the experiment's report has of a study; ``None`` without such."""
    report = Report.from_json(experiment.get(REPORT))
    reported = None if report is None else report.of_study(study)
    if reported is None:
        return None
    return reported.model.trial


def _check_checkpoints(source: str, experiment: Attributes, objective: Objective) -> None:
    """Refuse an objective that does not have all checkpoints of an experiment, with the same weights.

    Raises:
        StudyStoreError: it lacks one, or has other weights.
    """
    steps = tuple(experiment["steps"])
    digest = experiment["checkpoints"]
    trajectory = objective.trajectory
    missing = sorted(set(steps) - set(objective.steps))
    if missing:
        problem = f"no checkpoint of step {missing[0]} is here"
    elif isinstance(trajectory, Trajectory):
        # an experiment whose checkpoints were not packed has no digest of them
        if digest is not None and Trajectory.holding(trajectory.path, KnownCheckpoints(digest, steps)) is not None:
            return
        problem = "its checkpoints have other weights here"
    else:  # nothing was packed, so that only steps can be compared
        if digest is None and steps == tuple(objective.steps):
            return
        problem = "it combines other checkpoints"
    raise StudyStoreError(f"start: {source}: {problem}; give all checkpoints of that study (later ones may be added)")
