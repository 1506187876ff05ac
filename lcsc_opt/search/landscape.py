"""Landscapes: the loss on the plane through three models, as an ordinary study that is logged and continued.

The study is called ``experiment/Landscape/seed``. It has the objective, the noise and the failure policy of the study
it was made from, so its losses can be compared with those of the experiment's searches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudySpecError, StudyStoreError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.reproducibility import decisive, describe_difference, environment
from lcsc_opt.base.study_file import BudgetSpec, ObjectiveSpec, OptimizerSpec
from lcsc_opt.coefficients.plane import (
    DEFAULT_MARGIN,
    DEFAULT_SIZE,
    LANDSCAPE,
    PLANE_ATTRIBUTE,
    Corner,
    Plane,
    check_corners,
    ema_corner,
    grid_positions,
)
from lcsc_opt.coefficients.profiles import ema_coefficients, window_ema_rates
from lcsc_opt.database.comparing import best_ema
from lcsc_opt.database.names import split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy, study_names
from lcsc_opt.objective.contract import Objective
from lcsc_opt.optimizers import configure
from lcsc_opt.search.experiment import Experiment
from lcsc_opt.search.plan import StudyPlan, stored_plan

STOP_SHARE = 0.9  # of failed points, since models far from the corners often cannot sample


@dataclasses.dataclass(frozen=True)
class LandscapeOptions:
    """The options of a landscape; ``None`` takes the stored landscape's value, or the default for a new one.

    Attributes:
        corners: three training steps, or ``ema:RATE``.
        size: points on each side of the grid.
        margin: how far it reaches beyond the corners, in units of their distance.
        images: sampled at each point.
    """

    corners: tuple[Corner, ...] | None = None
    size: int | None = None
    margin: float | None = None
    images: int | None = None


def run_landscape(
    storage: RDBStorage,
    source: StoredStudy,
    options: LandscapeOptions | None = None,
    *,
    seed: int = 0,
    take_over: bool = False,
    accept_environment: bool = False,
) -> tuple[str, str]:
    """Evaluate the points of a landscape that are not evaluated yet, with the objective of ``source``.

    Args:
        storage: of the studies.
        source: any search of the experiment.
        options: what to draw.
        seed: tells several landscapes of one experiment apart.
        take_over: take the landscape from a process that is dead but still holds it.
        accept_environment: continue with other packages or another BLAS than the study began with.

    Returns:
        The landscape's name, and one line for people with the result.

    Raises:
        StudyStoreError: the stored landscape has other options, or the objective or environment has changed.
        StudyStoreError: ``source`` is a landscape itself, or not one of ours.
    """
    plan = landscape_plan(storage, source, LandscapeOptions() if options is None else options, seed=seed)
    experiment = Experiment(storage, plan)
    if plan.name not in study_names(storage):
        _create(experiment, plan, source, accept_environment=accept_environment)
    return plan.name, experiment.run(plan, take_over=take_over, accept_environment=accept_environment)


def landscape_plan(storage: RDBStorage, source: StoredStudy, options: LandscapeOptions, *, seed: int = 0) -> StudyPlan:
    """The plan of the stored landscape with that seed, or of a new one. Writes nothing, and loads no objective.

    Raises:
        StudyStoreError: the stored landscape has other options.
        StudyStoreError: ``source`` is a landscape itself, or not one of ours.
    """
    experiment, optimizer, _ = split_name(source.name)
    if optimizer == LANDSCAPE:
        raise StudyStoreError(
            f"{source.name}: is a landscape; give a search of {experiment}, or continue it: lcsc resume {source.name}"
        )
    of_source = stored_plan(source)
    name = f"{experiment}/{LANDSCAPE}/{seed}"
    if name in study_names(storage):
        return _stored(StoredStudy.open(storage, name), of_source, options)
    steps = tuple(source.attributes["steps"])
    corners = options.corners or default_corners_of(storage, experiment, steps)
    size = DEFAULT_SIZE if options.size is None else options.size
    margin = DEFAULT_MARGIN if options.margin is None else options.margin
    settings: dict[str, Any] = {"corners": list(check_corners(corners)), "size": size, "margin": float(margin)}
    wanted = OptimizerSpec(name=LANDSCAPE, options=settings)
    configure(wanted)
    Plane.through(corners, steps)
    spec = of_source.spec
    plan = of_source.changed(
        objective=_with_images(spec.objective, options.images),
        optimizers=(wanted,),
        seeds=(seed,),
        failures=spec.failures.model_copy(update={"stop_share": STOP_SHARE}),
        budget=BudgetSpec(evaluations=len(grid_positions(size, margin))),
        held_out=None,
    )
    return dataclasses.replace(plan, origin=None)


def _with_images(objective: ObjectiveSpec, images: int | None) -> ObjectiveSpec:
    if images is None:
        return objective
    return ObjectiveSpec(file=objective.file, settings={**objective.settings, "images": images})


def _stored(landscape: StoredStudy, of_source: StudyPlan, options: LandscapeOptions) -> StudyPlan:
    """The stored plan, if it agrees with the options; else raises StudyStoreError."""
    plan = stored_plan(landscape)
    stored = {**plan.optimizer.options, "images": _images_of(plan)}
    asked = {
        "corners": None if options.corners is None else list(options.corners),
        **{"size": options.size, "margin": options.margin, "images": options.images},
    }
    changed = [
        f"{name} is {stored.get(name)}, not {value}"
        for name, value in asked.items()
        if value is not None and stored.get(name) != value
    ]
    if _without_images(plan) != _without_images(of_source):
        changed.append("its objective is not that of the given study")
    if changed:
        raise StudyStoreError(
            f"{landscape.name}: exists with other options: {'; '.join(changed)}. Leave them out to continue it, or "
            "begin another one with --seed"
        )
    return plan


def _without_images(plan: StudyPlan) -> tuple[str, dict[str, Any]]:
    objective = plan.spec.objective
    return objective.file, {name: value for name, value in objective.settings.items() if name != "images"}


def default_corners_of(storage: RDBStorage, experiment: str, steps: tuple[int, ...]) -> tuple[Corner, ...]:
    """Three EMA rates of the experiment's EMA grid, else the first, the middle and the last checkpoint.

    The three rates are the one nearest to EMA* and those two places below and above it: the plane lies around EMA*.

    Raises:
        StudySpecError: there are fewer than three checkpoints.
    """
    reader = HistoryReader(storage)
    grid = best_ema([study for study in reader.read(experiment) if study.steps == steps])
    if grid is not None and (found := reader.answer(grid)) is not None:
        listed: Any = stored_plan(StoredStudy.open(storage, grid.study)).optimizer.options.get("rates")
        rates = sorted({float(rate) for rate in listed} if listed else window_ema_rates(steps))
        if len(rates) >= 3:
            nearest = min(rates, key=lambda rate: float(np.abs(ema_coefficients(steps, rate) - found).sum()))
            one, two, three = _around(rates, nearest)
            return ema_corner(one), ema_corner(two), ema_corner(three)
    if len(steps) < 3:
        raise StudySpecError(f"a plane needs three checkpoints, and there are {len(steps)}; give EMAs as --corners")
    return steps[0], steps[len(steps) // 2], steps[-1]


def _around(rates: Sequence[float], best: float) -> tuple[float, float, float]:
    """Three of the rates: the best one between two others, unless it is at an end."""
    place = rates.index(best)
    low, high = max(place - 2, 0), min(place + 2, len(rates) - 1)
    middle = place if low < place < high else (low + high) // 2
    return rates[low], rates[middle], rates[high]


def _create(experiment: Experiment, plan: StudyPlan, source: StoredStudy, *, accept_environment: bool) -> None:
    """Check that the objective is that of ``source``, then store the new study with what its projections need."""
    stored = source.attributes["fingerprint"]
    difference = describe_difference(*(decisive(known) for known in (stored["environment"], environment())))
    if difference and not accept_environment:
        raise StudyStoreError(
            f"{source.name}: was begun in another environment, so its losses may not be comparable: {difference}. Go "
            "back to it, or draw the landscape in this one with --accept-environment"
        )
    objective = experiment.objective
    described = objective.describe()
    if _images_of(plan) != _images_of(stored_plan(source)):
        if objective.images_per_evaluation != _images_of(plan):
            raise StudySpecError("--images: this objective does not sample as many images as it is told to")
        described = {**described, "images": stored["objective"].get("images")}
    source.require("fingerprint", described, part="objective")
    source.require("fingerprint", dict(objective.code), part="code")
    attributes = {
        **plan.attributes(objective),
        PLANE_ATTRIBUTE: _projection(plan, objective),
        "landscape_of": source.name,
    }
    StoredStudy.open_or_create(experiment.storage, plan.name, attributes)


def _images_of(plan: StudyPlan) -> Any:
    return plan.spec.objective.settings.get("images")


def _projection(plan: StudyPlan, objective: Objective) -> dict[str, Any]:
    """``[2, K]`` inner products for projections in weight space, if the objective has weights."""
    plane = Plane.through(check_corners(plan.optimizer.options["corners"]), objective.steps)
    if objective.trajectory is not None:
        notice(f"{plan.name}: reading every checkpoint once, so that candidates can be projected on the plane")
    gram = objective.gram()
    if gram is None:
        return {"space": "coefficients", "products": None}
    return {"space": "weights", "products": plane.products(np.asarray(gram, dtype=np.float64)).tolist()}
