"""The final choice: the best trials again, on noise that the search never saw.

A search overfits its group of noise a little, and the best of several values is too good by chance. So the ``top``
trials of the search are scored on the *selection* noise, and the best of these is reported on the *held-out* noise,
which decided nothing. Several groups of held-out noise are possible; their spread says how far to trust the number.

An objective may have *judges*: metrics that are no part of its loss. Then EMA*, or else the EMA that searches start
from, is measured on the same noise. A warning says that the loss is better than that EMA's while a judge is worse, or
while the cross-check (a judge in other features) is not better.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from lcsc_opt.base.errors import SearchFailedError, StudySpecError, StudyStoreError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import HELD_OUT, SELECTION, Candidate, Coefficients, Evaluation, Noise
from lcsc_opt.base.study_file import HeldOutSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.database.comparing import best_ema
from lcsc_opt.database.history import is_kept
from lcsc_opt.database.judges import cross_check_of, doubted, judges_of, warning_of
from lcsc_opt.database.names import BASELINES, compared_trials, split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation import Failure, Outcome, evaluate_safely
from lcsc_opt.objective.contract import Objective

DEFAULT_IMAGES = 50_000  # the usual number for FID (Liu et al. 2024, Section 5.1)
_DEFAULT_TOP = 5
EMA = "EMA*"
LAST = "last checkpoint"
_DEFAULT_EMA = "default EMA"
_LOOK = "look_"  # prefix of the attributes of reports that are not kept as results
MEASURED = "baselines"  # the attribute of a study that keeps the measurements of baselines

Report = dict[str, Any]
Evaluate = Callable[[Candidate], Outcome]


@dataclasses.dataclass(frozen=True)
class HeldOutPlan:
    """How a study's answer is measured.

    Attributes:
        images: how many, for each trial and each group of noise; 0 if the objective samples none.
        top: the answer is chosen among this many of the best trials.
        groups: how many groups of held-out noise.
        first_group: the seed of the first of them; the others follow.
        baselines: whether EMA* is measured on the same noise, too.
        keep: whether the report becomes the study's result. Otherwise it is a *look*: it is remembered, and changes
            nothing.
    """

    images: int = DEFAULT_IMAGES
    top: int = _DEFAULT_TOP
    groups: int = 1
    first_group: int = 0
    baselines: bool = False
    keep: bool = True

    @classmethod
    def of(
        cls,
        study: StoredStudy,
        *,
        images: int | None = None,
        top: int | None = None,
        groups: int = 1,
        first_group: int = 0,
        keep: bool = False,
    ) -> HeldOutPlan:
        """The plan of ``lcsc evaluate``. What is ``None`` comes from the study file, else from the defaults.

        The report is kept if ``keep`` is true, or if it is the study's first one with at least the planned images.

        Raises:
            StudySpecError: fewer images are to be kept than the study file asks for.
        """
        asked = study.attributes.get("held_out_plan")
        planned = HeldOutSpec(images=DEFAULT_IMAGES, top=_DEFAULT_TOP) if asked is None else HeldOutSpec(**asked)
        images = images or planned.images
        if keep and asked is not None and images < planned.images:
            raise StudySpecError(
                f"--keep: {images:,} images are fewer than the {planned.images:,} that the study file asks for; leave "
                "--keep out for a look, or --images"
            )
        first = study.attributes.get("held_out") is None and images >= planned.images
        return cls(images, top or planned.top, groups, first_group, baselines=True, keep=keep or first)

    @property
    def noises(self) -> list[Noise]:
        """The groups of held-out noise."""
        return [Noise(HELD_OUT.group, self.first_group + group) for group in range(self.groups)]


def best_trials(trials: Sequence[FrozenTrial], top: int) -> list[FrozenTrial]:
    """The ``top`` trials of lowest loss, the best first; only losses that compare, and the same coefficients once."""
    distinct: dict[tuple[float, ...], FrozenTrial] = {}
    for trial in sorted(compared_trials(trials), key=lambda trial: (trial.value, trial.number)):
        distinct.setdefault(tuple(trial.user_attrs["coefficients"]), trial)
    return list(distinct.values())[:top]


def score_held_out(
    study: StoredStudy, objective: Objective, plan: HeldOutPlan, evaluate: Evaluate | None = None
) -> Report:
    """Choose among the best trials and report the chosen one; write both into the database.

    Measurements of earlier calls with as many images are used again, also if such a call was interrupted.

    Args:
        study: its attribute ``measured`` gets ``selection`` of these trials and ``held_out`` of the chosen one, for a
            look ``look_selection`` and ``look_held_out``; its ``held_out`` gets the report, but not for a look.
        objective: the study's.
        plan: how many images, and which noise.
        evaluate: evaluates one candidate; ``None`` does it in this process.

    Returns:
        The report, which a plan with ``keep`` stores as the study's ``held_out`` attribute: ``trial``, ``loss``,
        ``metrics``, ``images``, ``groups`` (each with its ``seed``, ``loss`` and ``metrics``), ``chosen_from`` with its
        ``selection`` losses. With several groups, ``loss`` and ``metrics`` are means, and ``loss_std`` and
        ``metrics_std`` are their sample standard deviations. ``baselines``, if some were measured: name → ``loss``,
        ``metrics``, … and its origin. ``judges`` and ``cross_check``, if the objective has some: see
        :class:`lcsc_opt.database.judges.Judge` and :class:`lcsc_opt.database.judges.CrossCheck`. ``warning``, and
        ``doubted`` with the names of metrics, if these did not follow the loss.

    Raises:
        StudyStoreError: no trial is complete, or none of them on the search's noise.
        SearchFailedError: one of them cannot be evaluated.
    """
    trials = best_trials(study.trials(), plan.top)
    if not trials:
        raise StudyStoreError(
            f"{study.name}: no complete trial on the search's noise to evaluate; let it search on, with a larger "
            "budget where this one is spent"
        )
    judges = objective.evaluation_metrics
    baselines = _baselines(study, objective, plan, judges)
    evaluate = evaluate or functools.partial(evaluate_safely, objective)
    with progress(f"{study.name} held out", len(trials) + plan.groups * (1 + len(baselines))) as advance:
        scored: list[tuple[float, FrozenTrial]] = []
        for trial in trials:
            scored.append((_selection_loss(study, evaluate, trial, plan), trial))
            advance()
        chosen = min(scored, key=lambda pair: (pair[0], pair[1].number))[1]
        reported = _held_out(study, evaluate, chosen, plan, judges, advance)
        choice = {"chosen_from": [trial.number for trial in trials], "selection": [loss for loss, _ in scored]}
        report = {"trial": chosen.number, **reported, **choice}
        if baselines:
            measure = functools.partial(_measure_baseline, study, evaluate, plan=plan, judges=judges, advance=advance)
            measured = {baseline.name: measure(baseline) for baseline in baselines}
            report["baselines"] = {name: result for name, result in measured.items() if result is not None}
    if judges:
        _add_judges(study, report, objective)
    if plan.keep:
        study.set_attribute("held_out", report)
    return report


def _attribute(name: str, plan: HeldOutPlan) -> str:
    """The name of the attribute that keeps a plan's measurements."""
    return name if plan.keep else f"{_LOOK}{name}"


