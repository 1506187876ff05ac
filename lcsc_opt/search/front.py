"""A front: searches with several weights of a fidelity term. A lower FID may cost quality of single images.

At weight w the loss is the study's own plus w times ``near``, the mean distance of an image to its nearest real one.
The studies are points of a sweep: ``digits/LCSCGradient/0`` gives ``digits,near=3/LCSCGradient/0``. Beside them, at
weight zero, EMAs and other plain averages are measured: they trade fidelity for diversity, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.base.study_file import BudgetSpec, HeldOutSpec, NameSpec, ObjectiveSpec, OptimizerSpec
from lcsc_opt.base.sweep import split_point
from lcsc_opt.coefficients.profiles import plain_averages
from lcsc_opt.database.comparing import EMA_GRID
from lcsc_opt.database.names import BASELINES, TERMS
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.metrics.names import MetricName, parse_loss
from lcsc_opt.optimizers import configure
from lcsc_opt.search.plan import StudyPlan, stored_plan

DEFAULT_WEIGHTS = (0.0, 3.0, 6.0, 12.0)
SEEN = ("fid", "precision", "recall", "near", "sliced")  # the first three are axes, the others are judges


def front_plans(
    study: StoredStudy,
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    *,
    term: str = TERMS[0],
    budget: int | None = None,
) -> list[StudyPlan]:
    """The studies of a front: plain averages first, then the study's own search at each weight.

    Each has the study's optimizer, seed, space and settings, but not its ``keep``: here the weight decides. FID,
    precision, recall and other judges are reported on noise that no search sees.

    Args:
        study: any search, finished or not, also a point of a front.
        weights: from zero, in the unit of the study's loss.
        term: ``near`` or ``hinge``.
        budget: another total for each search, in the unit of the study's.

    Raises:
        StudySpecError: a weight or the term is not allowed, or the study is a baseline.
        StudyStoreError: the study is not one of ours.
    """
    _check(weights, term)
    of_study = stored_plan(study)
    if of_study.optimizer.name in BASELINES:
        raise StudySpecError(f"{study.name}: is a baseline and follows no loss; name a search, as LCSCGradient")
    configure(of_study.optimizer)
    spec = of_study.spec
    total = spec.budget if budget is None else BudgetSpec(**{spec.budget.unit: budget})
    held_out = spec.held_out or HeldOutSpec()

    def at(weight: float) -> StudyPlan:
        objective = _objective(spec.objective, term, weight)
        name = _name(spec.name, term, weight)
        return of_study.changed(name=name, objective=objective, budget=total, held_out=held_out)

    averages = len(plain_averages(study.attributes["steps"]))
    plain = at(0.0)
    ema = plain.changed(
        objective=_measuring_everywhere(plain.spec.objective),
        optimizers=(OptimizerSpec(name=EMA_GRID),),
        seeds=(0,),
        budget=BudgetSpec(evaluations=averages),
        held_out=HeldOutSpec(images=held_out.images, top=averages),  # all of them are measured
    )
    return [ema, *(at(weight) for weight in weights)]


def _check(weights: Sequence[float], term: str) -> None:
    if term not in TERMS:
        raise StudySpecError(f"--term: expected {' or '.join(TERMS)}, got {term!r}")
    wrong = [weight for weight in weights if not 0 <= weight < math.inf]
    if wrong or not weights or len({_text(weight) for weight in weights}) < len(weights):
        shown = ",".join(_text(weight) for weight in weights)
        raise StudySpecError(f"--weights: expected different numbers from 0, as 0,3,6,12, got {shown or 'none'}")


def _text(weight: float) -> str:
    return f"{weight:g}"


def _name(experiment: str, term: str, weight: float) -> str:
    """``samples,images=200,near=3`` → the same with another weight."""
    sweep, varied = split_point(experiment)
    others = [f"{key}={value}" for key, value in varied.items() if key not in TERMS]
    name = ",".join([sweep, *others, f"{term}={_text(weight)}"])
    return parse_settings(NameSpec, {"name": name}, source="front").name


def _objective(spec: ObjectiveSpec, term: str, weight: float) -> ObjectiveSpec:
    """The objective's specification with the weight in its loss and :data:`SEEN` among its held-out metrics."""
    stored = spec.settings
    loss: Any = stored.get("loss", "fid")
    parsed = parse_loss(loss)
    extractor = next(iter(parsed)).extractor
    weights = {str(metric): value for metric, value in parsed.items() if metric.formula not in TERMS}
    if not weights:
        raise StudySpecError(f"objective.settings.loss: {loss} has no front; name a study whose loss has FID in it")
    if weight:
        weights[str(MetricName.parse(f"{term}@{extractor}"))] = weight
    named: Any = stored.get("held_out_metrics") or []
    reported = dict.fromkeys([*named, *(str(MetricName.parse(f"{formula}@{extractor}")) for formula in SEEN)])
    settings = {key: value for key, value in stored.items() if key != "keep"}
    return spec.model_copy(update={"settings": {**settings, "loss": weights, "held_out_metrics": list(reported)}})


def _measuring_everywhere(spec: ObjectiveSpec) -> ObjectiveSpec:
    """The same with the held-out metrics on every noise: averages are compared on the selection noise, too."""
    settings: dict[str, Any] = dict(spec.settings)
    metrics = dict.fromkeys([*(settings.get("metrics") or []), *settings["held_out_metrics"]])
    return spec.model_copy(update={"settings": {**settings, "metrics": list(metrics)}})
