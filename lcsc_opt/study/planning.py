"""What a study does with its objective: what it refuses, its space, its optimizer, its budget, how it asks.

Functions of a specification and an objective. Nothing is read or written here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.records import Candidate, Coefficients
from lcsc_opt.base.study_spec import (
    DEFAULT_BUDGET,
    BudgetSpec,
    SpaceSpec,
    StudySpec,
)
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace, ConvexSpace
from lcsc_opt.database.arrays import stored_array
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.optimizers.registry import build_optimizer, configure
from lcsc_opt.trajectory import Trajectory

if TYPE_CHECKING:
    from nevergrad.optimization.base import Optimizer

FEWEST_REAL_IMAGES = 10  # per effective dimension of the features (docs/optimizers.md)


def check(spec: StudySpec, objective: Objective) -> None:
    """Refuse an objective that this study cannot search or report, before any weights are read.

    Raises:
        StudySpecError: the optimizer needs a gradient, or the budget counts images, and the objective has none; or the
            report has so few images that some prompts would never be sampled.
        ObjectiveError: all checkpoints hold the same weights.
    """
    if objective.trajectory is not None and not objective.trajectory.varying:
        raise ObjectiveError(
            f"{spec.name}: all checkpoints hold the same weights, so there is nothing to search; of a network that "
            "trains on, keep copies: copy.deepcopy(net.state_dict())"
        )
    if configure(spec.optimizer).needs_gradient:
        reason = objective.why_no_gradient()
        if reason is not None:
            raise StudySpecError(
                f"optimizers.{spec.optimizer.name}: follows the gradient of the loss, and {spec.objective.file} "
                f"gives none: {reason}; use LCSCQuadratic"
            )
    if spec.budget.unit == "images" and not objective.samples.per_evaluation:
        raise StudySpecError("budget.images: this objective samples no images; give budget.evaluations")
    if spec.held_out is None:
        return
    images = spec.held_out.images_with(objective.samples.per_report)
    prompts = objective.samples.prompts_per_report
    if images < prompts:
        raise StudySpecError(
            f"held_out.images: there are more prompts ({prompts:,}) than images ({images:,}), so some would never be "
            f"used; give at least {prompts:,} images, or fewer prompts"
        )


def advice(spec: StudySpec, objective: Objective) -> Iterator[str]:
    """What to know before a new study begins, one line each."""
    real_images = objective.samples.real_per_dimension
    follows_gradient = configure(spec.optimizer).needs_gradient
    if follows_gradient and real_images is not None and real_images < FEWEST_REAL_IMAGES:
        yield (
            f"{spec.name}: the reference has {real_images:.1f} real images for each effective dimension of its "
            f"features; with fewer than about {FEWEST_REAL_IMAGES} a search fits these images and not their "
            "distribution: give more real images; hold some out to see whether this happens"
        )
    if spec.space.rows is not None and not spec.is_grid and not follows_gradient:
        yield f"{spec.name}: without a gradient, more rows do not help; leave space.rows out, or use LCSCGradient"
    if isinstance(objective.trajectory, Trajectory):
        yield from objective.trajectory.identical()


def first_candidate(spec: StudySpec, objective: Objective, *, gradient: bool) -> Candidate:
    """A candidate at the origin of the space; errors are those of :func:`space_of`."""
    space = space_of(spec, objective)
    return Candidate(space.to_coefficients(np.zeros(space.shape)), gradient=gradient)


def space_of(spec: StudySpec, objective: Objective, origin: Coefficients | None = None) -> CoefficientSpace:
    """The coefficient space over an objective's checkpoints.

    Grids get the affine space, which contains their profiles exactly; another space may not reach them.

    Args:
        spec: of the study.
        objective: has the checkpoints.
        origin: ``[K]`` or ``[S, K]``, where the search begins, if another study has found that; ``None`` leaves it to
            the specification.

    Raises:
        StudySpecError: the search cannot begin there.
    """
    space = SpaceSpec() if spec.is_grid else spec.space
    steps = objective.steps
    groups = objective.layer_groups
    start = default_origin(steps) if origin is None else origin
    if groups is not None and space.rows is not None:
        start = groups.in_rows(start)
    closeness = None
    if isinstance(objective.trajectory, Trajectory) and configure(spec.optimizer).needs_gradient:
        closeness = objective.trajectory.closeness(None if space.rows is None else groups)
    if space.kind == "convex":
        if (start < 0).any():
            raise StudySpecError(
                f"start: the answer of {spec.start or 'the grid'} has negative coefficients, which the convex space "
                "does not hold; leave out space: convex, or start"
            )
        return ConvexSpace(steps, start, closeness)
    return AffineSpace(steps, start, closeness)


def new_driver(
    spec: StudySpec,
    objective: Objective,
    planned: BudgetSpec,
    *,
    origin: Coefficients | None = None,
    workers: int = 1,
) -> Driver:
    """A fresh optimizer that plans with this budget, a number of evaluations or images.

    Args:
        spec: of the study.
        objective: what it searches.
        planned: what the optimizer plans with.
        origin: as of :func:`space_of`.
        workers: how many candidates may be evaluated at once.

    Raises:
        StudySpecError: as :func:`space_of`; or the optimizer does not allow the budget, the space or the workers.
        SearchFailedError: the optimizer raised another error while it was built.
    """
    images = objective.samples.per_evaluation
    evaluations = planned.total
    if planned.unit == "images":
        evaluations = math.ceil(planned.total / images)

    def build() -> Optimizer:
        """Called by the driver, which seeds the global generators of random numbers meanwhile."""
        space = space_of(spec, objective, origin)
        optimizer = build_optimizer(spec.optimizer, space, budget=evaluations, workers=workers, seed=spec.seed)
        # some of ours plan by images, too; Nevergrad's know only a number of evaluations
        plan_budget = getattr(optimizer, "plan_budget", None)
        if plan_budget is not None:
            plan_budget(evaluations=planned.evaluations, images=planned.images, images_per_evaluation=images)
        return optimizer

    return Driver(build, spec.optimizer.name, spec.seed)


def usable_budget(spec: StudySpec, objective: Objective) -> BudgetSpec:
    """The budget, but no more than a grid has candidates; patience cuts no grid."""
    candidates = grid_size(spec, objective)
    if candidates is None:
        return spec.budget
    if spec.budget.unit == "seconds":
        return spec.budget.model_copy(update={"patience": None})
    total = min(spec.budget.total, _price(spec, objective) * candidates)
    return spec.budget.with_total(total).model_copy(update={"patience": None})


def why_incomplete(spec: StudySpec, objective: Objective) -> str | None:
    """Says that the budget ends before a grid; ``None`` if it does not."""
    candidates = grid_size(spec, objective)
    if candidates is None or spec.budget.unit == "seconds":  # what fits into a time is said at its end
        return None
    affordable = usable_budget(spec, objective).total // _price(spec, objective)
    if affordable >= candidates:
        return None
    return (
        f"{spec.name}: the budget of {spec.budget} covers {affordable} of the grid's {candidates} "
        "candidates; the others are not evaluated"
    )


def grid_size(spec: StudySpec, objective: Objective) -> int | None:
    """How many candidates a grid has; ``None`` for other optimizers."""
    points = configure(spec.optimizer).points
    if points is None:
        return None
    return len(points(objective.steps))


def _price(spec: StudySpec, objective: Objective) -> int:
    """What one evaluation costs, in the budget's unit, where that is not seconds."""
    if spec.budget.unit == "images":
        return objective.samples.per_evaluation
    return 1


