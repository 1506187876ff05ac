"""The final choice: the best trials again, on noise that the search never saw.

A search overfits its group of noise a little, and the best of several values is too good by chance. So the ``top``
trials of the search are scored on the *selection* noise, and the best of these is reported on the *held-out* noise,
which decided nothing. The answer of the experiment is chosen on selection noise, too, among these and what the user had
(:mod:`~lcsc_opt.study.choice`). Several groups of held-out noise are possible; their spread says how far to trust the
number.

The last checkpoint, and the trainer's own EMA if there is one, have been measured there before the search
(:mod:`~lcsc_opt.study.measuring`). EMA*, or else the EMA that searches start from, is measured on the same noise.
What does not hold is warned of (:mod:`~lcsc_opt.study.report_warnings`).

If the objective has a second sampler, the best trial and its baselines are measured there once, too, with as many
images as in an evaluation of the search.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from optuna.trial import FrozenTrial

from lcsc_opt.base.errors import ObjectiveError, SearchFailedError, StudySpecError, StudyStoreError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import HELD_OUT, SELECTION, Noise
from lcsc_opt.base.study_spec import EMA_GRID, GRIDS, HeldOutSpec
from lcsc_opt.coefficients.profiles import default_origin
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.names import EMA, TRAINED, split_name
from lcsc_opt.database.report import HELD_OUT_REPORT, HeldOutReport, Measurement, MetricRow, Model
from lcsc_opt.database.siblings import known_ema
from lcsc_opt.database.states import compared_trials
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import evaluate_safely
from lcsc_opt.objective.contract import Objective
from lcsc_opt.study.choice import WAY, choose, on_the_way
from lcsc_opt.study.measuring import Evaluate, Measurer, trained_models
from lcsc_opt.study.report_rows import metric_rows
from lcsc_opt.study.report_warnings import overfitting, turned, warning_of

_DEFAULT_EMA = "default EMA"


@dataclasses.dataclass(frozen=True)
class HeldOutPlan:
    """How a study's answer is measured.

    Attributes:
        images: how many, for each trial and each group of noise; 0 if the objective samples none.
        top: the answer is chosen among this many of the best trials.
        groups: how many groups of held-out noise.
        first_group: the seed of the first of them; the others follow.
        keep: whether the report becomes the study's result. Otherwise it is a preview: its measurements are stored,
            and nothing else changes.
    """

    images: int
    top: int
    groups: int = 1
    first_group: int = 0
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
        """The plan of ``lcsc evaluate``. Values that are ``None`` are those of the study file, or its defaults.

        The report is kept if ``keep`` is true, or if it is the study's first one with at least the planned images.

        Raises:
            StudySpecError: ``keep`` with fewer images than the study file asks for.
        """
        attributes = study.attributes
        stored_plan = (attributes.get("specification") or {}).get("held_out")
        objective_images = attributes.get("report_images")
        planned = HeldOutSpec(**(stored_plan or {}))
        planned_images = planned.images_with(objective_images)
        images = images or planned_images
        if keep and stored_plan is not None and images < planned_images:
            fewer = f"{images:,} images are fewer than the {planned_images:,} that the study file asks for"
            raise StudySpecError(f"--keep: {fewer}; increase --images, or leave out --keep for a preview")
        is_first = attributes.get(HELD_OUT_REPORT) is None and images >= planned_images
        return cls(
            images=images,
            top=top or planned.top,
            groups=groups,
            first_group=first_group,
            keep=keep or is_first,
        )

    @property
    def noises(self) -> list[Noise]:
        """The groups of held-out noise."""
        return [Noise(HELD_OUT.group, self.first_group + number) for number in range(self.groups)]


def score_held_out(
    study: StoredStudy, objective: Objective, plan: HeldOutPlan, evaluate: Evaluate | None = None
) -> HeldOutReport:
    """Choose among the best trials, and report the chosen one, what the user had, and the answer.

    Each measurement is stored with the study as soon as it is known and never repeated, also after an interruption.
    What the report warns of is a notice, too.

    Args:
        study: the study; with ``plan.keep`` its ``held_out`` attribute becomes the report.
        objective: the study's objective.
        plan: how many images, and which noise.
        evaluate: evaluates one candidate; ``None`` does it in this process.

    Raises:
        StudyStoreError: no trial is complete, or none of them on the search's noise.
        SearchFailedError: one of the best trials, or the answer, cannot be evaluated.
        ObjectiveError: what losses are relative to cannot be measured.
        TrajectoryError: as :func:`~lcsc_opt.study.measuring.trained_models`.
    """
    trials = study.trials()
    best = _best_models(study, trials, plan.top)
    if not best:
        raise StudyStoreError(f"{study.name}: no comparable trial has finished yet; continue the search")
    evaluate = evaluate or functools.partial(evaluate_safely, objective)
    baselines = _baselines(study, objective)
    samplers = objective.samples.samplers
    groups = plan.groups + len(samplers[1:])
    measurements = len(best) + len(baselines) + len(WAY) + groups * (1 + len(baselines))  # about so many
    with progress(f"{study.name} held out", measurements) as advance:
        measurer = Measurer(study, objective, evaluate, advance, images=plan.images)
        selected = [measurer.on(SELECTION, model) for model in best]
        found = min(selected, key=lambda measurement: measurement.loss)
        if _is_ema_grid(study):  # its trials are averages that need no search
            found = dataclasses.replace(found, model=dataclasses.replace(found.model, name=EMA))
        report = _measured_on(plan.noises, found.model, baselines, measurer)
        report = _with_answer(report, selected, found, measurer, plan)
        if len(samplers) > 1:
            images = min(plan.images, objective.samples.per_evaluation)
            elsewhere = Measurer(study, objective, evaluate, advance, images=images, sampler=1)
            try:
                also = _measured_on(plan.noises[:1], found.model, baselines, elsewhere)
                report = dataclasses.replace(report, also=also)
            except (SearchFailedError, ObjectiveError) as error:
                notice(f"{samplers[1].text}: {error}; it is left out")
        advance(0, note=f"{measurer.sign * report.loss:.4g}")  # the bar ends on the best trial's number
    warnings = [*_warnings(study, report, trials, measurer, plan)]
    if split_name(study.name)[1] not in GRIDS:  # their candidates fit nothing
        warnings.append(overfitting(trials))
    report = dataclasses.replace(report, warning="; ".join(filter(None, warnings)) or None)
    if report.warning is not None:
        notice(f"{study.name}: {report.warning}")
    if plan.keep:
        study.set_attribute(HELD_OUT_REPORT, report.to_json())
    return report


def _measured_on(
    noises: Sequence[Noise], found: Model, baselines: Sequence[Model], measurer: Measurer
) -> HeldOutReport:
    """The best trial and the baselines that can be evaluated, on the same noise; no answer is chosen yet.

    Raises:
        SearchFailedError: the best trial cannot be evaluated.
        ObjectiveError: what losses are relative to cannot be measured there.
    """
    measured = measurer.on_each(noises, found)
    had = measurer.possible(noises, baselines)
    ema = next((baseline for baseline in had if baseline.model.name in (EMA, _DEFAULT_EMA)), None)
    return HeldOutReport(
        measured,
        baselines=tuple(had),
        rows=metric_rows(measured, ema, reported=measurer.reported, study_sign=measurer.sign),
        sampler=measurer.sampler_text,
    )


def _with_answer(
    report: HeldOutReport,
    selected: Sequence[Measurement],
    found: Measurement,
    measurer: Measurer,
    plan: HeldOutPlan,
) -> HeldOutReport:
    """The report with the best model that is known, by the noise of the choice.

    Args:
        report: the best trial and what the user had.
        selected: the best trials, on the noise of the choice.
        found: the best of them.
        measurer: measures the others, and the answer on held-out noise if the report has not measured it.
        plan: of the report.

    Raises:
        SearchFailedError: the answer cannot be evaluated on held-out noise.
        ObjectiveError: what losses are relative to cannot be measured.
    """
    had = measurer.possible([SELECTION], [baseline.model for baseline in report.baselines])
    new: list[Measurement] = []
    if found.model.name == EMA:  # of a grid: the user has it without a search
        had.append(found)
    else:
        emas = [measured.model for measured in had if measured.model.name in (EMA, _DEFAULT_EMA)]
        points = [point for ema in emas for point in on_the_way(ema, found.model)]
        new = [*selected, *measurer.possible([SELECTION], points)]
    answer, best_had = choose(had, new, judge=measurer.reported.cross_check)
    already_measured = {measured.model: measured for measured in (report.found, *report.baselines)}
    return dataclasses.replace(
        report,
        selection={measured.model.name: measurer.sign * measured.loss for measured in (*selected, *had, *new)},
        answer=already_measured.get(answer.model) or measurer.on_each(plan.noises, answer.model),
        had=None if best_had is None else already_measured[best_had.model],
    )


def _warnings(
    study: StoredStudy, report: HeldOutReport, trials: Sequence[FrozenTrial], measurer: Measurer, plan: HeldOutPlan
) -> list[str | None]:
    """What does not hold: in other metrics, against the trainer's models, in the second sampler.

    ``None`` stands for what does.
    """
    against_trained = _against_trained(report, measurer)
    warnings: list[str | None] = []
    if not _is_ema_grid(study):  # what a grid finds is a baseline itself
        yardstick = measurer.yardstick(plan.noises[0])
        below_ema = _searched_below_ema(study, trials)
        warnings.append(warning_of(report.rows, against_trained, yardstick=yardstick, searched_below_ema=below_ema))
    if report.also is not None:
        elsewhere = {rows[0].against: rows for rows in (report.also.rows, *_against_trained(report.also, measurer))}
        turns = [
            turned(rows, elsewhere.get(rows[0].against, ()), measurer.samplers)
            for rows in (report.rows, *against_trained)
        ]
        warnings.append(next(filter(None, turns), None))
    return warnings


def _searched_below_ema(study: StoredStudy, trials: Sequence[FrozenTrial]) -> bool | None:
    """Whether the search's lowest loss is below that of the EMA grid; ``None`` if there is no finished one."""
    ema = known_ema(study)
    if ema is None:
        return None
    _, searched_by_grid = ema
    return min(trial.value for trial in compared_trials(trials) if trial.value is not None) < searched_by_grid


