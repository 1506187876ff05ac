"""Makes the report of an experiment: all models once, on the same noise, and the answer.

A search overfits its group of noise a little, and the best of several values is too good by chance. So the best trials
of all searches are scored on the *selection* noise, where the answer is chosen among them and what the user had
(:mod:`~lcsc_opt.experiment.answer`). Then the answer, the best of each search and what the user had are measured on
*held-out* noise, which decided nothing, in all metrics; and in a second sampler, if the objective has one.

What is measured becomes a trial of the experiment's own study. So a report that is made again, with another search,
another metric or more images, measures only what is missing, and is the one that would have been made at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lcsc_opt.base.errors import ObjectiveError, SearchFailedError, StudyStoreError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import HELD_OUT, Noise
from lcsc_opt.database.experiment import CHOICE, REPORT
from lcsc_opt.database.report import Part, Report, ReportPlan
from lcsc_opt.experiment.choice import Choice, Race
from lcsc_opt.experiment.finalists import Searched
from lcsc_opt.experiment.measuring import Measurer, trained_models
from lcsc_opt.experiment.warnings import warnings_of


def make_report(measurer: Measurer, searches: Sequence[Searched], plan: ReportPlan) -> Report:
    """Measure all models of the experiment, and choose the answer.

    Each measurement is stored as soon as it is known and never repeated, also after an interruption.

    Args:
        measurer: of the experiment; which model was chosen is not stored.
        searches: all; those without a comparable trial have nothing to measure.
        plan: how many images, and which noise.

    Raises:
        StudyStoreError: no search has a comparable trial.
        SearchFailedError: none of the best trials, or not the answer, can be evaluated.
        ObjectiveError: what losses are relative to cannot be measured.
    """
    experiment, objective = measurer.experiment, measurer.objective
    with_result = [search for search in searches if search.lowest_loss < math.inf]
    if not with_result:
        raise StudyStoreError(f"{experiment.name}: no comparable trial has finished yet; search with a larger budget")
    samplers = objective.samples.samplers
    noises = [Noise(HELD_OUT.group, seed) for seed in plan.seeds]
    measurer = measurer.changed(images=plan.images, role=CHOICE)
    top = math.ceil(plan.top / len(with_result))  # of each search
    choice = Race(with_result, trained_models(measurer), measurer, top=top).run()
    models = choice.models
    measurer = measurer.changed(role=REPORT)
    with progress(f"{experiment.name}: report", len(models) * (len(noises) + len(samplers[1:]))) as measurer.advance:
        parts = [_part(choice, noises, measurer, samplers[0].text if samplers else None)]
        if len(samplers) > 1:
            images = min(plan.images, objective.samples.per_evaluation)  # enough to see whether it is worse there
            try:
                elsewhere = measurer.changed(images=images, sampler=1)
                elsewhere.advance = measurer.advance
                parts.append(_part(choice, noises[:1], elsewhere, samplers[1].text))
            except (SearchFailedError, ObjectiveError) as error:
                notice(f"{samplers[1].text}: {error}; it is left out")
    report = Report(
        parts=tuple(parts),
        answer=choice.answer.name,
        had=tuple(model.name for model in choice.had),
        found={study: model.name for study, model in choice.found.items()},
        evaluations={search.study: search.evaluations for search in searches},
        top=plan.top,
        selection={name: experiment.record.sign * one.loss for name, one in choice.measured.items()},
        metrics=measurer.reported,
        sign=experiment.record.sign,
        entrants={name: one.model.key for name, one in choice.measured.items()},
        rounds=choice.rounds,
    )
    warnings = tuple(warnings_of(experiment.name, report, choice, with_result, measurer.yardstick(noises[0])))
    for warning in warnings:
        notice(f"{experiment.name}: {warning}")
    return dataclasses.replace(report, warnings=warnings)


def _part(choice: Choice, noises: Sequence[Noise], measurer: Measurer, sampler: str | None) -> Part:
    """What the user had, the best of each search, and the answer, on these groups of noise.

    Raises:
        SearchFailedError: the answer cannot be evaluated.
        ObjectiveError: what losses are relative to cannot be measured there.
    """
    answer = measurer.on_each(noises, choice.answer)
    not_the_answer = [model for model in choice.models if model.name != choice.answer.name]
    measurements = [answer, *measurer.possible(noises, not_the_answer)]
    measured = {measurement.model.name: measurement for measurement in measurements}
    models = tuple(measured[model.name] for model in choice.models if model.name in measured)
    return Part(sampler, models, measurer.second_sampler)
