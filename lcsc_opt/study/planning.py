"""What a study does with its objective: what it refuses, its space, its optimizer, its budget, how it asks.

Nothing is read or written here.
"""

from __future__ import annotations

import functools
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
from lcsc_opt.optimizers.registry import Configured, build_optimizer, configure
from lcsc_opt.trajectory import Trajectory

if TYPE_CHECKING:
    from nevergrad.optimization.base import Optimizer

FEWEST_REAL_IMAGES = 10  # per effective dimension of the features (docs/optimizers.md)


class Plan:
    """One study with its objective.

    Args:
        spec: of the study.
        objective: what it searches, merged in any rows.

    Attributes:
        spec, objective: the same.
    """

    def __init__(self, spec: StudySpec, objective: Objective) -> None:
        self.spec = spec
        self.objective = objective

    @functools.cached_property
    def optimizer(self) -> Configured:
        """What searches. Raises StudySpecError for an unknown optimizer or option."""
        return configure(self.spec.optimizer)

    @functools.cached_property
    def grid_size(self) -> int | None:
        """How many candidates a grid has; ``None`` for other optimizers."""
        if self.optimizer.points is None:
            return None
        return len(self.optimizer.points(self.objective.steps))

    @functools.cached_property
    def budget(self) -> BudgetSpec:
        """The budget, but no more than a grid has candidates; patience cuts no grid."""
        budget = self.spec.budget
        if self.grid_size is None:
            return budget
        if budget.seconds is None:
            budget = budget.with_total(min(budget.total, self._price * self.grid_size))
        return budget.model_copy(update={"patience": None})

    @functools.cached_property
    def _default_origin(self) -> Coefficients:
        """``[K]``: where a search begins unless another study has found that."""
        return default_origin(self.objective.steps)

    @property
    def _price(self) -> int:
        """What one evaluation costs, in the budget's unit, where that is not seconds."""
        if self.spec.budget.images is not None:
            return self.objective.samples.per_evaluation
        return 1

    @functools.cached_property
    def parallelism(self) -> dict[str, Any]:
        """How the study asks, also if it continues with other workers.

        ``in_flight``: how many trials may be between ask and tell; ``workers``: for how many the optimizer plans.

        Workers share the images of a candidate where the optimizer waits for each result. Stages overlap where they
        use different parts of the machine.
        """
        count = self.spec.worker_count
        optimizer = self.optimizer
        has_stages = isinstance(self.objective, StagedObjective)
        spread_images = has_stages and optimizer.prefers_sequential_asks and count > 1
        if optimizer.refuses_concurrent_asks and not spread_images:
            return {"in_flight": 1, "workers": 1}
        pipelined = isinstance(self.objective, StagedObjective) and self.objective.overlaps
        # overlapping stages would ask before the last loss is told, and would keep the graphs of two candidates
        if optimizer.prefers_sequential_asks or optimizer.needs_gradient:
            pipelined = False
        independent_workers = 1 if spread_images else count  # workers that share a candidate are as one
        in_flight = most_in_flight(independent_workers, pipelined=pipelined)
        return {"in_flight": in_flight, "workers": min(count, in_flight)}

    def check(self) -> None:
        """Refuse an objective that this study cannot search or report, before any weights are read.

        Raises:
            StudySpecError: the optimizer needs a gradient, or the budget counts images, and the objective has none; or
                the report has so few images that some prompts would never be sampled.
            ObjectiveError: all checkpoints hold the same weights.
        """
        spec, objective = self.spec, self.objective
        if objective.trajectory is not None and not objective.trajectory.varying:
            raise ObjectiveError(
                f"{spec.name}: all checkpoints hold the same weights, so there is nothing to search; of a network that "
                "trains on, keep copies: copy.deepcopy(net.state_dict())"
            )
        if self.optimizer.needs_gradient:
            reason = objective.why_no_gradient()
            if reason is not None:
                raise StudySpecError(
                    f"optimizers.{spec.optimizer.name}: follows the gradient of the loss, and {spec.objective.file} "
                    f"gives none: {reason}; use LCSCQuadratic"
                )
        if spec.budget.images is not None and not objective.samples.per_evaluation:
            raise StudySpecError("budget.images: this objective samples no images; give budget.evaluations")
        if spec.held_out is None:
            return
        images = spec.held_out.images_with(objective.samples.per_report)
        prompts = objective.samples.prompts_per_report
        if images < prompts:
            raise StudySpecError(
                f"held_out.images: there are more prompts ({prompts:,}) than images ({images:,}), so some would never "
                f"be used; give at least {prompts:,} images, or fewer prompts"
            )

    def advice(self) -> Iterator[str]:
        """What to know before a new study begins, one line each."""
        real_images = self.objective.samples.real_per_dimension
        follows_gradient = self.optimizer.needs_gradient
        if follows_gradient and real_images is not None and real_images < FEWEST_REAL_IMAGES:
            yield (
                f"{self.spec.name}: the reference has {real_images:.1f} real images for each effective dimension of "
                f"its features. With fewer than about {FEWEST_REAL_IMAGES} a search may fit these images and not their "
                "distribution: more of them are better, and a hundred others, held out, show whether that has happened"
            )
        if self.spec.space.rows is not None and self.grid_size is None and not follows_gradient:
            advice = "without a gradient, more rows do not help; leave space.rows out, or use LCSCGradient"
            yield f"{self.spec.name}: {advice}"
        if isinstance(self.objective.trajectory, Trajectory):
            yield from self.objective.trajectory.identical()

    def why_incomplete(self) -> str | None:
        """Says that the budget ends before a grid; ``None`` if it does not."""
        size = self.grid_size
        if size is None or self.budget.seconds is not None:  # what fits into a time is said at its end
            return None
        affordable = self.budget.total // self._price
        if affordable >= size:
            return None
        return (
            f"{self.spec.name}: the budget of {self.spec.budget} covers {affordable} of the grid's {size} "
            "candidates; the others are not evaluated"
        )

    def first_candidate(self, *, gradient: bool) -> Candidate:
        """A candidate at the origin of the space; errors are those of :meth:`space`."""
        space = self.space()
        return Candidate(space.to_coefficients(np.zeros(space.shape)), gradient=gradient)

    def space(self, origin: Coefficients | None = None) -> CoefficientSpace:
        """The coefficient space over the objective's checkpoints, in the rows that it merges now.

        Grids get the affine space, which contains their profiles exactly; another space may not reach them.

        Args:
            origin: ``[K]`` or ``[S, K]``, where the search begins, if another study has found that; ``None`` leaves it
                to the specification.

        Raises:
            StudySpecError: the search cannot begin there.
        """
        space = self.spec.space if self.grid_size is None else SpaceSpec()
        steps = self.objective.steps
        groups = self.objective.layer_groups
        start = self._default_origin if origin is None else origin
        if groups is not None and space.rows is not None:
            start = groups.in_rows(start)
        closeness = None
        if isinstance(self.objective.trajectory, Trajectory) and self.optimizer.needs_gradient:
            closeness = self.objective.trajectory.closeness(None if space.rows is None else groups)
        if space.kind == "convex":
            if (start < 0).any():
                raise StudySpecError(
                    f"start: the answer of {self.spec.start or 'the grid'} has negative coefficients, which the convex "
                    "space does not hold; leave out space: convex, or start"
                )
            return ConvexSpace(steps, start, closeness)
        return AffineSpace(steps, start, closeness)

    def new_driver(self, planned: BudgetSpec, *, origin: Coefficients | None = None, workers: int = 1) -> Driver:
        """A fresh optimizer that plans with this budget, a number of evaluations or images.

        Args:
            planned: what the optimizer plans with.
            origin: as of :meth:`space`.
            workers: how many candidates may be evaluated at once.

        Raises:
            StudySpecError: as :meth:`space`; or the optimizer does not allow the budget, the space or the workers.
            SearchFailedError: the optimizer raised another error while it was built.
        """
        images = self.objective.samples.per_evaluation
        evaluations = planned.total
        if planned.images is not None:
            evaluations = math.ceil(planned.images / images)
        spec = self.spec

        def build() -> Optimizer:
            """Called by the driver, which seeds the global generators of random numbers meanwhile."""
            space = self.space(origin)
            optimizer = build_optimizer(spec.optimizer, space, budget=evaluations, workers=workers, seed=spec.seed)
            # some of ours plan by images, too; Nevergrad's know only a number of evaluations
            plan_budget = getattr(optimizer, "plan_budget", None)
            if plan_budget is not None:
                plan_budget(evaluations=planned.evaluations, images=planned.images, images_per_evaluation=images)
            return optimizer

        return Driver(build, spec.optimizer.name, spec.seed)

    def first_attributes(self, origin: Coefficients | None, planned: int | None) -> dict[str, Any]:
        """What a study stores of its objective when it begins; later runs change only the budget.

        Args:
            origin: where it begins, if another study has found that.
            planned: with how many evaluations its optimizer plans, if its budget is a time.
        """
        optimizer_budget = self.budget
        if self.budget.seconds is not None:
            optimizer_budget = BudgetSpec(evaluations=planned or DEFAULT_BUDGET)
        groups = self.objective.layer_groups
        return {
            "key": dict(self.objective.key.decides),
            "maximize": self.objective.maximizes,
            "budget": self.budget.model_dump(),
            "optimizer_budget": optimizer_budget.model_dump(),
            "origin": None if origin is None else stored_array(origin),
            "parallelism": self.parallelism,
            "steps": list(self.objective.steps),
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