def _measured(known: Mapping[str, Any], name: str) -> list[Any]:
    """Earlier measurements: first those of the result, then those of looks."""
    return [known[key] for key in (name, f"{_LOOK}{name}") if known.get(key)]


def _add_judges(study: StoredStudy, report: Report, objective: Objective) -> None:
    """Add to the report what the judges say of the answer, compared with the baseline that was measured for it."""
    against = next((name for name in (EMA, _DEFAULT_EMA) if name in report.get("baselines", {})), None)
    metric = objective.cross_check_metric
    cross_check = None if metric is None else cross_check_of(report, metric, against)
    judges = judges_of(report, objective.evaluation_metrics, against, objective.real_halves())
    report["judges"] = [dataclasses.asdict(judge) for judge in judges]
    if cross_check is not None:
        report["cross_check"] = dataclasses.asdict(cross_check)
    kept = is_kept(study.attributes.get("specification") or {})
    if (warning := warning_of(report, cross_check, judges, kept=kept)) is not None:
        report["warning"], report["doubted"] = warning, list(doubted(report, cross_check, judges))
        notice(f"{study.name}: {warning}")


def _selection_loss(study: StoredStudy, evaluate: Evaluate, trial: FrozenTrial, plan: HeldOutPlan) -> float:
    for known in _measured(study.measured(trial.number), SELECTION.group):
        if known["images"] == plan.images:
            return float(known["loss"])
    where = f"{study.name}: trial {trial.number}"
    evaluation = _evaluated(evaluate, _coefficients(trial), SELECTION, plan.images, where)
    measured = {**_numbers(evaluation), "images": plan.images}
    study.measure(trial.number, {_attribute(SELECTION.group, plan): measured})
    return evaluation.loss


