"""The specification of one study: one optimizer and one seed of a study file, or of a stored study."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nevergrad.optimization.base import Optimizer

from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.paths import DEFAULT_FILES
from lcsc_opt.base.study_file import (
    BudgetSpec,
    OptimizerSpec,
    RayWorkers,
    SpaceSpec,
    StudySpec,
    parse_studies,
)
from lcsc_opt.coefficients.plane import LANDSCAPE
from lcsc_opt.coefficients.profiles import default_origin, ema_coefficients
from lcsc_opt.coefficients.spaces import (
    AffineSpace,
    CoefficientSpace,
    ConvexSpace,
)
from lcsc_opt.database.names import BASELINES, split_name
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.database.urls import files_directory
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.optimizers.driver import Driver
from lcsc_opt.optimizers.registry import (
    build_optimizer,
    configure,
    needs_gradient,
    prefers_sequential_asks,
    refuses_concurrent_asks,
)
from lcsc_opt.study.defaults import default_options
from lcsc_opt.study.landscape import landscape_spec, plane_attribute
from lcsc_opt.trajectory import Trajectory

FEWEST_REAL_IMAGES = 10  # per effective dimension of the features (docs/optimizers.md)
MOVES_ROWS_ALIKE = ("LCSCQuadratic",)
CHECKPOINTS = "checkpoints"  # the setting that names the checkpoints


@dataclasses.dataclass(frozen=True)
class Plan:
    """One study: one optimizer and one seed of a specification.

    Attributes:
        spec: the study file's specification, with that optimizer and that seed only.
        directory: the study file's folder, which is searched first for the objective.
        origin: ``[K]`` or ``[S, K]``, where a search with a ``start`` begins, as soon as that is known.
        functions: those that the caller handed over, for the names of the objective's settings that are no import.
        files: the folder beside the database, of :class:`lcsc_opt.base.paths.BuildContext`.
    """

    spec: StudySpec
    directory: Path | None = None
    origin: Sequence[Any] | None = None
    functions: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict, compare=False)
    files: Path = DEFAULT_FILES

    @classmethod
    def of(cls, study: StoredStudy) -> Plan:
        """The plan that a stored study was made from, so that it can be continued without its study file.

        Raises:
            StudyStoreError: lcsc_opt did not write the study, or another version did.
        """
        content, directory = stored_content(study)
        try:
            [spec] = parse_studies(content, source="its specification")
        except StudySpecError as error:
            raise _of_another_version(study, error) from error
        return cls(spec, directory, files=files_directory(study.storage.url))

    @property
    def optimizer(self) -> OptimizerSpec:
        """The optimizer that searches."""
        return self.spec.optimizers[0]

    @property
    def seed(self) -> int:
        """The seed of everything random in the search."""
        return self.spec.seeds[0]

    @property
    def name(self) -> str:
        """The name of the Optuna study."""
        return f"{self.spec.name}/{self.optimizer.name}/{self.seed}"

    @property
    def follows_gradients(self) -> bool:
        """Whether the optimizer needs the gradient of the loss."""
        return needs_gradient(self.optimizer)

    @property
    def begins_at_ema(self) -> bool:
        """Whether a search begins at EMA* where it is known: unless the study file or the algorithm says where."""
        says_where = self.spec.start is not None or self.spec.space.origin is not None
        return not (self.is_grid or says_where or self.optimizer.name == "LCSC")

    @property
    def is_grid(self) -> bool:
        """Whether candidates are listed, not searched: averages, one of which is EMA*, or the points of a landscape.

        Candidates of a grid have one row, in the affine space.
        """
        return self.optimizer.name in (*BASELINES, LANDSCAPE)

    @property
    def ray(self) -> RayWorkers | None:
        """The workers of a Ray cluster; ``None`` if this machine evaluates."""
        if isinstance(self.spec.workers, RayWorkers):
            return self.spec.workers
        return None

    @property
    def workers(self) -> int:
        """How many processes evaluate; ``auto`` is one for each GPU, or one."""
        workers = self.spec.workers
        if isinstance(workers, int):
            return workers
        if isinstance(workers, RayWorkers):
            return workers.ray
        if workers == "auto":
            from lcsc_opt.base import accelerator

            return max(len(accelerator.names()), 1)
        return len(workers)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of the workers, if the study file lists them."""
        if isinstance(self.spec.workers, tuple):
            return self.spec.workers
        return ()

    @property
    def names_device(self) -> bool:
        """Whether the objective's settings choose the device, which workers then share."""
        return self._device == "cpu" or ":" in self._device

    @property
    def _device(self) -> str:
        return str(self.spec.objective.settings.get("device", "auto"))

    @property
    def objective_key(self) -> str:
        """Plans with the same key have the same objective."""
        return f"{self.directory}:{self.spec.objective.model_dump_json()}"

    def changed(self, **changes: Any) -> Plan:
        """The same plan with other values in its specification."""
        return dataclasses.replace(self, spec=self.spec.model_copy(update=changes))

    @property
    def specification(self) -> dict[str, Any]:
        """As JSON: what must stay the same for the study to be continued."""
        specification = self.spec.model_dump(include={"objective", "space"})
        specification["start"] = None if self.is_grid else self.spec.start
        specification["optimizer"] = self.optimizer.model_dump()
        specification["seed"] = self.seed
        specification["workers"] = self.workers
        return specification

    @property
    def updated_attributes(self) -> dict[str, Any]:
        """The attributes that every run writes, since the study file may have been edited.

        The specification was compared with the stored one first: only what changes no result can differ. ``ray`` names
        the workers of a Ray cluster.
        """
        held_out = self.spec.held_out
        ray = self.ray
        return {
            "specification": self.specification,
            "failures": self.spec.failures.model_dump(),
            "held_out_plan": None if held_out is None else held_out.model_dump(),
            "ray": None if ray is None else ray.model_dump(),
        }

    def initial_attributes(self, objective: Objective) -> dict[str, Any]:
        """The study's attributes that are written when it begins. Runs change the budget only."""
        budget = self.most(objective).model_dump()
        groups = objective.layer_groups
        trajectory = objective.trajectory
        attributes = {
            "budget": budget,
            "optimizer_budget": budget,
            "optimizer_defaults": default_options(self.optimizer, self.spec.space.rows, len(objective.steps)),
            "origin": self.origin,
            "parallelism": self.parallelism(objective),
            "report_images": objective.samples.per_report,
            "holds_out": objective.why_nothing_held_out() is None,
            "steps": list(objective.steps),
            "checkpoints": trajectory.sha256 if isinstance(trajectory, Trajectory) else None,
            "layer_groups": None if groups is None else list(groups.names),
            "directory": None if self.directory is None else str(self.directory),
        }
        if self.optimizer.name == LANDSCAPE:
            attributes["plane"] = plane_attribute(self.optimizer, objective)
        return attributes

    def check_devices(self) -> None:
        """Refuse a device in the objective's settings if the workers, or Ray, choose the devices.

        Raises:
            StudySpecError: both name devices.
        """
        if self.ray is not None:
            if self._device.partition(":")[2] not in ("", "0"):
                raise StudySpecError(
                    f"objective.settings.device {self._device}: Ray gives each worker its own; leave it out"
                )
        elif self.devices and self.names_device:
            names = ", ".join(self.devices)
            raise StudySpecError(
                f"workers: {names} and objective.settings.device {self._device}: give only one of them"
            )

    def check_report_images(self, objective: Objective) -> None:
        """Refuse a report on so few images that some prompts would never be sampled.

        Raises:
            StudySpecError: the message names the number of images that are needed.
        """
        if self.spec.held_out is None:
            return
        images = self.spec.held_out.images_with(objective.samples.per_report)
        fewest = objective.samples.fewest_per_report
        if images < fewest:
            raise StudySpecError(
                f"held_out.images: {fewest:,} prompts for {images:,} images, so the last ones would never be sampled; "
                f"give at least {fewest}, or fewer prompts"
            )

    def check(self, objective: Objective) -> None:
        """Refuse an objective that this plan cannot search, before any weights are read.

        Raises:
            StudySpecError: it gives no gradient or no images, or the space of a package cannot be made over it.
            ObjectiveError: all checkpoints hold the same weights.
        """
        if objective.trajectory is not None and not objective.trajectory.varying:
            raise ObjectiveError(f"{self.name}: all checkpoints hold the same weights, so there is nothing to search")
        self._check_gradient(objective)
        spec = self.spec
        if spec.budget.unit == "images" and not objective.samples.per_evaluation:
            raise StudySpecError("budget.images: this objective samples no images; give budget.evaluations")

    def _check_gradient(self, objective: Objective) -> None:
        if not self.follows_gradients:
            return
        reason = objective.why_no_gradient()
        if reason is not None:
            raise StudySpecError(
                f"optimizers.{self.optimizer.name}: follows the gradient of the loss, and {self.spec.objective.file} "
                f"gives none: {reason}; search it with CMA or LCSC"
            )

    def advice(self, objective: Objective) -> Iterator[str]:
        """What to know before a new study begins, one line each."""
        images = objective.samples.real_per_dimension
        if self.follows_gradients and images is not None and images < FEWEST_REAL_IMAGES:
            yield (
                f"{self.name}: the reference has {images:.1f} real images for each effective dimension of its "
                f"features; with fewer than about {FEWEST_REAL_IMAGES} a search fits these images, with one row as "
                "with many: give more real images, or hold some out"
            )
        if self.spec.space.rows is not None and not self.is_grid and not self.follows_gradients:
            yield f"{self.name}: without a gradient, more rows do not help; leave space.rows out, or use LCSCGradient"
        if isinstance(objective.trajectory, Trajectory):
            yield from objective.trajectory.identical()

    def space(self, objective: Objective) -> CoefficientSpace:
        """The coefficient space over an objective's checkpoints.

        Grids get the affine space, which contains their profiles exactly; another space may not reach them.
        """
        spec = SpaceSpec() if self.is_grid else self.spec.space
        steps = objective.steps
        groups = objective.layer_groups
        if self.origin is not None:
            start = np.array(self.origin, dtype=np.float64)
        elif spec.origin is not None:
            start = ema_coefficients(steps, spec.origin)
        else:
            start = default_origin(steps)
        if groups is not None and spec.rows is not None:
            start = groups.in_rows(start)
        if spec.kind == "convex":
            return ConvexSpace(steps, start)
        return AffineSpace(steps, start)

    def new_optimizer(
        self, objective: Objective, planned: BudgetSpec, *, defaults: Mapping[str, Any], workers: int = 1
    ) -> Driver:
        """A fresh optimizer that plans with this budget, a number of evaluations or images.

        ``defaults`` are options that the study file does not name. ``workers`` candidates may be evaluated at once.
        """
        images = objective.samples.per_evaluation
        evaluations = planned.total
        if planned.unit == "images":
            evaluations = math.ceil(planned.total / images)
        spec = self.optimizer.with_defaults(defaults)

        def build() -> Optimizer:
            space = self.space(objective)
            optimizer = build_optimizer(spec, space, budget=evaluations, workers=workers, seed=self.seed)
            plan_budget = getattr(optimizer, "plan_budget", None)
            if plan_budget is not None:
                plan_budget(evaluations=planned.evaluations, images=planned.images, images_per_evaluation=images)
            return optimizer

        return Driver(build, spec.name, self.seed)

    def most(self, objective: Objective) -> BudgetSpec:
        """The budget, but no more than a grid has candidates; no time cuts a grid."""
        budget = self.spec.budget
        candidates = self._grid_size(objective)
        if candidates is None:
            return budget
        if budget.unit == "seconds":
            return BudgetSpec(evaluations=candidates)
        return budget.with_total(min(budget.total, self._price(objective) * candidates))

    def why_incomplete(self, objective: Objective) -> str | None:
        """Says that the budget ends before a grid; ``None`` if it does not."""
        candidates = self._grid_size(objective)
        if candidates is None:
            return None
        affordable = self.most(objective).total // self._price(objective)
        if affordable >= candidates:
            return None
        return (
            f"{self.name}: the budget of {self.spec.budget} ends after {affordable} of the grid's {candidates} "
            "candidates: its best is the best of a part of them"
        )

    def _grid_size(self, objective: Objective) -> int | None:
        """How many candidates a grid has; ``None`` for other optimizers."""
        points = getattr(configure(self.optimizer)[0], "points", None)
        if points is None:
            return None
        return len(points(objective.steps))

    def _price(self, objective: Objective) -> int:
        """What one evaluation costs, in the unit of the budget."""
        if self.spec.budget.unit == "images":
            return objective.samples.per_evaluation
        return 1

    def parallelism(self, objective: Objective) -> dict[str, Any]:
        """How a study asks, also if it continues with other workers.

        ``in_flight``: how many trials may be between ask and tell; ``spread_images``: whether workers share them;
        ``workers``: for how many the optimizer plans.

        Workers share the images of a candidate where the optimizer waits for each result. Stages overlap where they use
        different parts of the machine.
        """
        prefers_sequential = prefers_sequential_asks(self.optimizer)
        spread_images = isinstance(objective, StagedObjective) and prefers_sequential and self.workers > 1
        if refuses_concurrent_asks(self.optimizer) and not spread_images:
            return {"in_flight": 1, "spread_images": False, "workers": 1}
        pipelined = isinstance(objective, StagedObjective) and objective.overlaps
        # overlapping stages would ask before the last loss is told, and would keep the graphs of two candidates
        if prefers_sequential or self.follows_gradients:
            pipelined = False
        independent_workers = 1 if spread_images else self.workers  # workers that share a candidate are as one
        in_flight = most_in_flight(independent_workers, pipelined=pipelined)
        workers = min(self.workers, in_flight)
        return {"in_flight": in_flight, "spread_images": spread_images, "workers": workers}