def _against_trained(report: HeldOutReport, measurer: Measurer) -> list[tuple[MetricRow, ...]]:
    """The best trial against each model of the trainer's: the last checkpoint, and its EMA."""
    trained = [baseline for baseline in report.baselines if baseline.model.name in TRAINED]
    compare = functools.partial(metric_rows, report.found, reported=measurer.reported, study_sign=measurer.sign)
    return [compare(model) for model in trained]


def _best_models(study: StoredStudy, trials: Sequence[FrozenTrial], top: int) -> list[Model]:
    """The models of the ``top`` best trials, the best first; only comparable ones, and the same model once.

    What a search stops by, it chooses by: the loss to real images that it does not see, where it has measured one.
    """
    distinct: dict[str, Model] = {}
    best_first = sorted(
        compared_trials(trials), key=lambda trial: (trial.user_attrs.get("unseen", trial.value), trial.number)
    )
    for trial in best_first:
        if len(distinct) == top:
            break
        model = Model(f"trial {trial.number}", coefficients_of(trial), study=study.name, trial=trial.number)
        distinct.setdefault(model.key, model)
    return list(distinct.values())


def _baselines(study: StoredStudy, objective: Objective) -> list[Model]:
    """What the user had: the trainer's models, and EMA* of the experiment, if it is known, else a default EMA.

    A notice says that a default EMA stands in. An EMA grid has no other EMA than its own. Raises as
    :func:`~lcsc_opt.study.measuring.trained_models`.
    """
    models = trained_models(study, objective)
    if _is_ema_grid(study):
        return models
    ema = known_ema(study)
    if ema is not None:
        model, _ = ema
        return [*models, model]
    notice(
        f"{split_name(study.name)[0]} has no finished EMAGrid study of the same objective, so EMA* is unknown and "
        "one default EMA stands in. For EMA*, run: lcsc run FILE --optimizer EMAGrid"
    )
    return [*models, Model(_DEFAULT_EMA, default_origin(objective.steps))]


def _is_ema_grid(study: StoredStudy) -> bool:
    return split_name(study.name)[1] == EMA_GRID
