"""What a study is made of: from a study file, from the database, or forked from another study."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lcsc_opt.base.errors import StudyMismatchError, StudySpecError, StudyStoreError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.reproducibility import environment
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_file import (
    BudgetSpec,
    FailureSpec,
    HeldOutSpec,
    NameSpec,
    ObjectiveSpec,
    OptimizerSpec,
    SpaceSpec,
    Spread,
    StudySpec,
    Tells,
)
from lcsc_opt.coefficients.profiles import default_origin, ema_coefficients
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace, ConvexSpace, PrincipalSpace, principal_basis
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation import workers_for_this_machine
from lcsc_opt.exports import chosen_trial
from lcsc_opt.objective.contract import Objective, StagedObjective
from lcsc_opt.optimizers import asks_one_at_a_time, cannot_ask_ahead, configure, needs_gradient
from lcsc_opt.search.runner import window


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """Everything that makes one study: one optimizer and one seed of a study file.

    ``directory`` is the study file's, where the objective is looked for first. ``origin`` is where a forked study
    starts, the best coefficients that it inherited. ``workers`` of a stored study are as many as it began with, since
    their number decides the sequence of candidates; ``devices`` are of this machine.
    """

    experiment: str
    objective: ObjectiveSpec
    space: SpaceSpec
    optimizer: OptimizerSpec
    seed: int
    workers: int
    tells: Tells
    failures: FailureSpec
    budget: BudgetSpec
    held_out: HeldOutSpec | None
    directory: Path | None
    origin: tuple[float, ...] | None = None
    devices: tuple[str, ...] = ()
    any_workers: bool = False  # a study that is there already keeps its own number
    spread: Spread = "auto"
    pipeline: Literal["auto"] | bool = "auto"

    @property
    def name(self) -> str:
        """What the Optuna study is called."""
        return f"{self.experiment}/{self.optimizer.name}/{self.seed}"

    def specification(self) -> dict[str, Any]:
        """JSON-able: what must stay the same for the study to be continued."""
        return {
            "objective": self.objective.model_dump(),
            "space": self.space.model_dump(),
            "optimizer": self.optimizer.model_dump(),
            "seed": self.seed,
            "workers": self.workers,
            "tells": self.tells,
        }

    def attributes(self, objective: Objective) -> dict[str, Any]:
        """The study's attributes when it is created."""
        return {
            "specification": self.specification(),
            "fingerprint": {"objective": objective.describe(), "environment": environment()},
            **dataclasses.asdict(parallelism(self, objective)),
            "budget": self.budget.model_dump(),
            "failures": self.failures.model_dump(),
            "optimizer_budget": self.budget.model_dump(),
            "held_out_plan": None if self.held_out is None else self.held_out.model_dump(),
            "origin": None if self.origin is None else list(self.origin),
            "steps": list(objective.steps),
            "directory": None if self.directory is None else str(self.directory),
        }


@dataclasses.dataclass(frozen=True)
class Parallelism:
    """How a study's candidates are evaluated at the same time; stored when the study begins, and kept.

    Attributes:
        window: how many trials may be between ask and tell.
        spread_images: whether the images of one candidate are spread over the workers, in place of candidates.
    """

    window: int
    spread_images: bool = False


def parallelism(plan: StudyPlan, objective: Objective) -> Parallelism:
    """What the settings mean for this optimizer and this objective.

    Raises:
        StudySpecError: images or stages are asked for that the objective does not have.
    """
    staged = isinstance(objective, StagedObjective)
    if not staged and (plan.spread == "images" or plan.pipeline is True):
        key = "spread: images" if plan.spread == "images" else "pipeline: true"
        raise StudySpecError(f"{key}: {plan.objective.file} evaluates a candidate as a whole; leave the key out")
    one_at_a_time = asks_one_at_a_time(plan.optimizer)
    if plan.workers > 1 and cannot_ask_ahead(plan.optimizer) and not (staged and plan.spread != "candidates"):
        raise StudySpecError(
            f"workers: {plan.optimizer.name} asks for one candidate after the other; give it workers: 1, or, where the "
            "objective samples images, spread: images"
        )
    by_images = plan.spread == "images" or (plan.spread == "auto" and one_at_a_time)
    spread_images = staged and by_images and plan.workers > 1
    overlaps = isinstance(objective, StagedObjective) and objective.overlaps
    waits = one_at_a_time or needs_gradient(plan.optimizer)  # the graph of one candidate is kept at a time
    pipelined = (overlaps if plan.pipeline == "auto" else plan.pipeline) and not waits
    return Parallelism(window(1 if spread_images else plan.workers, pipelined=pipelined), spread_images)


