"""Measures models on noise, each once: what was measured is a trial of the experiment's own study.

Losses may be relative to a *yardstick*: one average of the checkpoints, measured once on each noise, which has a loss
of 1 there.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from lcsc_opt.base.errors import LcscError, ObjectiveError, SearchFailedError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import (
    HELD_OUT,
    SEARCH,
    SELECTION,
    STANDARD_ERROR,
    TRAINER_EMA,
    Candidate,
    Noise,
    SamplerTitle,
    Yardstick,
)
from lcsc_opt.coefficients.profiles import last_alone, trainer_ema
from lcsc_opt.database.experiment import AVERAGES, HAD, YARDSTICK, StoredExperiment
from lcsc_opt.database.measurement import Measurement, Model, Sample
from lcsc_opt.database.names import LAST_CHECKPOINT
from lcsc_opt.evaluation.base import Failure, Outcome
from lcsc_opt.metrics.names import REWARD
from lcsc_opt.objective.contract import Objective
from lcsc_opt.trajectory.adapters import BASE_MODEL, base_coefficients

Evaluate = Callable[[Candidate, str | None], Outcome]
"""Evaluates one candidate, in the rows of the study that found it; ``None`` for one that no search has found."""


class Measurer:
    """Measures models of one experiment, unless a trial has it under today's key; each measurement becomes a trial.

    Measurements that lack one of the metrics that are needed on their noise are repeated.

    Args:
        experiment: where the trials are.
        objective: of the experiment.
        evaluate: evaluates one candidate.
        images: of each measurement; 0 for as many as a candidate of a search has, or if the objective samples none.
        role: of its trials (:mod:`lcsc_opt.database.experiment`).
        sampler: which of the objective's samplers makes them; searches use the first.

    Attributes:
        experiment: the same.
        objective: the same.
        reported: the metrics of its reports.
        images: of each measurement.
        advance: called after each measurement, also a stored one; :func:`lcsc_opt.base.progress.progress` gives it.
    """

    def __init__(
        self,
        experiment: StoredExperiment,
        objective: Objective,
        evaluate: Evaluate,
        *,
        images: int,
        role: str,
        sampler: int = 0,
    ) -> None:
        self.reported = objective.reported_metrics()
        self.advance: Callable[..., None] = lambda *_, **__: None
        self.experiment = experiment
        self.objective = objective
        self._evaluate = evaluate
        self.images = images
        self.role = role
        self._sampler = sampler
        self._sign = experiment.record.sign

    def changed(self, *, images: int | None = None, role: str | None = None, sampler: int | None = None) -> Measurer:
        """The same with another number of images, role or sampler, and its own ``advance`` from now on."""
        measurer = copy.copy(self)
        if images is not None:
            measurer.images = images
        if role is not None:
            measurer.role = role
        if sampler is not None:
            measurer._sampler = sampler
        return measurer

    @property
    def second_sampler(self) -> SamplerTitle | None:
        """The sampler, unless it is that of the searches."""
        return self.objective.samples.samplers[self._sampler] if self._sampler else None

    def _sample(self, noise: Noise) -> Sample:
        """What is measured on this noise."""
        return Sample(noise, self.images or self.objective.samples.per_evaluation, self.second_sampler)

    def on(self, noise: Noise, model: Model) -> Measurement:
        """One model on one group of noise.

        Raises:
            SearchFailedError: it cannot be evaluated.
            ObjectiveError: what losses on this noise are relative to cannot be measured.
        """
        sample = self._sample(noise)
        needed = self._needed(noise)
        stored = [found for found in self.experiment.measured(model, sample) if needed <= found.values.keys()]
        if stored:
            measurement = stored[-1]
        else:
            candidate = Candidate(
                model.coefficients,
                images=self.images or None,
                noise=noise,
                yardstick=self.yardstick(noise),
                sampler=self._sampler,
                error=True,
            )
            outcome = self._evaluate(candidate, model.study)
            if isinstance(outcome, Failure):
                self.experiment.add(self.role, model, candidate, sample, outcome.as_attempt())
                raise SearchFailedError(
                    f"{self.experiment.name}: {model.name} on {noise.group} noise: {outcome.reason}"
                )
            self.experiment.add(self.role, model, candidate, sample, outcome)
            measurement = Measurement.of(model, outcome, images=sample.images, seed=noise.seed)
        self.advance(note=f"{self._sign * measurement.loss:.4g}")
        return measurement

    def _needed(self, noise: Noise) -> set[str]:
        """The metrics that a measurement must have: those of reports, or what the choice looks at."""
        if noise.group == HELD_OUT.group:
            return set(self.reported.signs)
        if noise.group == SELECTION.group and self.reported.cross_check is not None:
            return {self.reported.cross_check}
        return set()

    def on_each(self, noises: Iterable[Noise], model: Model) -> Measurement:
        """One model on several groups of noise, joined; raises as :meth:`on`."""
        return Measurement.joined([self.on(noise, model) for noise in noises])

    def possible(self, noises: Sequence[Noise], models: Iterable[Model]) -> list[Measurement]:
        """Those of the models that can be evaluated, on these groups of noise; a notice names the others.

        Raises:
            ObjectiveError: as :meth:`on`.
        """
        measured = []
        for model in models:
            try:
                measured.append(self.on_each(noises, model))
            except SearchFailedError as error:
                notice(f"{error}; it is left out")
        return measured

    def yardstick(self, noise: Noise) -> Yardstick | None:
        """What losses on this noise are relative to, measured if nobody has yet; ``None`` if they are absolute.

        That on the search's noise is a notice. The choice compares models with one another, so it has that one, too.

        Raises:
            ObjectiveError: it cannot be measured, or nothing can be relative to it.
        """
        average = self.objective.fixed_average
        if average is None:
            return None
        if noise.group == SELECTION.group:
            return self.changed(images=0).yardstick(SEARCH)
        sample = self._sample(noise)
        stored = self.experiment.yardstick(sample)
        if stored is not None:
            return stored
        candidate = Candidate(average, images=self.images or None, noise=noise, sampler=self._sampler)
        yardstick = self._measured_yardstick(candidate, sample)
        if noise == SEARCH:
            values = ", ".join(f"{name} {value:.4g}" for name, value in yardstick.metrics.items())
            line = f"{self.experiment.name}: losses are relative to an average of the checkpoints: {values}"
            if yardstick.kept is not None:
                line += f". keep: {yardstick.kept} may not get worse than {yardstick.bound:.4g}"
                line += self._reached_by_base(yardstick.kept)
            notice(line)
        return yardstick

    def _reached_by_base(self, kept: str) -> str:
        """``; the base model without LoRA has 0.8``: where training has cost much of a reward, the bound is little."""
        trajectory = self.objective.trajectory
        coefficients = None if trajectory is None else base_coefficients(trajectory)
        if coefficients is None or kept != REWARD:
            return ""
        measurer = self.changed(role=HAD)
        measurer.advance = lambda *_, **__: None  # it is none of the models that are being measured
        try:
            base = measurer.on(SEARCH, Model(BASE_MODEL, coefficients))
        except SearchFailedError:  # only what people are told depends on it
            return ""
        return f"; the base model without LoRA has {base.metrics[kept]:.4g}"

    def _measured_yardstick(self, candidate: Candidate, sample: Sample) -> Yardstick:
        """The yardstick from the average's evaluation, which becomes a trial; raises as :meth:`yardstick`."""
        outcome = self._evaluate(candidate, None)
        if isinstance(outcome, Failure):
            reason = outcome.reason
        else:
            try:
                yardstick = self.objective.yardstick(outcome)
            except LcscError as error:
                reason = str(error)
            else:
                model = Model(YARDSTICK, candidate.coefficients)
                described = {YARDSTICK: dataclasses.asdict(yardstick)}
                self.experiment.add(YARDSTICK, model, candidate, sample, outcome, **described)
                return yardstick
        raise ObjectiveError(
            "the loss is relative to an average of the checkpoints (loss: fid is not), which is evaluated first: "
            f"{reason}"
        )


