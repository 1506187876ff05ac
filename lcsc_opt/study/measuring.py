"""Measures models on noise that no search saw, each once: what was measured is stored, and serves the experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lcsc_opt.base.errors import SearchFailedError
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import HELD_OUT, Candidate, Noise, Yardstick
from lcsc_opt.database.report import MEASURED, Measurement, Model, sample_key
from lcsc_opt.database.siblings import siblings
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.evaluation.base import Failure, Outcome
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
        advance: called after each measurement, as :func:`lcsc_opt.base.progress.progress` gives it.
        images: of each measurement; 0 if the objective samples none.
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
        self._title = self.samplers[sampler] if sampler else None
        self._yardsticks: dict[Noise, Yardstick | None] = {}

    @property
    def sampler_text(self) -> str | None:
        """How the images are made, for people; ``None`` without images."""
        return self.samplers[self._sampler].text if self.samplers else None

    def on(self, noise: Noise, model: Model) -> Measurement:
        """One model on one group of noise.

        Raises:
            SearchFailedError: it cannot be evaluated.
        """
        key = f"{model.key} {sample_key(self._images, noise, self._title)}"
        measurement = self._stored(key, noise, model)
        if measurement is None:
            measurement = self._measured(noise, model)
            stored = self._study.attributes.get(MEASURED) or {}
            self._study.set_attribute(MEASURED, {**stored, key: measurement.to_json()})
        self._advance(note=f"{self.sign * measurement.loss:.4g}")
        return measurement

    def on_each(self, noises: Iterable[Noise], model: Model) -> Measurement:
        """One model on several groups of noise.

        Raises:
            SearchFailedError: it cannot be evaluated.
        """
        return Measurement.joined([self.on(noise, model) for noise in noises])

    def possible(self, noises: Iterable[Noise], models: Iterable[Model]) -> list[Measurement]:
        """Those of the models that can be evaluated, on these groups of noise; a notice names the others."""
        measured = []
        for model in models:
            try:
                measured.append(self.on_each(noises, model))
            except SearchFailedError as error:
                notice(f"{error}; it is left out")
        return measured

    def yardstick(self, noise: Noise) -> Yardstick | None:
        """What losses on this noise are relative to.

        Raises:
            ObjectiveError: it cannot be measured.
        """
        if noise not in self._yardsticks:
            self._yardsticks[noise] = yardstick_on(
                noise, self._study, self._objective, self._evaluate, images=self._images, sampler=self._sampler
            )
        return self._yardsticks[noise]

    def _stored(self, key: str, noise: Noise, model: Model) -> Measurement | None:
        """What was measured earlier, in this study or in its siblings, if it has all metrics that are needed."""
        needed = set(self.reported.signs) if noise.group == HELD_OUT.group else set()
        own = self._study.attributes
        if key in (own.get(MEASURED) or {}):
            studies = [own]
        else:
            studies = list(siblings(self._study).values())
        for attributes in studies:
            stored = (attributes.get(MEASURED) or {}).get(key)
            if stored is not None and needed <= stored["values"].keys():
                return Measurement.from_json(stored, model)
        return None

    def _measured(self, noise: Noise, model: Model) -> Measurement:
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
        return Measurement.of(model, outcome, images=self._images, seed=noise.seed)