def parallelism_of(study: StoredStudy, plan: StudyPlan, objective: Objective) -> Parallelism:
    """What a stored study began with, or begins with now, as a fork does; it is stored then.

    Raises:
        StudyMismatchError: the study file now asks for something else.
        StudySpecError: images or stages are asked for that the objective does not have.
    """
    known = study.attributes
    wanted = parallelism(plan, objective)
    if known.get("window") is not None:
        stored = Parallelism(known["window"], bool(known["spread_images"]))
    elif any("inherited" not in trial.user_attrs for trial in study.trials()):
        stored = Parallelism(window(plan.workers))  # an early version had no other way than whole candidates
    else:
        study.set_attribute("spread_images", wanted.spread_images)
        study.set_attribute("window", wanted.window)  # last: it says that both are there
        return wanted
    if stored != wanted and (plan.spread, plan.pipeline) != ("auto", "auto"):
        raise StudyMismatchError(
            f"{study.name}: was begun with {_in_words(stored)}, and spread and pipeline now mean {_in_words(wanted)}; "
            "leave the keys out, or give the study another name"
        )
    return stored


def _in_words(parallel: Parallelism) -> str:
    divided = " and images spread over the workers" if parallel.spread_images else ""
    return f"{parallel.window} candidates at once{divided}"