def stored_content(study: StoredStudy) -> tuple[dict[str, Any], Path | None]:
    """What a study file of a stored study contains, without its database; and the folder of that file.

    Raises:
        StudyStoreError: lcsc_opt did not write the study, or another version did.
    """
    stored = study.attributes
    try:
        content = dict(stored["specification"])
        optimizer = content.pop("optimizer")
        seed = content.pop("seed")
        content |= {
            "name": split_name(study.name)[0],
            "optimizers": [{optimizer["name"]: optimizer["options"]}],
            "seeds": [seed],
            "workers": stored.get("ray") or content["workers"],
            "budget": stored["budget"],
            "failures": stored["failures"],
            "held_out": stored["held_out_plan"],
        }
        directory = stored["directory"]
    except (KeyError, TypeError, ValueError) as error:
        raise _of_another_version(study, error) from error
    return content, Path(directory) if directory else None


def _of_another_version(study: StoredStudy, error: Exception) -> StudyStoreError:
    return StudyStoreError(f"{study.name}: not a study of lcsc_opt, or of another version ({error})")


def most_in_flight(workers: int, *, pipelined: bool = False) -> int:
    """How many trials may be between ask and tell: two per worker if its stages overlap, one for a single worker.

    Several workers have 1.5 each, which keeps them busy while results wait for their turn and candidates are written.
    """
    if pipelined:
        return 2 * workers
    if workers == 1:
        return 1
    return math.ceil(1.5 * workers)


