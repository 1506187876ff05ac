"""The specification of one study: one optimizer and one seed of a study file, or of a stored study."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_file import (
    BudgetSpec,
    ObjectiveSpec,
    OptimizerSpec,
    RayWorkers,
    SpaceSpec,
    StudySpec,
    parse_studies,
)
from lcsc_opt.base.sweep import split_point
from lcsc_opt.coefficients.profiles import default_origin, ema_coefficients
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace, ConvexSpace, PrincipalSpace
from lcsc_opt.database.names import is_ours, split_name
from lcsc_opt.database.store import StoredStudy, our_studies
from lcsc_opt.evaluation.processes import environments, workers_for_this_machine
from lcsc_opt.exports.recipe import packed_trajectory
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.optimizers import asks_one_at_a_time, configure, grid_size, needs_gradient
from lcsc_opt.search.runner import most_in_flight

CHECKPOINTS = "checkpoints"  # the setting that names the checkpoints
RAY = "ray"  # the attribute of a study that says which cluster evaluates it
_CHOOSING = ("key", "select", "stored")  # settings that say which checkpoints are used, and how they are packed


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """One study: one optimizer and one seed of a specification.

    Attributes:
        spec: what was asked for, with that optimizer and that seed only.
        directory: the study file's folder, where the objective is looked for first.
        origin: ``[K]``, where a forked study starts: the best coefficients that it inherited.
    """

    spec: StudySpec
    directory: Path | None = None
    origin: tuple[float, ...] | None = None

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
    def devices(self) -> tuple[str, ...]:
        """One for each worker, if the study file lists devices."""
        return self.spec.workers if isinstance(self.spec.workers, tuple) else ()

    @property
    def ray(self) -> RayWorkers | None:
        """The workers of a Ray cluster, or ``None`` if this machine evaluates."""
        return self.spec.workers if isinstance(self.spec.workers, RayWorkers) else None

    @property
    def workers(self) -> int:
        """How many processes evaluate; ``auto`` is as many as suit this machine."""
        if self.ray is not None:
            return self.ray.ray
        if self.spec.workers == "auto":
            return workers_for_this_machine()
        return self.spec.workers if isinstance(self.spec.workers, int) else len(self.devices)

    def changed(self, **changes: Any) -> StudyPlan:
        """The same plan with other values in its specification."""
        return dataclasses.replace(self, spec=self.spec.model_copy(update=changes))

    def continuing(self, study: StoredStudy) -> StudyPlan:
        """This plan for a stored study. If the study file leaves the workers open, the study keeps its number.

        Raises:
            StudyStoreError: the study was made from another specification.
        """
        stored = study.attributes
        known = stored.get("specification") or {}
        plan = self.changed(workers=known["workers"]) if self.spec.workers == "auto" and known.get("workers") else self
        wanted = plan.specification()
        settings = wanted["objective"]["settings"]
        if stored.get("checkpoints") and CHECKPOINTS in settings:  # their hash decides whether they are the same
            settings[CHECKPOINTS] = known["objective"]["settings"].get(CHECKPOINTS)
        study.require("specification", wanted)
        return plan

    def specification(self) -> dict[str, Any]:
        """JSON-able: what must stay the same for the study to be continued."""
        return {
            "objective": self.spec.objective.model_dump(),
            "space": self.spec.space.model_dump(),
            "optimizer": self.optimizer.model_dump(),
            "seed": self.seed,
            "workers": self.workers,
            "tells": self.spec.tells,
        }

    def environments(self) -> list[Mapping[str, str]]:
        """The environment variables of each worker; empty if none must be set.

        Raises:
            StudySpecError: there is no such GPU, or both the settings and the workers (or Ray) choose the device.
        """
        device = self.spec.objective.settings.get("device", "auto")
        if self.ray is not None:
            if device not in ("auto", "cuda", "cuda:0", "cpu"):
                raise StudySpecError(f"objective.settings.device {device}: Ray gives each worker its own; leave it out")
            return []
        if device in ("auto", "cuda"):
            return environments(self.workers, self.devices) if self.workers > 1 or self.devices else []
        if self.devices:
            raise StudySpecError(
                f"workers: {', '.join(self.devices)} and objective.settings.device {device}: give one of them only"
            )
        return []

    def changing(self) -> dict[str, Any]:
        """The study's attributes that follow the study file: it may be edited, and the checkpoints may have moved."""
        held_out = self.spec.held_out
        return {
            "specification": self.specification(),
            "failures": self.spec.failures.model_dump(),
            "held_out_plan": None if held_out is None else held_out.model_dump(),
            RAY: None if self.ray is None else self.ray.model_dump(),
        }

    def attributes(self, objective: Objective) -> dict[str, Any]:
        """The study's attributes when it is created."""
        budget = self.spec.budget.model_dump()
        return {
            **self.changing(),
            "fingerprint": {**objective.fingerprint(), "environment": environment()},
            "budget": budget,
            "optimizer_budget": budget,
            "holds_out": objective.why_nothing_held_out() is None,
            "origin": None if self.origin is None else list(self.origin),
            "steps": list(objective.steps),
            "checkpoints": _packed_sha256(objective),
            "directory": None if self.directory is None else str(self.directory),
        }