def trained_models(measurer: Measurer) -> list[Model]:
    """The models that the trainer has made itself: the last checkpoint, and the averages that it kept."""
    count = len(measurer.objective.steps)
    models = [Model(LAST_CHECKPOINT, last_alone(count))]
    kept: dict[str, str] = measurer.experiment.attributes.get(AVERAGES) or {}
    for index, (name, sha256) in enumerate(kept.items()):
        models.append(Model(name, trainer_ema(count, index), weights_sha256=sha256))
    return models


def score_as_trained(measurer: Measurer, images: int | None) -> None:
    """Score the trainer's models as the report will, and print them: these numbers are also in the trainer's log.

    If one cannot be evaluated, that is said, and the search may begin.

    Args:
        measurer: of the experiment that is going to be searched.
        images: how many the report will have, 0 if the objective samples none; ``None`` if there will be no report:
            then models are scored on the search's noise, as its candidates.

    Raises:
        ObjectiveError: what losses are relative to cannot be measured.
    """
    experiment, objective = measurer.experiment, measurer.objective
    measurer = measurer.changed(images=images or 0)
    noise = SEARCH if images is None else HELD_OUT
    size = ""
    if images:
        size = f" on {images:,} {'items' if objective.sampler is None else 'images'}"
    merges_averages = objective.trajectory is not None and objective.trajectory.merges_averages
    models = trained_models(measurer)
    with progress(f"{experiment.name} as trained", len(models)) as measurer.advance:
        for model in models:
            try:
                measurement = measurer.on(noise, model)
            except SearchFailedError as error:
                notice(str(error))
                continue
            kind = ""
            if merges_averages and model.name == LAST_CHECKPOINT:
                kind = f" ({TRAINER_EMA})"
            described = _described(measurement, experiment.record.sign, is_score=objective.sampler is None)
            advice = ""
            if model is models[0]:
                advice = (
                    "; compare this with your trainer's log, if that has such a number: if they differ, this score "
                    "does not measure what your trainer does"
                )
            notice(
                f"{experiment.name}: {model.name}{kind}, step {objective.steps[-1]}, {noise.group} noise{size}: "
                f"{described}{advice}"
            )


def _described(measurement: Measurement, sign: int, *, is_score: bool) -> str:
    """``fid 12.3, precision 0.6``: the metrics, and first the loss unless it is one of them.

    ``sign`` is −1 for a maximized score, which is a metric, and whose loss is that times −1. Of a score it is said
    whether lower is better, since nobody but its user knows.
    """
    shown = {name: value for name, value in measurement.metrics.items() if not name.endswith(STANDARD_ERROR)}
    loss = measurement.loss
    if sign * loss not in shown.values():
        shown = {"loss": loss, **shown}
    first, *others = (f"{name} {value:.4g}" for name, value in shown.items())
    if is_score:
        first += f" ({'lower' if sign > 0 else 'higher'} is better)"
    return ", ".join([first, *others])