def parallelism(spec: StudySpec, objective: Objective) -> dict[str, Any]:
    """How a study asks, also if it continues with other workers.

    ``in_flight``: how many trials may be between ask and tell; ``spread_images``: whether workers share them;
    ``workers``: for how many the optimizer plans.

    Workers share the images of a candidate where the optimizer waits for each result. Stages overlap where they use
    different parts of the machine.
    """
    count = spec.worker_count
    optimizer = configure(spec.optimizer)
    spread_images = isinstance(objective, StagedObjective) and optimizer.prefers_sequential_asks and count > 1
    if optimizer.refuses_concurrent_asks and not spread_images:
        return {"in_flight": 1, "spread_images": False, "workers": 1}
    pipelined = isinstance(objective, StagedObjective) and objective.overlaps
    # overlapping stages would ask before the last loss is told, and would keep the graphs of two candidates
    if optimizer.prefers_sequential_asks or optimizer.needs_gradient:
        pipelined = False
    independent_workers = 1 if spread_images else count  # workers that share a candidate are as one
    in_flight = most_in_flight(independent_workers, pipelined=pipelined)
    return {"in_flight": in_flight, "spread_images": spread_images, "workers": min(count, in_flight)}


def first_attributes(
    spec: StudySpec, objective: Objective, origin: Coefficients | None, planned: int | None
) -> dict[str, Any]:
    """What a study stores of its objective when it begins; later runs change only the budget.

    Args:
        spec: of the study.
        objective: what it searches.
        origin: where it begins, if another study has found that.
        planned: with how many evaluations its optimizer plans, if its budget is a time.
    """
    budget = usable_budget(spec, objective)
    optimizer_budget = budget
    if budget.seconds is not None:
        optimizer_budget = BudgetSpec(evaluations=planned or DEFAULT_BUDGET)
    groups = objective.layer_groups
    return {
        "key": dict(objective.key.decides),
        "maximize": objective.maximizes,
        "budget": budget.model_dump(),
        "optimizer_budget": optimizer_budget.model_dump(),
        "origin": None if origin is None else stored_array(origin),
        "parallelism": parallelism(spec, objective),
        "steps": list(objective.steps),
        "layer_groups": None if groups is None else dict(zip(groups.names, groups.counts, strict=True)),
    }


def most_in_flight(workers: int, *, pipelined: bool = False) -> int:
    """How many trials may be between ask and tell: two per worker if its stages overlap, one for a single worker.

    Several workers have 1.5 each, which keeps them busy while results wait for their turn and candidates are written.
    """
    if pipelined:
        return 2 * workers
    if workers == 1:
        return 1
    return math.ceil(1.5 * workers)