def _packed_sha256(objective: Objective) -> str | None:
    """The identity of the checkpoints; ``None`` if they are not packed."""
    try:
        return packed_trajectory(objective).sha256
    except ObjectiveError:
        return None


def checkpoints_of(storage: RDBStorage, experiment: str, spec: ObjectiveSpec) -> KnownCheckpoints | None:
    """The checkpoints of the first stored study of an experiment with this objective; ``None`` without such a study.

    All studies of an experiment use the same checkpoints; otherwise they could not be compared. Points of a sweep that
    name the same files use the same checkpoints, too.
    """
    for name, stored in our_studies(storage).items():
        if not is_ours(name) or split_point(split_name(name)[0])[0] != split_point(experiment)[0]:
            continue
        kept = (stored.get("specification") or {}).get("objective")
        if not (stored.get("checkpoints") and kept and kept["file"] == spec.file):
            continue
        before = kept["settings"]
        if all(before.get(setting) == spec.settings.get(setting) for setting in _CHOOSING):
            moved = before.get(CHECKPOINTS) != spec.settings.get(CHECKPOINTS)
            if moved and split_name(name)[0] != experiment:
                continue
            return KnownCheckpoints(stored["checkpoints"], tuple(stored["steps"]), moved, bool(before.get("select")))
    return None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a plan means for its objective.

    Attributes:
        in_flight: how many trials may be between ask and tell; stored when the search begins, and kept.
        spread_images: whether workers share the images of one candidate. Otherwise each worker has its own candidate.
        budget: the plan's, but no more than a grid has candidates.
        first_budget: the budget that the study began with; its optimizer plans with it.
        evaluations: the first budget, counted in evaluations of the objective's usual number of images.
    """

    in_flight: int
    spread_images: bool
    budget: BudgetSpec
    first_budget: BudgetSpec
    evaluations: int

    @property
    def parallelism(self) -> dict[str, Any]:
        """JSON-able: what a study keeps from its beginning."""
        return {"in_flight": self.in_flight, "spread_images": self.spread_images}


def schedule_of(plan: StudyPlan, objective: Objective, stored: Mapping[str, Any]) -> Schedule:
    """How a study is searched. A stored study continues as it began.

    Args:
        plan: of the study.
        objective: the plan's.
        stored: the study's attributes; empty before there is a study.

    Raises:
        StudySpecError: the objective allows no such budget, parallelism or optimizer.
        StudyStoreError: the study file now asks for another parallelism than the study began with.
    """
    spec = plan.spec
    _evaluations(spec.budget, objective)
    check_gradient(plan, objective.why_no_gradient())
    wanted = _parallelism(plan, objective)
    known = stored.get("parallelism")
    began = (known["in_flight"], known["spread_images"]) if known else wanted
    if began != wanted and (spec.spread, spec.pipeline) != ("auto", "auto"):
        was, now = (f"{count} candidates at once{', images spread' * spread}" for count, spread in (began, wanted))
        raise StudyStoreError(
            f"{plan.name}: was begun with {was}, and spread and pipeline now mean {now}; leave the keys out, or "
            "give the study another name"
        )
    first = BudgetSpec(**stored["optimizer_budget"]) if stored else spec.budget
    price = objective.images_per_evaluation if spec.budget.unit == "images" else 1
    most = min(spec.budget.total, price * (grid_size(plan.optimizer, objective.steps) or spec.budget.total))
    in_flight, spread_images = began
    budget, evaluations = BudgetSpec(**{spec.budget.unit: most}), _evaluations(first, objective)
    return Schedule(in_flight, spread_images, budget, first, evaluations)


def check_gradient(plan: StudyPlan, why_no_gradient: str | None) -> None:
    """Refuse an optimizer that follows gradients if there are none.

    Raises:
        StudySpecError: the optimizer needs a gradient, and a reason is given why there is none.
    """
    if why_no_gradient is not None and needs_gradient(plan.optimizer):
        raise StudySpecError(
            f"optimizers.{plan.optimizer.name}: follows the gradient of the loss, and {plan.spec.objective.file} gives "
            f"none: {why_no_gradient}; search it with CMA or LCSC"
        )


def _parallelism(plan: StudyPlan, objective: Objective) -> tuple[int, bool]:
    """How many trials are in flight, and whether their images are spread, for this optimizer and this objective."""
    spec, optimizer = plan.spec, plan.optimizer
    staged = isinstance(objective, StagedObjective)
    if not staged and (spec.spread == "images" or spec.pipeline is True):
        key = "spread: images" if spec.spread == "images" else "pipeline: true"
        raise StudySpecError(f"{key}: {spec.objective.file} evaluates a candidate as a whole; leave the key out")
    one_at_a_time = asks_one_at_a_time(optimizer)
    by_images = spec.spread == "images" or (spec.spread == "auto" and one_at_a_time)
    spread_images = staged and by_images and plan.workers > 1
    if asks_one_at_a_time(optimizer, strictly=True) and not spread_images:
        return 1, False
    overlaps = isinstance(objective, StagedObjective) and objective.overlaps
    waits = one_at_a_time or needs_gradient(optimizer)  # only one candidate's graph is kept at a time
    pipelined = (overlaps if spec.pipeline == "auto" else spec.pipeline) and not waits
    return most_in_flight(1 if spread_images else plan.workers, pipelined=pipelined), spread_images


def _evaluations(budget: BudgetSpec, objective: Objective) -> int:
    """The budget, counted in evaluations of the objective's usual number of images."""
    if budget.evaluations is not None:
        return budget.evaluations
    if objective.images_per_evaluation == 0:
        raise StudySpecError("budget.images: this objective samples no images; give budget.evaluations")
    return math.ceil((budget.images or 0) / objective.images_per_evaluation)