def plans(
    spec: StudySpec, directory: Path | None, *, optimizers: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[StudyPlan]:
    """The studies that a study file stands for, or those of them with these optimizers and seeds.

    A seed that the file does not list is allowed; an optimizer that it does not list is run with its defaults.

    Raises:
        OptimizerError: naming an unknown optimizer or option, before anything is run.
    """
    devices = spec.workers if isinstance(spec.workers, tuple) else ()
    any_workers = spec.workers == "auto"
    workers = spec.workers if isinstance(spec.workers, int) else len(devices) or workers_for_this_machine()
    chosen = [_listed_or_default(spec, name) for name in optimizers] or list(spec.optimizers)
    for optimizer in chosen:
        configure(optimizer)
    return [
        StudyPlan(
            experiment=spec.name,
            objective=spec.objective,
            space=spec.space,
            optimizer=optimizer,
            seed=seed,
            workers=workers,
            devices=devices,
            any_workers=any_workers,
            spread=spec.spread,
            pipeline=spec.pipeline,
            tells=spec.tells,
            failures=spec.failures,
            budget=spec.budget,
            held_out=spec.held_out,
            directory=directory,
        )
        for seed in (seeds or spec.seeds)
        for optimizer in chosen
    ]


def _listed_or_default(spec: StudySpec, name: str) -> OptimizerSpec:
    listed = {optimizer.name: optimizer for optimizer in spec.optimizers}
    return listed.get(name) or parse_settings(OptimizerSpec, {"name": name}, source="--optimizer")


def raise_budget(plan: StudyPlan, total: int) -> StudyPlan:
    """The plan with a higher total, in the unit of its own budget.

    Raises:
        StudySpecError: when it is lower than the stored one.
    """
    if total < plan.budget.total:
        raise StudySpecError(f"--budget: {plan.name} has a budget of {plan.budget}, which cannot be lowered")
    return dataclasses.replace(plan, budget=BudgetSpec(**{plan.budget.unit: total}))


def stored_evaluations(url: str, name: str) -> int:
    """How many trials of a study are finished; 0 where the database or the study is not there yet."""
    try:
        study = StoredStudy.open(open_storage(url, write=False), name)
    except StudyStoreError:
        return 0
    return sum(trial.state.is_finished() for trial in study.trials())


def stored_plan(study: StoredStudy) -> StudyPlan:
    """The plan that a stored study was made from, so that it can be continued without its study file.

    Raises:
        StudyStoreError: when it is not one of ours.
    """
    stored = study.attributes
    experiment = study.name.rsplit("/", 2)[0]
    try:
        held_out, directory, origin = stored["held_out_plan"], stored["directory"], stored["origin"]
        return StudyPlan(
            experiment=experiment,
            objective=ObjectiveSpec(**stored["specification"]["objective"]),
            space=SpaceSpec(**stored["specification"]["space"]),
            optimizer=OptimizerSpec(**stored["specification"]["optimizer"]),
            seed=stored["specification"]["seed"],
            workers=stored["specification"]["workers"],
            tells=stored["specification"]["tells"],
            failures=FailureSpec(**stored["failures"]),
            budget=BudgetSpec(**stored["budget"]),
            held_out=None if held_out is None else HeldOutSpec(**held_out),
            directory=None if directory is None else Path(directory),
            origin=None if origin is None else tuple(origin),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StudyStoreError(f"{study.name}: not a study of lcsc_opt, or of another version ({error})") from error


def first_budget(study: StoredStudy) -> BudgetSpec:
    """The budget that a study began with, which its optimizer plans by; early versions stored it in evaluations."""
    stored = study.attributes["optimizer_budget"]
    return BudgetSpec(evaluations=stored) if isinstance(stored, int) else BudgetSpec(**stored)


def total_evaluations(budget: BudgetSpec, objective: Objective) -> int:
    """The budget as a number of evaluations of the objective's own number of images.

    Raises:
        StudySpecError: for a budget in images, when the objective samples none.
    """
    if budget.evaluations is not None:
        return budget.evaluations
    if objective.images_per_evaluation == 0:
        raise StudySpecError("budget.images: this objective samples no images; give budget.evaluations")
    return math.ceil((budget.images or 0) / objective.images_per_evaluation)


def build_space(spec: SpaceSpec, objective: Objective, *, origin: Sequence[float] | None = None) -> CoefficientSpace:
    """The coefficient space that a specification names, over an objective's checkpoints.

    ``origin`` ``[K]`` takes the place of the specification's.
    """
    steps = objective.steps
    start = _origin(spec, steps) if origin is None else np.array(origin, dtype=np.float64)
    if spec.kind == "affine":
        return AffineSpace(steps, start)
    if spec.kind == "convex":
        return ConvexSpace(steps, start)
    return PrincipalSpace(steps, start, principal_basis(objective.gram(), spec.directions or 0))


def _origin(spec: SpaceSpec, steps: tuple[int, ...]) -> Coefficients:
    return default_origin(steps) if spec.origin is None else ema_coefficients(steps, spec.origin)


def fork(
    source: StoredStudy,
    experiment: str,
    *,
    optimizer: OptimizerSpec | None = None,
    seed: int | None = None,
    budget: int | None = None,
) -> StudyPlan:
    """Create a study that takes over every finished trial of another one, without evaluating any again.

    The new study is called ``experiment/optimizer/seed``. Its optimizer is told the inherited trials in their order
    before it asks for its first candidate (those whose losses compare, unless it follows gradients), and it starts from
    the best of them; its budget counts new evaluations.

    Returns:
        The plan to run.

    Raises:
        StudyStoreError: when the source has no complete trial, or the new study exists.
    """
    origin = chosen_trial(source)[1]
    plan = stored_plan(source)
    plan = dataclasses.replace(
        plan,
        experiment=_valid_name(experiment),
        optimizer=optimizer or plan.optimizer,
        seed=plan.seed if seed is None else seed,
        budget=plan.budget if budget is None else BudgetSpec(**{plan.budget.unit: budget}),
        origin=tuple(origin.tolist()),
    )
    configure(plan.optimizer)
    same_way = plan.optimizer.name == stored_plan(source).optimizer.name  # another one may wait where this did not
    attributes = {
        **source.attributes,
        "specification": plan.specification(),
        "budget": plan.budget.model_dump(),
        "origin": origin.tolist(),
        "optimizer_budget": plan.budget.model_dump(),
        "forked_from": source.name,
        "search_ended": None,
        "held_out": None,
        **({} if same_way else {"window": None, "spread_images": None}),
    }
    source.copy_to(plan.name, attributes)
    return plan


def _valid_name(experiment: str) -> str:
    return parse_settings(NameSpec, {"name": experiment}, source="the new experiment").name
