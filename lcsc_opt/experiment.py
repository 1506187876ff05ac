"""From a study file to finished studies: which studies it stands for, what each is made of, and running them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nevergrad.optimization.base import Optimizer
from optuna.storages import RDBStorage

from lcsc_opt.analysis.comparison import BASELINES, summarize
from lcsc_opt.catalog import load_objective
from lcsc_opt.coefficients import (
    AffineSpace,
    CoefficientSpace,
    ConvexSpace,
    PrincipalSpace,
    default_origin,
    ema_coefficients,
    principal_basis,
)
from lcsc_opt.database import open_storage
from lcsc_opt.environment import decisive, describe_difference, environment
from lcsc_opt.errors import StudyMismatchError, StudySpecError, StudyStoreError
from lcsc_opt.evaluation import Evaluator, InProcessEvaluator, ProcessEvaluator
from lcsc_opt.held_out import score_held_out
from lcsc_opt.objective import Objective
from lcsc_opt.optimizers import build_optimizer, configure
from lcsc_opt.progress import progress
from lcsc_opt.records import Coefficients
from lcsc_opt.results import attach_figures, chosen_trial
from lcsc_opt.runner import Search
from lcsc_opt.study_spec import (
    BudgetSpec,
    FailureSpec,
    HeldOutSpec,
    NameSpec,
    ObjectiveSpec,
    OptimizerSpec,
    SpaceSpec,
    StudySpec,
    Tells,
    parse_settings,
)
from lcsc_opt.study_store import StoredStudy, study_names


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """Everything that makes one study: one optimizer and one seed of a study file.

    ``directory`` is the study file's, where the objective is looked for first. ``origin`` is where a forked study
    starts, the best coefficients that it inherited.
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
            "budget": self.budget.model_dump(),
            "failures": self.failures.model_dump(),
            "optimizer_budget": total_evaluations(self.budget, objective),
            "held_out_plan": None if self.held_out is None else self.held_out.model_dump(),
            "origin": None if self.origin is None else list(self.origin),
            "steps": list(objective.steps),
            "directory": None if self.directory is None else str(self.directory),
        }


