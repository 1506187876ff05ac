"""Landscapes: the loss on the plane through three models, as an ordinary study that is logged and continued.

The study is called ``experiment/Landscape/seed``. It has the objective, the noise and the failure policy of the study
it was made from, so its losses can be compared with those of the experiment's searches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcsc_opt.base.study_file import BudgetSpec, OptimizerSpec
from lcsc_opt.coefficients.plane import DEFAULT_SIZE, LANDSCAPE, Plane, plane_grid
from lcsc_opt.database.arrays import stored_array
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.search.compatibility import accepted_changes
from lcsc_opt.search.plan import StudyPlan
from lcsc_opt.search.study import StudyRunner

_STOP_SHARE = 0.9  # of failed points, since models far from the corners often cannot sample


def run_landscape(
    source: StoredStudy, options: Mapping[str, Any], *, images: int | None = None, seed: int = 0
) -> tuple[str, str]:
    """Evaluate the points of a landscape that are not evaluated yet, with the objective of ``source``.

    Args:
        source: any search of the experiment.
        options: ``corners``, see :meth:`Plane.through`; ``size``, points on each side of the grid.
        images: sampled at each point; by default as many as in the search.
        seed: tells several landscapes of one experiment apart.

    Returns:
        The landscape's name, and one line with the result.

    Raises:
        StudyStoreError: the stored landscape has other options, or the objective has changed.
        StudySpecError: the corners span no plane.
    """
    wanted = OptimizerSpec(name=LANDSCAPE, options=dict(options))
    configure(wanted)
    plane = Plane.through(options.get("corners"), source.attributes["steps"])
    searched = StudyPlan.of(source)
    fewer = {} if images is None else {"images": images}
    settings = {**searched.spec.objective.settings, **fewer}
    plan = searched.changed(
        objective=searched.spec.objective.model_copy(update={"settings": settings}),
        optimizers=(wanted,),
        seeds=(seed,),
        failures=searched.spec.failures.model_copy(update={"stop_share": _STOP_SHARE}),
        budget=BudgetSpec(evaluations=len(plane_grid(options.get("size", DEFAULT_SIZE))[1])),
        held_out=None,
        log=(),
        notify=None,
    )
    plan = dataclasses.replace(plan, origin=None)
    runner = StudyRunner(source.storage)
    if images is None:
        accepted_changes(source, {"objective": runner.objective(plan).describe()}, accept=False)
    if plan.name not in our_studies(source.storage):
        products = plane.products(runner.objective(plan).gram())
        runner.create(plan, {"plane": {"products": stored_array(products)}})
    return plan.name, runner.run(plan)