def _held_out(
    study: StoredStudy,
    evaluate: Evaluate,
    trial: FrozenTrial,
    plan: HeldOutPlan,
    judges: Collection[str],
    advance: Callable[..., None],
) -> Report:
    """The loss and the metrics of a trial on every group of noise, each written as soon as it is known."""
    groups = _known_groups(_measured(study.measured(trial.number), "held_out"), plan.images, judges)
    for noise in plan.noises:
        if noise.seed not in groups:
            where = f"{study.name}: trial {trial.number}"
            groups[noise.seed] = _numbers(_evaluated(evaluate, _coefficients(trial), noise, plan.images, where))
            study.measure(trial.number, {_attribute("held_out", plan): _summary(groups, plan.images)})
        advance(note=f"{groups[noise.seed]['loss']:.4g}")
    if plan.keep:  # also stores measurements of looks that are used again
        study.measure(trial.number, {"held_out": _summary(groups, plan.images)})
    return _summary({noise.seed: groups[noise.seed] for noise in plan.noises}, plan.images)


def _known_groups(sources: Sequence[Any], images: int, judges: Collection[str]) -> dict[int, Report]:
    """Seed → earlier measurement with so many images and all judges."""
    groups = [group for stored in sources if stored["images"] == images for group in stored["groups"]]
    known = [group for group in groups if set(judges) <= set(group["metrics"])]
    return {group["seed"]: {"loss": group["loss"], "metrics": group["metrics"]} for group in known}


def _evaluated(evaluate: Evaluate, coefficients: Coefficients, noise: Noise, images: int, where: str) -> Evaluation:
    outcome = evaluate(Candidate(coefficients, images=images or None, noise=noise))
    if isinstance(outcome, Failure):
        raise SearchFailedError(f"{where} on {noise.group} noise: {outcome.reason}")
    return outcome


def _coefficients(trial: FrozenTrial) -> Coefficients:
    return np.array(trial.user_attrs["coefficients"], dtype=np.float64)


def _numbers(evaluation: Evaluation) -> Report:
    return {"loss": evaluation.loss, "metrics": dict(evaluation.metrics)}


def _summary(groups: Mapping[int, Report], images: int) -> Report:
    """Mean and spread over groups of noise; the plain numbers if there is one group."""
    results = [groups[seed] for seed in sorted(groups)]
    names = [name for name in results[0]["metrics"] if all(name in result["metrics"] for result in results)]
    columns = {name: [result["metrics"][name] for result in results] for name in names}
    losses = [result["loss"] for result in results]
    summary = {
        "loss": statistics.fmean(losses),
        "metrics": {name: statistics.fmean(values) for name, values in columns.items()},
        "images": images,
        "groups": [{"seed": seed, **groups[seed]} for seed in sorted(groups)],
    }
    if len(results) > 1:
        summary["loss_std"] = statistics.stdev(losses)
        summary["metrics_std"] = {name: statistics.stdev(values) for name, values in columns.items()}
    return summary