def plans(
    spec: StudySpec, directory: Path | None, *, optimizers: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[StudyPlan]:
    """The studies that a study file stands for, or those of them with these optimizers and seeds.

    A seed that the file does not list is allowed; an optimizer that it does not list is run with its defaults.

    Raises:
        OptimizerError: naming an unknown optimizer or option, before anything is run.
    """
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
            workers=spec.workers,
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


def total_evaluations(budget: BudgetSpec, objective: Objective) -> int:
    """The budget as a number of evaluations.

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


class Experiment:
    """Runs plans that share an objective, which is loaded when the first of them needs it."""

    def __init__(self, storage: RDBStorage, plan: StudyPlan) -> None:
        self.storage = storage
        self._spec, self._directory = plan.objective, plan.directory

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective; loading it may train or read a model."""
        return load_objective(self._spec, beside=self._directory)

    def run(self, plan: StudyPlan, *, take_over: bool = False, accept_environment: bool = False) -> str:
        """Search until the plan's budget is spent, then report on held-out noise. Does only what is not done yet.

        Args:
            plan: what to run.
            take_over: from another process that holds the study and is dead, though it does not look so.
            accept_environment: continue though packages or BLAS are not those that the study was begun with.

        Returns:
            One line for people: what it came to.

        Raises:
            StudyHeldError: when another process runs this study.
            StudyMismatchError: when the stored study was made with other settings, or in another environment.
        """
        if plan.name in study_names(self.storage):
            study = StoredStudy.open(self.storage, plan.name)
            study.require("specification", plan.specification())
            if is_finished(study, plan):
                return f"finished already; {_outcome(study)}"
            with study.hold(take_over=take_over):
                return self._finish(study, plan, accept_environment=accept_environment)
        study = StoredStudy.open_or_create(self.storage, plan.name, plan.attributes(self.objective))
        with study.hold(take_over=take_over):
            return self._finish(study, plan, accept_environment=accept_environment)

    def _finish(self, study: StoredStudy, plan: StudyPlan, *, accept_environment: bool) -> str:
        study.require("specification", plan.specification())
        self._check_environment(study, accept=accept_environment)
        study.require("fingerprint", self.objective.describe(), part="objective")
        if not search_ended(study, plan):
            self._search(study, plan)
        if plan.held_out is not None and study.attributes.get("held_out") is None:
            self.report(study, images=plan.held_out.images, top=plan.held_out.top)
        return _outcome(study)

    def _check_environment(self, study: StoredStudy, *, accept: bool) -> None:
        """Other packages or another BLAS may give other numbers, and would do so silently."""
        fingerprint, now = study.attributes["fingerprint"], environment()
        difference = describe_difference(*(decisive(known) for known in (fingerprint["environment"], now)))
        if not difference:
            return
        if not accept:
            raise StudyMismatchError(
                f"{study.name}: begun in another environment: {difference}. Go back to it, or continue in this one "
                "with --accept-environment"
            )
        study.set_attribute("fingerprint", {**fingerprint, "environment": now})

    def report(self, study: StoredStudy, *, images: int, top: int) -> dict[str, Any]:
        """Choose among the best trials on other noise, report on yet other noise, and store the figures."""
        report = score_held_out(study, self.objective, images=images, top=top)
        attach_figures(self.storage, study, self.objective)
        return report

    def _search(self, study: StoredStudy, plan: StudyPlan) -> None:
        attributes = study.attributes
        evaluations = total_evaluations(plan.budget, self.objective)
        if plan.budget.model_dump() != attributes["budget"]:
            study.set_attribute("budget", plan.budget.model_dump())
            study.set_attribute("held_out", None)  # of the shorter search
        before = attributes["fingerprint"]["environment"]
        optimizer = self._optimizer(plan, attributes["optimizer_budget"])
        evaluator = self._evaluator(plan)
        try:
            search = Search(
                study,
                optimizer,
                evaluator,
                evaluations=evaluations,
                tells=plan.tells,
                failures=plan.failures,
                describe_difference=lambda: describe_difference(before, environment()),
            )
            _run_with_progress(search, study.name, evaluations)
        finally:
            evaluator.close()
        study.set_attribute("search_ended", {"evaluations": search.told, "exhausted": search.told < evaluations})

    def _optimizer(self, plan: StudyPlan, budget: int) -> Optimizer:
        affine = SpaceSpec()  # a grid's profiles are in it exactly; another space may not reach them
        spec = affine if plan.optimizer.name in BASELINES else plan.space
        space = build_space(spec, self.objective, origin=plan.origin)
        return build_optimizer(plan.optimizer, space, budget=budget, workers=plan.workers, seed=plan.seed)

    def _evaluator(self, plan: StudyPlan) -> Evaluator:
        if plan.workers == 1:
            return InProcessEvaluator(self.objective)
        load = functools.partial(load_objective, plan.objective, beside=plan.directory)
        return ProcessEvaluator(load, plan.workers)


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
    before it asks for its first candidate, and it starts from the best of them; its budget counts new evaluations.

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
    attributes = {
        **source.attributes,
        "specification": plan.specification(),
        "budget": plan.budget.model_dump(),
        "origin": origin.tolist(),
        "optimizer_budget": _scaled_budget(source, plan),
        "forked_from": source.name,
        "search_ended": None,
        "held_out": None,
    }
    source.copy_to(plan.name, attributes)
    return plan


def _scaled_budget(source: StoredStudy, plan: StudyPlan) -> int:
    """The new budget in evaluations, told by the old one without loading the objective."""
    if plan.budget.evaluations is not None:
        return plan.budget.evaluations
    old = BudgetSpec(**source.attributes["budget"])
    evaluations = int(source.attributes["optimizer_budget"])
    return math.ceil(evaluations * (plan.budget.images or 0) / (old.images or 1))


def _valid_name(experiment: str) -> str:
    return parse_settings(NameSpec, {"name": experiment}, source="the new experiment").name


def _run_with_progress(search: Search, name: str, evaluations: int) -> None:
    stored = search.stored
    with progress(name, evaluations, done=stored) as advance:

        def on_tell(search: Search) -> None:
            best = "" if search.best is None else f"best {search.best[0]:.4g} in trial {search.best[1]}"
            failed = f", {search.failures} failed" if search.failures else ""
            advance(int(search.told > stored), note=f"{best}{failed}")

        search.run(on_tell)


def _outcome(study: StoredStudy) -> str:
    summary = summarize(study)
    searched = "no complete trial" if summary.searched is None else f"best {summary.searched:.4g}"
    held_out = "" if summary.held_out is None else f", held-out {summary.held_out:.4g}"
    return f"{searched}{held_out} after {summary.evaluations} evaluations"


def search_ended(study: StoredStudy, plan: StudyPlan) -> bool:
    """Whether the search, without its held-out report, has nothing left to do for this budget."""
    ended = study.attributes.get("search_ended")
    if ended is None:
        return False
    if ended["exhausted"]:
        return True
    if plan.budget.evaluations is not None:
        return bool(ended["evaluations"] >= plan.budget.evaluations)
    return bool(plan.budget.model_dump() == study.attributes["budget"])


def is_finished(study: StoredStudy, plan: StudyPlan) -> bool:
    """Whether nothing is left to do for a plan, found out without loading its objective."""
    reported = plan.held_out is None or study.attributes.get("held_out") is not None
    return reported and search_ended(study, plan)


def experiments(plans_to_run: Sequence[StudyPlan], storage: RDBStorage) -> Iterator[tuple[Experiment, StudyPlan]]:
    """Each plan with the experiment that runs it; plans of one objective share it."""
    known: dict[str, Experiment] = {}
    for plan in plans_to_run:
        key = f"{plan.directory}:{plan.objective.model_dump_json()}"
        yield known.setdefault(key, Experiment(storage, plan)), plan