def plans(
    specs: Sequence[StudySpec],
    directory: Path | None,
    *,
    seeds: Sequence[int] = (),
    budget: int | None = None,
) -> list[Plan]:
    """The studies that complete specifications describe; those of a sweep point by point.

    Args:
        specs: the study file, or all points of its sweep, which :func:`lcsc_opt.study.defaults.completed` gives.
        directory: its folder.
        seeds: only these; the file need not list them.
        budget: another total for each study, in the unit of the study file.

    Raises:
        StudySpecError: an unknown optimizer or option; or ``budget`` is given, and the sweep varies the budget.
    """
    if budget is not None:
        specs = _with_budget(specs, budget)
    listed: list[Plan] = []
    for spec in specs:
        for optimizer in spec.optimizers:
            configure(optimizer)  # raises if an option is wrong
        for seed, optimizer in itertools.product(seeds or spec.seeds, spec.optimizers):
            study = spec.model_copy(update={"optimizers": (optimizer,), "seeds": (seed,)})
            if optimizer.name == LANDSCAPE:
                study = landscape_spec(study)
            listed.append(Plan(study, directory))
    return listed


def _with_budget(specs: Sequence[StudySpec], total: int) -> list[StudySpec]:
    """The specifications with another total, each in its unit."""
    for key in specs[0].vary:
        if key.split(".")[0] == "budget":
            raise StudySpecError(f"--budget: the study file varies {key}; give {key}={total} instead")
    return [spec.model_copy(update={"budget": spec.budget.with_total(total)}) for spec in specs]
