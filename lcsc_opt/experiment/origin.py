"""Where a new search begins: at the answer of a stored study, its ``start`` or the experiment's EMA grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.study_spec import EMA_GRID, StudySpec
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.experiment import StoredExperiment
from lcsc_opt.database.lock import locked
from lcsc_opt.database.names import split_name
from lcsc_opt.database.opened import Database
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.states import Attributes, ended_search
from lcsc_opt.database.store import StoredStudy, read_attributes
from lcsc_opt.objective.contract import Objective
from lcsc_opt.trajectory import Trajectory


def start_of(spec: StudySpec, specs: Sequence[StudySpec], database: Database) -> str | None:
    """The study at which a new search begins: its ``start``, else the experiment's first EMA grid that has ended.

    ``None`` if it begins where its space or its algorithm does.

    Args:
        spec: of the search.
        specs: of all searches of the run.
        database: of the run.

    Raises:
        StudyStoreError: no grid has ended, and another process runs one of these searches.
    """
    # ``start`` names a beginning, and Algorithm 1 of the paper has its own
    if spec.is_grid or spec.start is not None or spec.optimizer.name == "LCSC" or database.storage is None:
        return spec.start
    grids = [grid.name for grid in specs if grid.optimizer.name == EMA_GRID]
    grids += [name for name in database.contents.of(spec.experiment) if split_name(name)[1] == EMA_GRID]
    # as they are now: another process may have run the grid
    ended = ended_search(read_attributes(database.storage, dict.fromkeys(grids)), EMA_GRID)
    if ended is not None:
        return ended
    running = locked(database.storage, grids)
    if running:
        raise StudyStoreError(f"{spec.name}: begins at the best of {min(running)}, which is being run; wait for it")
    return None


def origin_of(spec: StudySpec, start: str, database: Database, objective: Objective) -> Coefficients:
    """The coefficients at which a new search begins: ``[K]``, or ``[S, K]`` if those of its start have rows.

    Args:
        spec: of the search.
        start: as of :func:`start_of`.
        database: of the run.
        objective: of the run.

    Raises:
        StudySpecError: the study at which it begins has other rows.
        StudyStoreError: there is no such study, it has no complete trial, or the objective lacks one of its checkpoints
            or has other weights.
    """
    source = StoredStudy.open(database.existing(), start)
    coefficients: Coefficients | None
    if spec.start is None:
        coefficients = coefficients_of(source.trial_or_best())  # the same whenever a search begins there
    else:
        reader = HistoryReader(source.storage)
        coefficients = reader.answer(reader.read_study(start))
    if coefficients is None:
        raise StudyStoreError(f"start: {start}: no comparable trial has finished yet; continue that search")
    source_rows = source.attributes["specification"]["space"]["rows"]
    if coefficients.ndim > 1 and source_rows != spec.space.rows:
        raise StudySpecError(f"start: {start} has space.rows {source_rows}; give the new study the same")
    experiment = StoredExperiment.open(source.storage, split_name(start)[0]).attributes
    _check_checkpoints(start, experiment, objective)
    # zero for checkpoints that were added since
    extended = np.zeros((*coefficients.shape[:-1], len(objective.steps)))
    extended[..., np.isin(objective.steps, experiment["steps"])] = coefficients
    return extended


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
