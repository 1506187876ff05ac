"""Landscapes: the loss on the plane through three models, as a study of the experiment that lists its candidates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcsc_opt.base.study_spec import BudgetSpec, OptimizerSpec, StudySpec
from lcsc_opt.coefficients.plane import DEFAULT_SIZE, Plane, plane_grid
from lcsc_opt.database.arrays import stored_array
from lcsc_opt.objective.contract import Objective


def landscape_spec(spec: StudySpec) -> StudySpec:
    """The specification with what a landscape has in any case: all of its points, and no choice among them."""
    options: Mapping[str, Any] = spec.optimizer.options
    _, points = plane_grid(options.get("size", DEFAULT_SIZE))
    return spec.model_copy(
        update={
            "budget": BudgetSpec(evaluations=len(points)),
            # models far from the corners often cannot sample
            "failures": spec.failures.model_copy(update={"in_a_row": None}),
            "held_out": None,
            "start": None,
        }
    )


def plane_attribute(optimizer: OptimizerSpec, objective: Objective) -> dict[str, Any]:
    """What a landscape stores of its plane: the scalar products by which candidates are projected onto it.

    Raises:
        StudySpecError: a corner is neither a step nor an EMA of the trajectory, or the three span no plane.
    """
    options: Mapping[str, Any] = optimizer.options
    plane = Plane.through(options.get("corners"), objective.steps)
    return {"products": stored_array(plane.products(objective.gram()))}
