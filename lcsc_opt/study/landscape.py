"""Landscapes: the loss on the plane through three models, as an ordinary study that is stored and continued.

The study is called ``experiment/Landscape/seed``. It has the objective, the noise and the failure policy of the study
it was made from, so its losses can be compared with those of the experiment's searches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcsc_opt.base.progress import notice
from lcsc_opt.base.study_file import BudgetSpec, OptimizerSpec
from lcsc_opt.coefficients.plane import DEFAULT_SIZE, LANDSCAPE, Plane, plane_grid
from lcsc_opt.database.arrays import stored_array
from lcsc_opt.database.kept_bound import KEPT_BOUND
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.optimizers.registry import configure
from lcsc_opt.study.comparison import accepted_changes
from lcsc_opt.study.plan import Plan
from lcsc_opt.study.resources import ObjectiveLoader, read_trials
from lcsc_opt.study.running import Run


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
    optimizer = OptimizerSpec(name=LANDSCAPE, options=dict(options))
    plane = Plane.through(options.get("corners"), source.attributes["steps"])
    configure(optimizer)
    points = plane_grid(options.get("size", DEFAULT_SIZE))[1]
    searched = Plan.of(source)
    plan = _landscape_plan(searched, optimizer, len(points), images, seed)
    studies = our_studies(source.storage)
    objectives = ObjectiveLoader()
    if images is None:
        current = {"objective": objectives.load(plan, studies).describe()}
        accepted_changes(
            source.name,
            source.attributes,
            lambda name: read_trials(source.storage, name),
            current,
            accept=False,
        )
    missing = len(points)
    if plan.name in studies:
        missing -= HistoryReader(source.storage).read_study(plan.name).evaluations
    else:
        products = plane.products(objectives.load(plan, studies).gram())
        further = {
            "plane": {"products": stored_array(products)},
            KEPT_BOUND: source.attributes.get(KEPT_BOUND),
        }
        plan = dataclasses.replace(plan, further=further)
    if missing > 0:
        notice(f"{plan.name}: {missing:,} evaluations, one for each point of the plane; a smaller --grid needs fewer")
    run = Run([plan], source.storage.url, objectives=objectives)
    return plan.name, run.run(run.plans[0])


def _landscape_plan(
    searched: Plan,
    optimizer: OptimizerSpec,
    points: int,
    images: int | None,
    seed: int,
) -> Plan:
    """The specification of a landscape: that of the search, with a grid of points as its optimizer."""
    spec = searched.spec
    settings = dict(spec.objective.settings)
    if images is not None:
        settings["images"] = images
    plan = searched.changed(
        objective=spec.objective.model_copy(update={"settings": settings}),
        optimizers=(optimizer,),
        seeds=(seed,),
        # models far from the corners often cannot sample
        failures=spec.failures.model_copy(update={"in_a_row": None}),
        budget=BudgetSpec(evaluations=points),
        held_out=None,
    )
    return dataclasses.replace(plan, origin=None)
