"""Landscapes: the loss on the plane through three models, as an ordinary study that is logged and continued.

The study is called ``experiment/Landscape/seed``. It has the objective, the noise and the failure policy of the study
it was made from, so its losses can be compared with those of the experiment's searches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.base.study_file import BudgetSpec, OptimizerSpec
from lcsc_opt.coefficients.plane import DEFAULT_MARGIN, DEFAULT_SIZE, LANDSCAPE, PLANE_ATTRIBUTE, Plane, plane_grid
from lcsc_opt.database.arrays import stored_array
from lcsc_opt.database.names import split_name
from lcsc_opt.database.store import StoredStudy, our_study
from lcsc_opt.optimizers import configure
from lcsc_opt.search.compatibility import accepted_changes
from lcsc_opt.search.plan import StudyPlan
from lcsc_opt.search.study import StudyRunner

_STOP_SHARE = 0.9  # of failed points, since models far from the corners often cannot sample


def run_landscape(
    storage: RDBStorage, source: StoredStudy, options: Mapping[str, Any], *, images: int | None = None, seed: int = 0
) -> tuple[str, str]:
    """Evaluate the points of a landscape that are not evaluated yet, with the objective of ``source``.

    Args:
        storage: of the studies.
        source: any search of the experiment.
        options: ``corners``, three training steps or ``ema:RATE``, by default three rates of the window's EMAs;
            ``size``, points on each side of the grid; ``margin``, how far it reaches beyond the corners, in units of
            their distance.
        images: sampled at each point; by default as many as in the search.
        seed: tells several landscapes of one experiment apart.

    Returns:
        The landscape's name, and one line with the result.

    Raises:
        StudyStoreError: ``source`` is a landscape itself, or the stored landscape has other options, or the
            objective has changed.
        StudySpecError: the corners span no plane.
    """
    experiment, optimizer, _ = split_name(source.name)
    name, fewer = f"{experiment}/{LANDSCAPE}/{seed}", {} if images is None else {"images": images}
    if optimizer == LANDSCAPE:
        raise StudyStoreError(f"{source.name}: is a landscape; name a search of {experiment}, or lcsc resume it")
    if our_study(storage, name) is not None:
        plan = StudyPlan.of(StoredStudy.open(storage, name))
        known = {**plan.optimizer.options, "images": plan.spec.objective.settings.get("images")}
        asked = {**options, **fewer}
        if changed := [f"{key} is {known[key]}, not {value}" for key, value in asked.items() if known[key] != value]:
            raise StudyStoreError(f"{name}: exists with other options: {'; '.join(changed)}. Choose another --seed")
        return name, StudyRunner(storage).run(plan)
    steps = tuple(source.attributes["steps"])
    defaults = {"corners": list(Plane.default_corners(steps)), "size": DEFAULT_SIZE, "margin": DEFAULT_MARGIN}
    chosen: dict[str, Any] = {**defaults, **options}
    wanted = OptimizerSpec(name=LANDSCAPE, options=chosen)
    configure(wanted)
    plane = Plane.through(chosen["corners"], steps)
    searched = StudyPlan.of(source)
    settings = {**searched.spec.objective.settings, **fewer}
    plan = searched.changed(
        objective=searched.spec.objective.model_copy(update={"settings": settings}),
        optimizers=(wanted,),
        seeds=(seed,),
        failures=searched.spec.failures.model_copy(update={"stop_share": _STOP_SHARE}),
        budget=BudgetSpec(evaluations=len(plane_grid(chosen["size"], chosen["margin"])[1])),
        held_out=None,
        log=(),
        notify=None,
    )
    plan = dataclasses.replace(plan, origin=None)
    runner = StudyRunner(storage)
    if images is None:
        accepted_changes(source, {"objective": runner.objective(plan).describe()}, accept=False)
    gram = runner.objective(plan).gram()
    products = None if gram is None else stored_array(plane.products(np.asarray(gram, dtype=np.float64)))
    runner.create(plan, {PLANE_ATTRIBUTE: {"products": products}})
    return name, runner.run(plan)
