"""A model that is measured, and what was measured of it: the rows of a report."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lcsc_opt.base.records import STANDARD_ERROR, Coefficients, Evaluation, Noise, SamplerTitle, metric_of_loss

UNSEEN = "unseen"
"""Among the values of a measurement: the loss with its distances to real images that no search sees."""
_NO_METRICS = ("loss", "loss" + STANDARD_ERROR, UNSEEN)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that a report measures.

    Attributes:
        name: for people, and the only one of this name in the experiment: ``LCSC, trial 38``, ``EMA*``,
            ``½ of the way from EMA* to LCSC, trial 38``, ``last checkpoint``.
        coefficients: ``[K]`` or ``[S, K]``; of the trainer's own EMA ``[K + 1]``.
        weights_sha256: of the trainer's own EMA, which its coefficients do not tell.
        study: the study that it was found in, whose rows it has; ``None`` of a model that was not searched for.
        trial: the number of its trial in that study; ``None`` of a point between two models.
        label: which average it is, for people.
        searched: its loss on the noise of the searches, as their trials have it; ``None`` if that was not measured.
    """

    name: str
    coefficients: Coefficients = dataclasses.field(compare=False)  # in a report, names tell models apart
    weights_sha256: str | None = None
    study: str | None = None
    trial: int | None = None
    label: str | None = None
    searched: float | None = dataclasses.field(default=None, compare=False)

    @property
    def key(self) -> str:
        """The same for models that have the same weights."""
        sha256 = self.weights_sha256 or hashlib.sha256(self.coefficients.tobytes()).hexdigest()
        return sha256[:16]

    def to_json(self) -> dict[str, Any]:
        """What is stored of it with a trial that has its coefficients."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "coefficients"]
        return {**{name: getattr(self, name) for name in names}, "key": self.key}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], coefficients: Coefficients) -> Model:
        """The inverse of :meth:`to_json`."""
        return cls(coefficients=coefficients, **{name: value for name, value in stored.items() if name != "key"})

    @property
    def title(self) -> str:
        """Its name, and which average it is."""
        if self.label is None:
            return self.name
        return f"{self.name} ({self.label})"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One model on one or more groups of noise.

    Attributes:
        model: what was measured.
        images: of each group; 0 where the objective samples none.
        seeds: of the groups.
        values: ``loss`` or the name of a metric → its value on each group, of the metrics that all groups have.
        without_groups: the same names → for each group its values without one of ten groups of images each, and then
            without one of ten groups of real images (:mod:`lcsc_opt.base.jackknife`); only where all of them are known.
    """

    model: Model
    images: int
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]
    without_groups: Mapping[str, tuple[tuple[float, ...], ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, evaluation: Evaluation, *, images: int, seed: int) -> Measurement:
        """An evaluation of a model on one group of noise."""
        values = {**evaluation.metrics, "loss": evaluation.loss}
        if evaluation.unseen is not None:
            values[UNSEEN] = evaluation.unseen
        # the standard error of the metric that the loss is, up to the sign, is the loss's
        metric = metric_of_loss(evaluation.metrics, evaluation.loss)
        if metric is not None and metric + STANDARD_ERROR in evaluation.metrics:
            values["loss" + STANDARD_ERROR] = evaluation.metrics[metric + STANDARD_ERROR]
        return cls(
            model,
            images,
            (seed,),
            {name: (value,) for name, value in values.items()},
            {name: (tuple(column),) for name, column in evaluation.without_groups.items()},
        )

    @classmethod
    def joined(cls, parts: Sequence[Measurement]) -> Measurement:
        """At least one measurement of one model, each on other groups of noise, as one on all these groups."""
        first = parts[0]
        seeds = tuple(seed for part in parts for seed in part.seeds)
        values = {}
        for name in first.values:
            if all(name in part.values for part in parts):
                values[name] = tuple(value for part in parts for value in part.values[name])
        without_groups = {}
        for name in first.without_groups:
            if all(name in part.without_groups for part in parts):
                without_groups[name] = tuple(column for part in parts for column in part.without_groups[name])
        return cls(first.model, first.images, seeds, values, without_groups)

    @property
    def loss(self) -> float:
        """The mean over the groups of noise."""
        return statistics.fmean(self.values["loss"])

    @property
    def metrics(self) -> dict[str, float]:
        """Name → mean over the groups of noise."""
        names = [name for name in self.values if name not in _NO_METRICS]
        return {name: statistics.fmean(self.values[name]) for name in names}

    @property
    def metric_of_loss(self) -> str | None:
        """The metric that the loss is, up to the sign; ``None`` if it is none of them."""
        return metric_of_loss(self.metrics, self.loss)

    def value(self, metric: str) -> float | None:
        """The mean of a metric, or of ``loss``; ``None`` if it was not measured in all groups."""
        if metric not in self.values:
            return None
        return statistics.fmean(self.values[metric])

    def means(self, sign: int) -> dict[str, Any]:
        """JSON-able: the means over the groups of noise, and what they are of; ``sign`` −1 makes a loss a score."""
        return {"loss": sign * self.loss, "metrics": self.metrics, "images": self.images, "seeds": list(self.seeds)}


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a model is measured on.

    Attributes:
        noise: of the images.
        images: how many; 0 if the objective counts none.
        sampler: how they are made, if that is not as in searches.
    """

    noise: Noise
    images: int = 0
    sampler: SamplerTitle | None = None
