"""Measures models on noise that no search saw, each once: what was measured is stored, and serves the experiment.

The models that the trainer has made are measured before the search: their numbers are also in the trainer's log.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lcsc_opt.base.errors import SearchFailedError, TrajectoryError
from lcsc_opt.base.progress import notice, progress
from lcsc_opt.base.records import HELD_OUT, SEARCH, STANDARD_ERROR, Candidate, Noise, Yardstick
from lcsc_opt.coefficients.profiles import last_alone, trainer_ema
from lcsc_opt.database.names import LAST_CHECKPOINT, TRAINER_EMA, TRAINER_EMA_SHA256, split_name
from lcsc_opt.database.report import MEASURED, Measurement, Model, sample_key
from lcsc_opt.database.siblings import siblings
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Failure, Outcome, evaluate_safely
from lcsc_opt.objective.contract import Objective
from lcsc_opt.study.yardstick import yardstick_on

Evaluate = Callable[[Candidate], Outcome]


class Measurer:
    """Measures models for a study, unless the study or a sibling of it has stored the measurement.

    Held-out measurements that lack one of the objective's metrics are repeated.

    Args:
        study: where measurements are stored.
        objective: of the study.
        evaluate: evaluates one candidate.
        advance: called after each measurement, also a stored one; :func:`lcsc_opt.base.progress.progress` gives it.
        images: of each measurement; 0 for as many as a candidate of the search has, or if the objective samples none.
        sampler: which of the objective's samplers makes them; searches use the first.

    Attributes:
        reported: the metrics of the objective's reports.
        samplers: of the objective.
        sign: −1 where the loss is a score times −1, which is maximized; else 1.
    """

    def __init__(
        self,
        study: StoredStudy,
        objective: Objective,
        evaluate: Evaluate,
        advance: Callable[..., None],
        *,
        images: int,
        sampler: int = 0,
    ) -> None:
        self.reported = objective.reported_metrics()
        self.samplers = objective.samples.samplers
        self.sign = study.sign
        self._study = study
        self._objective = objective
        self._evaluate = evaluate
        self._advance = advance
        self._images = images
        self._sampler = sampler
        self._title = self.samplers[sampler] if sampler else None  # keys leave out the first sampler

    @property
    def sampler_text(self) -> str | None:
        """How the images are made, for people; ``None`` without images."""
        return self.samplers[self._sampler].text if self.samplers else None

    def on(self, noise: Noise, model: Model) -> Measurement:
        """One model on one group of noise.

        Raises:
            SearchFailedError: it cannot be evaluated.
            ObjectiveError: what losses on this noise are relative to cannot be measured.
        """
        key = f"{model.key} {sample_key(self._images, noise, self._title)}"
        measurement = self._stored(key, noise, model)
        if measurement is None:
            candidate = Candidate(
                model.coefficients,
                images=self._images or None,
                noise=noise,
                yardstick=self.yardstick(noise),
                sampler=self._sampler,
            )
            outcome = self._evaluate(candidate)
            if isinstance(outcome, Failure):
                raise SearchFailedError(f"{self._study.name}: {model.name} on {noise.group} noise: {outcome.reason}")
            measurement = Measurement.of(model, outcome, images=self._images, seed=noise.seed)
            stored = self._study.attributes.get(MEASURED) or {}
            self._study.set_attribute(MEASURED, {**stored, key: measurement.to_json()})
        self._advance(note=f"{self.sign * measurement.loss:.4g}")
        return measurement

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
        """What losses on this noise are relative to; ``None`` if they are absolute.

        Raises:
            ObjectiveError: it cannot be measured.
        """
        return yardstick_on(
            noise, self._study, self._objective, self._evaluate, images=self._images, sampler=self._sampler
        )

    def _stored(self, key: str, noise: Noise, model: Model) -> Measurement | None:
        """What this study or a sibling has stored under this key with all needed metrics; ``None`` if neither has."""
        needed = set(self.reported.signs) if noise.group == HELD_OUT.group else set()

        def usable(attributes: Mapping[str, Any]) -> Measurement | None:
            stored = (attributes.get(MEASURED) or {}).get(key)
            if stored is None or not needed <= stored["values"].keys():
                return None
            return Measurement.from_json(stored, model)

        of_study = usable(self._study.attributes)
        if of_study is not None:
            return of_study
        of_siblings = map(usable, siblings(self._study).values())
        return next((measurement for measurement in of_siblings if measurement is not None), None)


def score_trained_models(
    study: StoredStudy, objective: Objective, images: int | None, evaluate: Evaluate | None = None
) -> None:
    """Score the last checkpoint as the report will, and print it: its number is also in the trainer's log.

    So is the trainer's own EMA, if there is one. An experiment evaluates each once. If one cannot be evaluated, that is
    said, and the search may begin.

    Args:
        study: what is going to be searched.
        objective: the study's objective.
        images: of the report, 0 if it samples none; ``None`` if there will be no report, and the last checkpoint is
            scored as the search's candidates are.
        evaluate: evaluates one candidate; ``None`` does it in this process.

    Raises:
        ObjectiveError: what losses are relative to cannot be measured.
        TrajectoryError: as :func:`trained_models`.
    """
    noise = SEARCH if images is None else HELD_OUT
    size = ""
    if images:
        size = f" on {images:,} {'items' if objective.sampler is None else 'images'}"
    evaluate = evaluate or functools.partial(evaluate_safely, objective)
    merges_averages = objective.trajectory is not None and objective.trajectory.merges_averages
    models = trained_models(study, objective)
    lines = []
    with progress(f"{study.name} as trained", len(models)) as advance:
        measurer = Measurer(study, objective, evaluate, advance, images=images or 0)
        for model in models:
            try:
                measurement = measurer.on(noise, model)
            except SearchFailedError as error:
                lines.append(str(error))
                continue
            kind = f" ({TRAINER_EMA})" if merges_averages and model.name == LAST_CHECKPOINT else ""
            lines.append(
                f"{split_name(study.name)[0]}: {model.name}{kind}, step {objective.steps[-1]}, "
                f"{noise.group} noise{size}: {_described(measurement, measurer.sign)}; compare this with your "
                "trainer's log: if they differ, this score does not measure what your trainer does"
            )
    for line in lines:
        notice(line)


def _described(measurement: Measurement, sign: int) -> str:
    """``fid 12.3, precision 0.6``: the metrics, and first the loss unless it is one of them."""
    shown = {name: value for name, [value] in measurement.values.items() if not name.endswith(STANDARD_ERROR)}
    loss = shown.pop("loss")
    if sign * loss not in shown.values():
        shown = {"loss": loss, **shown}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


def trained_models(study: StoredStudy, objective: Objective) -> list[Model]:
    """The models that the trainer has made itself: the last checkpoint, and its own EMA where it kept one.

    The hash of the EMA is stored with the study: an EMA that is gone later is still one of them, with its measurements.

    Raises:
        TrajectoryError: the EMA that the user named is not there, or of another model, and none was known before.
    """
    count = len(objective.steps)
    models = [Model(LAST_CHECKPOINT, last_alone(count))]
    sha256 = known_sha256 = study.attributes.get(TRAINER_EMA_SHA256)
    try:
        if objective.trajectory is not None:
            sha256 = objective.trajectory.trainer_ema_sha256 or known_sha256
    except TrajectoryError:
        if known_sha256 is None:
            raise
    if sha256 != known_sha256:
        study.set_attribute(TRAINER_EMA_SHA256, sha256)
    if sha256 is not None:
        models.append(Model(TRAINER_EMA, trainer_ema(count), weights_sha256=sha256))
    return models