def plans(
    spec: StudySpec, directory: Path | None, *, optimizers: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[StudyPlan]:
    """The studies that a study file describes; ``optimizers`` and ``seeds`` choose among them.

    A seed that the file does not list is allowed; an optimizer that it does not list is run with its defaults.

    Raises:
        StudySpecError: an unknown optimizer or option, before anything is run.
    """
    listed = {optimizer.name: optimizer for optimizer in spec.optimizers}
    chosen = [
        listed.get(name) or parse_settings(OptimizerSpec, {"name": name}, source="--optimizer")
        for name in optimizers or listed
    ]
    for optimizer in chosen:
        configure(optimizer)
    return [
        StudyPlan(spec.model_copy(update={"optimizers": (optimizer,), "seeds": (seed,)}), directory)
        for seed in (seeds or spec.seeds)
        for optimizer in chosen
    ]


def raise_budget(plan: StudyPlan, total: int) -> StudyPlan:
    """The plan with a higher total, in the unit of its own budget.

    Raises:
        StudySpecError: it is lower than the stored one.
    """
    budget = plan.spec.budget
    if total < budget.total:
        raise StudySpecError(f"--budget: {plan.name} has a budget of {budget}, which cannot be lowered")
    return plan.changed(budget=BudgetSpec(**{budget.unit: total}))


def stored_plan(study: StoredStudy) -> StudyPlan:
    """The plan that a stored study was made from, so that it can be continued without its study file.

    Raises:
        StudyStoreError: it is not one of ours.
    """
    stored, experiment = study.attributes, study.name.rsplit("/", 2)[0]
    try:
        kept = dict(stored["specification"])
        if (cluster := stored.get(RAY)) is not None:
            kept["workers"] = cluster
        listed = {"optimizers": [kept.pop("optimizer")], "seeds": [kept.pop("seed")]}
        later = {"budget": stored["budget"], "failures": stored["failures"], "held_out": stored["held_out_plan"]}
        (spec,) = parse_studies({"name": experiment, **kept, **listed, **later}, source="its specification")
        directory, origin = stored["directory"], stored["origin"]
        beside = None if directory is None else Path(directory)
        return StudyPlan(spec, beside, None if origin is None else tuple(origin))
    except (KeyError, TypeError, ValueError, StudySpecError) as error:
        raise StudyStoreError(f"{study.name}: not a study of lcsc_opt, or of another version ({error})") from error


def check_space(spec: SpaceSpec, objective: Objective) -> None:
    """Refuse what :func:`build_space` would refuse, before any weights are read.

    Raises:
        ObjectiveError: principal directions of an objective that has no weights.
        StudySpecError: more directions than the checkpoints allow.
    """
    if spec.kind != "principal":
        return
    if objective.trajectory is None and objective.gram() is None:
        raise ObjectiveError("space.principal: this objective has no weights to take directions from; use affine")
    if not 1 <= (spec.directions or 0) < len(objective.steps):
        most = len(objective.steps) - 1
        raise StudySpecError(f"space.principal: expected 1 to {most} directions, got {spec.directions}")


def build_space(spec: SpaceSpec, objective: Objective, *, origin: Sequence[float] | None = None) -> CoefficientSpace:
    """The coefficient space that a specification names, over an objective's checkpoints.

    ``origin`` ``[K]`` replaces the origin of the specification. Errors are those of :func:`check_space`.
    """
    check_space(spec, objective)
    steps = objective.steps
    default = default_origin(steps) if spec.origin is None else ema_coefficients(steps, spec.origin)
    start = default if origin is None else np.array(origin, dtype=np.float64)
    if spec.kind == "affine":
        return AffineSpace(steps, start)
    if spec.kind == "convex":
        return ConvexSpace(steps, start)
    gram = objective.gram()
    assert gram is not None
    return PrincipalSpace.of(steps, start, gram, spec.directions or 0)
