"""The specification of one study: one optimizer and one seed of a study file, or of a stored study."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcsc_opt.base.errors import ObjectiveError, StudySpecError, StudyStoreError
from lcsc_opt.base.paths import KnownCheckpoints
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_file import BudgetSpec, OptimizerSpec, RayWorkers, SpaceSpec, StudySpec, parse_studies
from lcsc_opt.base.sweep import split_point
from lcsc_opt.coefficients.plane import LANDSCAPE
from lcsc_opt.coefficients.profiles import default_origin, ema_coefficients
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace, ConvexSpace, PrincipalSpace
from lcsc_opt.database.names import BASELINES, split_name
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.optimizers.registry import asks_one_at_a_time, configure, needs_gradient

FEWEST_REAL_IMAGES = 10  # for each feature, where each layer may have coefficients of its own
CHECKPOINTS = "checkpoints"  # the setting that names the checkpoints
_CHOOSING = ("key", "select", "stored")  # settings that say which checkpoints are used, and how they are packed


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """One study: one optimizer and one seed of a specification.

    Attributes:
        spec: what was asked for, with that optimizer and that seed only.
        directory: the study file's folder, where the objective is looked for first.
        origin: ``[K]`` or ``[S, K]``, where a forked study starts: the best coefficients that it inherited.
    """

    spec: StudySpec
    directory: Path | None = None
    origin: Sequence[Any] | None = None

    @classmethod
    def of(cls, study: StoredStudy) -> StudyPlan:
        """The plan that a stored study was made from, so that it can be continued without its study file.

        Raises:
            StudyStoreError: it is not one of ours.
        """
        stored, experiment = study.attributes, study.name.rsplit("/", 2)[0]
        try:
            kept = dict(stored["specification"])
            kept["workers"] = stored.get("ray") or kept["workers"]
            listed = {"optimizers": [kept.pop("optimizer")], "seeds": [kept.pop("seed")]}
            later = {"budget": stored["budget"], "failures": stored["failures"], "held_out": stored["held_out_plan"]}
            later |= {"log": stored.get("log", []), "notify": stored.get("notify")}
            [spec] = parse_studies({"name": experiment, **kept, **listed, **later}, source="its specification")
            directory, origin = stored["directory"], stored["origin"]
            return cls(spec, directory and Path(directory), origin)
        except (KeyError, TypeError, ValueError, StudySpecError) as error:
            raise StudyStoreError(f"{study.name}: not a study of lcsc_opt, or of another version ({error})") from error

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
    def ray(self) -> RayWorkers | None:
        """The workers of a Ray cluster; ``None`` if this machine evaluates."""
        return self.spec.workers if isinstance(self.spec.workers, RayWorkers) else None

    @property
    def workers(self) -> int:
        """How many processes evaluate; ``auto`` is one for each GPU, or one."""
        asked = self.spec.workers
        if isinstance(asked, RayWorkers):
            return asked.ray
        if asked == "auto":
            from lcsc_opt.base import accelerator

            return max(len(accelerator.names()), 1)
        return asked if isinstance(asked, int) else len(asked)

    @property
    def objective_key(self) -> str:
        """Plans with the same key have the same objective."""
        return f"{self.directory}:{self.spec.objective.model_dump_json()}:{self.spec.space.rows}"

    def changed(self, **changes: Any) -> StudyPlan:
        """The same plan with other values in its specification."""
        return dataclasses.replace(self, spec=self.spec.model_copy(update=changes))

    def with_budget(self, total: int) -> StudyPlan:
        """The plan with a higher total, in the unit of its own budget.

        Raises:
            StudySpecError: it is lower than the stored one.
        """
        budget = self.spec.budget
        if total < budget.total:
            raise StudySpecError(f"--budget: {self.name} has a budget of {budget}, which cannot be lowered")
        return self.changed(budget=BudgetSpec(**{budget.unit: total}))

    def specification(self) -> dict[str, Any]:
        """JSON-able: what must stay the same for the study to be continued."""
        kept = self.spec.model_dump(include={"objective", "space", "spread", "pipeline", "tells"})
        return {**kept, "optimizer": self.optimizer.model_dump(), "seed": self.seed, "workers": self.workers}

    def environments(self) -> list[Mapping[str, str]]:
        """The environment variables of each worker; empty if none must be set.

        Raises:
            StudySpecError: both the settings and the workers (or Ray) choose the device.
            ObjectiveError: a worker's device is not there.
        """
        device = str(self.spec.objective.settings.get("device", "auto"))
        if self.ray is not None:
            if device.partition(":")[2] not in ("", "0"):
                raise StudySpecError(f"objective.settings.device {device}: Ray gives each worker its own; leave it out")
            return []
        devices = self.spec.workers if isinstance(self.spec.workers, tuple) else ()
        if device != "cpu" and ":" not in device:
            if self.workers == 1 and not devices:
                return []
            from lcsc_opt.base import accelerator  # which imports torch

            return [*accelerator.environments(self.workers, devices)]
        if devices:
            names = ", ".join(devices)
            raise StudySpecError(f"workers: {names} and objective.settings.device {device}: give one of them only")
        return []

    def following(self) -> dict[str, Any]:
        """The study's attributes that follow the study file: it may be edited, and the checkpoints may have moved."""
        held_out = self.spec.held_out
        return {
            "specification": self.specification(),
            "failures": self.spec.failures.model_dump(),
            "held_out_plan": held_out and held_out.model_dump(),
            "ray": self.ray and self.ray.model_dump(),
            "log": list(self.spec.log),
            "notify": self.spec.notify,
        }

    def beginning(self, objective: Objective) -> dict[str, Any]:
        """The study's attributes that its search begins with, and keeps."""
        budget, groups = self.spec.budget.model_dump(), objective.layer_groups
        return {
            "budget": budget,
            "optimizer_budget": budget,
            "origin": self.origin,
            "parallelism": self._parallelism(objective),
            "holds_out": objective.why_nothing_held_out() is None,
            "steps": list(objective.steps),
            "layer_groups": None if groups is None else list(groups.names),
            "directory": self.directory and str(self.directory),
        }

    def is_searched(self, stored: Mapping[str, Any]) -> bool:
        """Whether the search of the study with these attributes has nothing left to do for this plan's budget."""
        ended, budget = stored.get("search_ended"), self.spec.budget
        if ended is None or ended["exhausted"]:
            return ended is not None
        if budget.evaluations is not None:
            return bool(ended["evaluations"] >= budget.evaluations)
        return bool((stored["budget"].get("images") or 0) >= budget.total)

    def is_finished(self, stored: Mapping[str, Any]) -> bool:
        """Whether nothing is left to do, neither of the search nor of the held-out report."""
        reported = self.spec.held_out is None or stored.get("held_out") is not None or stored.get("holds_out") is False
        return reported and self.is_searched(stored)

    def known_checkpoints(self, studies: Mapping[str, Mapping[str, Any]]) -> KnownCheckpoints | None:
        """The checkpoints of the first stored study of this experiment with this objective, if there is one.

        All studies of an experiment use the same checkpoints; otherwise they could not be compared. Points of a sweep
        that name the same files use the same checkpoints, too.

        Args:
            studies: name → attributes of all stored studies.
        """
        experiment, spec = self.spec.name, self.spec.objective
        for name, stored in studies.items():
            if split_point(split_name(name)[0])[0] != self.spec.sweep:
                continue
            kept = (stored.get("specification") or {}).get("objective")
            if not (stored.get("checkpoints") and kept and kept["file"] == spec.file):
                continue
            before = kept["settings"]
            moved = before.get(CHECKPOINTS) != spec.settings.get(CHECKPOINTS)
            same = all(before.get(setting) == spec.settings.get(setting) for setting in _CHOOSING)
            if same and not (moved and split_name(name)[0] != experiment):
                return KnownCheckpoints(stored["checkpoints"], tuple(stored["steps"]), moved)
        return None

    def check_gradient(self, why_none: Callable[[], str | None]) -> None:
        """Refuse an optimizer that follows gradients if there are none.

        Raises:
            StudySpecError: the optimizer needs a gradient, and ``why_none``, which is asked only then, says why there
                is none.
        """
        if needs_gradient(self.optimizer) and (reason := why_none()) is not None:
            what = f"follows the gradient of the loss, and {self.spec.objective.file} gives none: {reason}"
            raise StudySpecError(f"optimizers.{self.optimizer.name}: {what}; search it with CMA or LCSC")

    def check(self, objective: Objective) -> None:
        """Refuse an objective that this plan cannot search, before any weights are read.

        Raises:
            StudySpecError: it gives no gradient, no images or no stages, or has too few checkpoints for the space.
            ObjectiveError: principal directions of an objective that has no weights.
        """
        self.check_gradient(objective.why_no_gradient)
        spec, file, space = self.spec, self.spec.objective.file, self.spec.space
        if spec.budget.unit == "images" and not objective.images_per_evaluation:
            raise StudySpecError("budget.images: this objective samples no images; give budget.evaluations")
        if not isinstance(objective, StagedObjective) and (spec.spread == "images" or spec.pipeline is True):
            key = "spread: images" if spec.spread == "images" else "pipeline: true"
            raise StudySpecError(f"{key}: {file} evaluates a candidate as a whole; leave the key out")
        if space.directions is None:
            return
        if objective.trajectory is None and objective.gram() is None:
            raise ObjectiveError("space.principal: this objective has no weights to take directions from; use affine")
        if space.directions >= len(objective.steps):
            most = len(objective.steps) - 1
            raise StudySpecError(f"space.principal: expected 1 to {most} directions, got {space.directions}")

    def advice(self, objective: Objective) -> Iterator[str]:
        """What speaks against a row for each layer group, a line each (measured in docs/optimizers.md)."""
        if self.spec.space.rows is None or self.optimizer.name in (*BASELINES, LANDSCAPE):
            return
        few = objective.real_images_per_feature
        if not needs_gradient(self.optimizer):
            yield f"{self.name}: without a gradient, more rows do not pay; leave space.rows out, or take LCSCGradient"
        elif few is not None and few < FEWEST_REAL_IMAGES:
            what = f"{few:.1f} real images for each feature; with fewer than about {FEWEST_REAL_IMAGES}"
            yield f"{self.name}: the reference has {what}, many rows fit them alone; leave space.rows out"

    def space(self, objective: Objective) -> CoefficientSpace:
        """The coefficient space over an objective's checkpoints.

        Grids get the affine space, which contains their profiles exactly; another space may not reach them.
        """
        spec = SpaceSpec() if self.optimizer.name in (*BASELINES, LANDSCAPE) else self.spec.space
        steps = objective.steps
        default = default_origin(steps) if spec.origin is None else ema_coefficients(steps, spec.origin)
        start = default if self.origin is None else np.array(self.origin, dtype=np.float64)
        if spec.rows is not None and (groups := objective.layer_groups) is not None:
            start = np.broadcast_to(start, (len(groups), len(steps))).copy()
        if spec.kind == "affine":
            return AffineSpace(steps, start)
        if spec.kind == "convex":
            return ConvexSpace(steps, start)
        gram = objective.gram()
        assert gram is not None  # checked
        return PrincipalSpace.of(steps, start, gram, spec.directions or 0)

    def most(self, objective: Objective) -> BudgetSpec:
        """The budget, but no more than a grid has candidates."""
        budget = self.spec.budget
        price = objective.images_per_evaluation if budget.unit == "images" else 1
        profiles = getattr(configure(self.optimizer)[0], "profiles", None)  # of a grid
        candidates = None if profiles is None else len(profiles(objective.steps))
        return budget if candidates is None else BudgetSpec(**{budget.unit: min(budget.total, price * candidates)})

    def _parallelism(self, objective: Objective) -> dict[str, Any]:
        """``in_flight``: how many trials may be between ask and tell; ``spread_images``: whether workers share them."""
        spec, optimizer = self.spec, self.optimizer
        staged = isinstance(objective, StagedObjective)
        one_at_a_time = asks_one_at_a_time(optimizer)
        by_images = spec.spread == "images" or (spec.spread == "auto" and one_at_a_time)
        spread_images = staged and by_images and self.workers > 1
        if asks_one_at_a_time(optimizer, strictly=True) and not spread_images:
            return {"in_flight": 1, "spread_images": False}
        overlaps = isinstance(objective, StagedObjective) and objective.overlaps
        waits = one_at_a_time or needs_gradient(optimizer)  # only one candidate's graph is kept at a time
        pipelined = (overlaps if spec.pipeline == "auto" else spec.pipeline) and not waits
        count = most_in_flight(1 if spread_images else self.workers, pipelined=pipelined)
        return {"in_flight": count, "spread_images": spread_images}


