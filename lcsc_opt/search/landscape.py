"""Landscapes: the loss on the plane through three models, as an ordinary study that is logged and continued.

The study is called ``experiment/Landscape/seed``. It has the objective, the noise and the failure policy of the study
it was made from, so its losses can be compared with those of the experiment's searches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.study_file import BudgetSpec, OptimizerSpec
from lcsc_opt.coefficients.plane import (
    DEFAULT_MARGIN,
    DEFAULT_SIZE,
    LANDSCAPE,
    PLANE_ATTRIBUTE,
    Corner,
    Plane,
    check_corners,
    default_corners,
    grid_positions,
)
from lcsc_opt.database.names import split_name
from lcsc_opt.database.store import StoredStudy, study_names
from lcsc_opt.optimizers import configure
from lcsc_opt.search.plan import StudyPlan, stored_plan
from lcsc_opt.search.study import ObjectiveSource, create_study, run_study

_STOP_SHARE = 0.9  # of failed points, since models far from the corners often cannot sample


def run_landscape(
    storage: RDBStorage,
    source: StoredStudy,
    *,
    corners: Sequence[Corner] | None = None,
    size: int | None = None,
    margin: float | None = None,
    images: int | None = None,
    seed: int = 0,
) -> tuple[str, str]:
    """Evaluate the points of a landscape that are not evaluated yet, with the objective of ``source``.

    Args:
        storage: of the studies.
        source: any search of the experiment.
        corners: three training steps, or ``ema:RATE``; by default three rates of the window's EMAs.
        size: points on each side of the grid.
        margin: how far it reaches beyond the corners, in units of their distance.
        images: sampled at each point; by default as many as in the search.
        seed: tells several landscapes of one experiment apart.

    Returns:
        The landscape's name, and one line for people with the result.

    Raises:
        StudyStoreError: ``source`` is a landscape itself, or the stored landscape has other options, or the
            objective has changed.
        StudySpecError: the corners span no plane.
    """
    given = {"corners": None if corners is None else list(check_corners(corners)), "size": size, "margin": margin}
    plan = _plan(storage, source, {key: value for key, value in given.items() if value is not None}, images, seed)
    objectives = ObjectiveSource(storage, plan)
    if plan.name not in study_names(storage):
        objective = objectives.objective
        if images is None:
            source.require("fingerprint", objective.describe(), part="objective")
        plane = Plane.through(check_corners(plan.optimizer.options["corners"]), objective.steps)
        gram = objective.gram()
        products = None if gram is None else plane.products(np.asarray(gram, dtype=np.float64)).tolist()
        create_study(plan, objectives, {PLANE_ATTRIBUTE: {"products": products}})
    return plan.name, run_study(plan, objectives)


def _plan(storage: RDBStorage, source: StoredStudy, given: dict[str, Any], images: int | None, seed: int) -> StudyPlan:
    """The stored landscape's plan, if it agrees with the given options, else a new one."""
    experiment, optimizer, _ = split_name(source.name)
    if optimizer == LANDSCAPE:
        raise StudyStoreError(f"{source.name}: is a landscape; name a search of {experiment}, or lcsc resume it")
    of_source, name = stored_plan(source), f"{experiment}/{LANDSCAPE}/{seed}"
    if name in study_names(storage):
        plan = stored_plan(StoredStudy.open(storage, name))
        known = {**plan.optimizer.options, "images": plan.spec.objective.settings.get("images")}
        asked = given if images is None else {**given, "images": images}
        if changed := [
            f"{key} is {known.get(key)}, not {value}" for key, value in asked.items() if known[key] != value
        ]:
            raise StudyStoreError(f"{name}: exists with other options: {'; '.join(changed)}. Choose another --seed")
        return plan
    steps = tuple(source.attributes["steps"])
    options: dict[str, Any] = {
        "corners": list(default_corners(steps)),
        "size": DEFAULT_SIZE,
        "margin": DEFAULT_MARGIN,
        **given,
    }
    wanted = OptimizerSpec(name=LANDSCAPE, options=options)
    configure(wanted)
    Plane.through(options["corners"], steps)
    spec = of_source.spec
    settings = spec.objective.settings if images is None else {**spec.objective.settings, "images": images}
    plan = of_source.changed(
        objective=spec.objective.model_copy(update={"settings": settings}),
        optimizers=(wanted,),
        seeds=(seed,),
        failures=spec.failures.model_copy(update={"stop_share": _STOP_SHARE}),
        budget=BudgetSpec(evaluations=len(grid_positions(options["size"], options["margin"]))),
        held_out=None,
    )
    return dataclasses.replace(plan, origin=None)