@dataclasses.dataclass(frozen=True, eq=False)
class _Baseline:
    """A model that the answer is compared with: its coefficients, their origin, and earlier measurements."""

    name: str
    coefficients: Coefficients
    origin: Report
    stored: Sequence[Any] = ()


def _baselines(study: StoredStudy, objective: Objective, plan: HeldOutPlan, judges: Collection[str]) -> list[_Baseline]:
    """What the answer is compared with: EMA* of the same experiment.

    Without an EMA grid it is a default EMA, and with ``plan.baselines`` also the last checkpoint. Empty if there are
    neither judges nor ``plan.baselines``.
    """
    experiment, optimizer, _ = split_name(study.name)
    if BASELINES.get(optimizer) == EMA or not (plan.baselines or judges):
        return []
    if (ema := _ema_star(study, experiment)) is not None:
        return [ema]
    default = _Baseline(_DEFAULT_EMA, default_origin(objective.steps), {})
    if not plan.baselines:
        return [default]
    notice(
        f"{experiment} has no finished EMAGrid study of the same objective, so EMA* is not known: the last checkpoint "
        "and one EMA are measured instead; for EMA* run the study file with --optimizer EMAGrid"
    )
    return [_Baseline(LAST, np.eye(len(objective.steps))[-1], {}), default]


def known_ema(study: StoredStudy) -> Coefficients | None:
    """``[K]`` of EMA*, if the study's experiment has a finished EMAGrid of the same objective, else ``None``."""
    ema = _ema_star(study, split_name(study.name)[0])
    return None if ema is None else ema.coefficients


def _ema_star(study: StoredStudy, experiment: str) -> _Baseline | None:
    """The best of an experiment's EMA grids with this study's objective, and its measurements."""

    def function_of(stored: StoredStudy) -> tuple[Any, Any]:
        fingerprint = stored.attributes["fingerprint"]
        return fingerprint["objective"], fingerprint.get("code")

    searched = function_of(study)
    reader = HistoryReader(study.storage)
    grids = [found for found in reader.read(experiment) if BASELINES.get(found.optimizer) == EMA]
    opened = {found.study: StoredStudy.open(study.storage, found.study) for found in grids}
    ema = best_ema([found for found in grids if function_of(opened[found.study]) == searched])
    if ema is None or (coefficients := reader.answer(ema)) is None:
        return None
    assert ema.chosen is not None  # it has an answer
    origin = {"study": ema.study, "trial": ema.chosen, "label": ema.label}
    return _Baseline(EMA, coefficients, origin, _measured(opened[ema.study].measured(ema.chosen), "held_out"))


def _measure_baseline(
    study: StoredStudy,
    evaluate: Evaluate,
    baseline: _Baseline,
    *,
    plan: HeldOutPlan,
    judges: Collection[str],
    advance: Callable[..., None],
) -> Report | None:
    """Measure a baseline on the noise of the answer.

    If it cannot be evaluated, a line says so and the result is ``None``. Measurements are stored with the study one
    by one, so an interruption loses none.
    """
    coefficients, attribute = baseline.coefficients.tolist(), _attribute(MEASURED, plan)
    kept = [known[baseline.name] for known in _measured(study.attributes, MEASURED) if baseline.name in known]
    same = [known for known in kept if known["coefficients"] == coefficients]
    groups = _known_groups([*same, *baseline.stored], plan.images, judges)
    try:
        for noise in plan.noises:
            if noise.seed not in groups:
                evaluation = _evaluated(evaluate, baseline.coefficients, noise, plan.images, baseline.name)
                groups[noise.seed] = _numbers(evaluation)
                measured = {**baseline.origin, **_summary(groups, plan.images), "coefficients": coefficients}
                known = study.attributes.get(attribute) or {}
                study.set_attribute(attribute, {**known, baseline.name: measured})
            advance()
    except SearchFailedError as error:
        notice(f"{error}; it is left out")
        return None
    return {**baseline.origin, **_summary({noise.seed: groups[noise.seed] for noise in plan.noises}, plan.images)}