def most_in_flight(workers: int, *, pipelined: bool = False) -> int:
    """How many trials may be between ask and tell: one for one worker, and two each if their stages overlap.

    Else 1.5 each, which keeps workers busy while tells wait for their turn and candidates are written.
    """
    if pipelined:
        return 2 * workers
    return 1 if workers == 1 else math.ceil(1.5 * workers)


def plans(
    specs: Sequence[StudySpec],
    directory: Path | None,
    *,
    optimizers: Sequence[str] = (),
    seeds: Sequence[int] = (),
    budget: int | None = None,
) -> list[StudyPlan]:
    """The studies that a study file describes, for a sweep one point after the other.

    Args:
        specs: the study file, or all points of its sweep.
        directory: its folder.
        optimizers: only these; one that the file does not list is run with its defaults.
        seeds: only these; the file need not list them.
        budget: another total for each study, in the unit of its own budget.

    Raises:
        StudySpecError: an unknown optimizer or option; or ``budget`` is given, and the sweep varies the budget.
    """
    if budget is not None:
        if varied := [key for key in specs[0].vary if key.split(".")[0] == "budget"]:
            raise StudySpecError(f"--budget: the study file varies {varied[0]}; give {varied[0]}={budget} instead")
        specs = [spec.model_copy(update={"budget": BudgetSpec(**{spec.budget.unit: budget})}) for spec in specs]
    found = []
    for spec in specs:
        listed = {optimizer.name: optimizer for optimizer in spec.optimizers}
        chosen = [
            listed.get(name) or parse_settings(OptimizerSpec, {"name": name}, source="--optimizer")
            for name in optimizers or listed
        ]
        for optimizer in chosen:
            configure(optimizer)
        whole = StudyPlan(spec, directory)
        found += [whole.changed(optimizers=(one,), seeds=(seed,)) for seed in seeds or spec.seeds for one in chosen]
    return found
