"""The report of a study's answer on held-out noise: four records, and how they are stored as JSON.

A report is about models (:class:`Model`): the best of the search, what the user had before, and the answer, which is
one of them or a point between two. Each was measured on the same noise (:class:`Measurement`), and each metric of the
search's best is compared with that of the best average (:class:`MetricRow`). A loss can fall while single images get
worse. So the rows after the loss are other metrics. One of them is the cross-check: a distance in features that the
search did not see.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pydantic

from lcsc_opt.base.records import SEARCH, STANDARD_ERROR, Evaluation, Noise, SamplerTitle, Yardstick, metric_of_loss
from lcsc_opt.database.arrays import array_of, stored_array
from lcsc_opt.database.names import EMA

MEASURED = "measured"  # the attribute of a study with all measurements on other noise than the search's
YARDSTICKS = "yardsticks"  # the one with what losses are relative to, on the search's noise and on other
HELD_OUT_REPORT = "held_out"  # the one with the report
SINGLE_GROUP_NOISE = 0.02  # of the value; one group has no spread, and a smaller change counts as noise
Interval = tuple[float, float]
"""Its lower and its upper end."""


def _array(value: Any) -> npt.NDArray[np.float64]:
    return value if isinstance(value, np.ndarray) else array_of(value)


_StoredArray = Annotated[
    npt.NDArray[np.float64],
    pydantic.PlainValidator(_array),
    pydantic.PlainSerializer(stored_array),
]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that a report measures.

    Attributes:
        name: for people, as ``trial 38``, ``½ of the way from EMA* to trial 38``, ``EMA*``, ``last checkpoint``.
        coefficients: ``[K]`` or ``[S, K]``; of the trainer's own EMA ``[K + 1]``.
        weights_sha256: of the trainer's own EMA, which its coefficients do not tell.
        study: the study that it was found in; ``None`` of a model that was not searched for.
        trial: the number of its trial in that study.
        label: which average it is, for people.
    """

    name: str
    coefficients: _StoredArray = dataclasses.field(compare=False)  # in a report, names tell models apart
    weights_sha256: str | None = None
    study: str | None = None
    trial: int | None = None
    label: str | None = None

    @property
    def key(self) -> str:
        """The same for models that have the same weights."""
        sha256 = self.weights_sha256 or hashlib.sha256(self.coefficients.tobytes()).hexdigest()
        return sha256[:16]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One model on one or more groups of noise.

    Attributes:
        model: what was measured.
        images: of each group; 0 where the objective samples none.
        seeds: of the groups.
        values: ``loss`` or the name of a metric → its value on each group, of the metrics that all groups have.
        without_groups: the same names → for each group its values without one of ten groups of images each; only where
            all of them are known.
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
        """One measurement on all groups of noise, of at least one of the same model on some of them."""
        first = parts[0]
        seeds: tuple[int, ...] = ()
        for part in parts:
            seeds += part.seeds
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
        names = [name for name in self.values if name not in ("loss", "loss" + STANDARD_ERROR)]
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
        """JSON-able: the means over the groups of noise, and what they are of; the loss by the study's ``sign``."""
        return {"loss": sign * self.loss, "metrics": self.metrics, "images": self.images, "seeds": list(self.seeds)}

    def to_json(self) -> dict[str, Any]:
        """What is stored under the keys of the model and of the sample, which are left out."""
        stored: dict[str, Any] = _MEASUREMENT.dump_python(self, mode="json", exclude={"model"})
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], model: Model) -> Measurement:
        """The inverse of :meth:`to_json`."""
        return _MEASUREMENT.validate_python({**stored, "model": model})


def sample_key(images: int, noise: Noise, sampler: SamplerTitle | None) -> str:
    """What a measurement is made on, as a key; ``sampler`` is ``None`` for that of the search."""
    key = f"{images} {noise.group} {noise.seed}"
    if sampler is not None:
        key += f" {sampler.sha256[:16]}"
    return key


def search_yardstick(attributes: Mapping[str, Any]) -> Yardstick | None:
    """What the losses of a study are relative to, from its attributes; ``None`` if they are absolute."""
    for key, stored in (attributes.get(YARDSTICKS) or {}).items():
        if key.split()[1] == SEARCH.group:  # see sample_key
            return Yardstick(**stored)
    return None


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """One metric of the search's best model on held-out noise, compared with a baseline's on the same noise.

    Attributes:
        metric: its name; ``loss`` is the loss.
        sign: 1 if lower is better, -1 if higher is; ``None`` if the objective does not say.
        value: mean over the groups of noise.
        spread: the sample standard deviation over the groups; for one group, or where all have the same value, the
            standard error that was measured with it, or ``None``.
        against: the name of the baseline; ``None`` if it was not measured.
        baseline: the baseline's value.
        baseline_spread: the same of the baseline's.
        gain: how much better the model is than the baseline, in the metric's unit; negative if it is worse.
        gain_spread: the sample standard deviation of the gain over the groups of noise; for one group, or where it is
            the same in all, the root of both squared standard errors, or ``None``.
        lost: whether ``gain_interval`` is below zero; if that is not known, whether the model is worse by more than
            2 % of the baseline's value. Never if it is as good as real images.
        real_halves: the value of held-out real images; ``None`` if none are held out.
        cross_check: whether it is the distance in features that the search did not see.
        interval: the 95 % interval of the value, for the noise of sampling so many images; ``None`` if it is not known.
        baseline_interval: the same of the baseline's.
        gain_interval: the same of the gain, on the same noise.
    """

    metric: str
    sign: int | None
    value: float
    spread: float | None = None
    against: str | None = None
    baseline: float | None = None
    baseline_spread: float | None = None
    gain: float | None = None
    gain_spread: float | None = None
    lost: bool = False
    real_halves: float | None = None
    cross_check: bool = False
    interval: Interval | None = None
    baseline_interval: Interval | None = None
    gain_interval: Interval | None = None

    @property
    def is_certain(self) -> bool:
        """Whether it gained, and the interval of the gain is above zero if that is known."""
        if self.gain is None:
            return False
        if self.gain_interval is None:
            return self.gain > 0
        return self.gain_interval[0] > 0

    @property
    def is_judge(self) -> bool:
        """Whether a gain of the loss has to show in it: FID in features, or to real images, that no search saw."""
        return self.cross_check or self.metric.partition("@")[0] == "fid_held_out"

    @property
    def change(self) -> str:
        """``precision 0.621 → 0.517``: the baseline's value and the model's; and whether a gain may be chance."""
        if self.baseline is None:
            return f"{self.metric} {self.value:.4g}"
        text = f"{self.metric} {self.baseline:.4g} → {self.value:.4g}"
        if self.gain is not None and self.gain > 0 and not self.is_certain:
            text += ", perhaps by chance"
        return text

    def misses(self, bound: float) -> bool:
        """Whether the whole interval is worse than ``bound``; if that is not known, the value by more than 2 %.

        ``False`` without a sign: then nobody knows what is worse.
        """
        if self.interval is None:
            tolerance = SINGLE_GROUP_NOISE * abs(bound)
        else:
            tolerance = (self.interval[1] - self.interval[0]) / 2
        return (self.sign or 0) * (self.value - bound) > tolerance


@dataclasses.dataclass(frozen=True)
class HeldOutReport:
    """What was measured on noise that the search never saw, and the model that is handed out.

    Attributes:
        found: the best trial of the search, by the noise of the choice.
        baselines: what the user had before the search, as far as it could be measured.
        rows: the loss, or the score that is maximized, and all other metrics, compared with EMA*'s.
        selection: the name of a model → its loss on the noise of the choice, as a user knows it.
        answer: the best model that is known, by noise and real images that decided nothing before; ``None`` in another
            sampler than the search's.
        had: the best model that the user had before the search, by the choice; ``None`` if none could be measured.
        warning: one line with what does not hold, such as other metrics that did not follow the loss.
        sampler: how the images were made; ``None`` without images.
        also: the same models, measured in another sampler; ``None`` if the objective has one only.
    """

    found: Measurement
    baselines: tuple[Measurement, ...] = ()
    rows: tuple[MetricRow, ...] = ()
    selection: Mapping[str, float] = dataclasses.field(default_factory=dict)
    answer: Measurement | None = None
    had: Measurement | None = None
    warning: str | None = None
    sampler: str | None = None
    also: HeldOutReport | None = None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any] | None) -> HeldOutReport | None:
        """The study attribute ``held_out``; ``None`` before there is one, and for one of another version."""
        if stored is None:
            return None
        try:
            return _REPORT.validate_python(stored)
        except pydantic.ValidationError:
            return None

    def to_json(self) -> dict[str, Any]:
        """What is stored with the study, and printed by ``lcsc evaluate --format json``."""
        stored: dict[str, Any] = _REPORT.dump_python(self, mode="json")
        return stored

    @property
    def is_found(self) -> bool:
        """Whether the search found the answer, and the user did not have it before."""
        return self.had is None or self.answer is None or self.had.model != self.answer.model

    @property
    def trial(self) -> int | None:
        """The number of the search's best trial."""
        return self.found.model.trial

    @property
    def loss(self) -> float:
        """That of the search's best trial, the mean over the groups of noise."""
        return self.found.loss

    @property
    def sample(self) -> tuple[int, tuple[int, ...]]:
        """Images and groups of noise: losses compare only where these are the same, since FID depends on both."""
        return self.found.images, self.found.seeds

    def baseline(self, name: str) -> Measurement | None:
        """What was measured of the baseline of this name; ``None`` if it was not."""
        return next((baseline for baseline in self.baselines if baseline.model.name == name), None)

    def ema(self, grid: HeldOutReport | None) -> float | None:
        """EMA*'s loss on this noise; ``None`` if it was not measured there.

        Args:
            grid: the report of the EMA grid, which may have fewer images.
        """
        ema = self.baseline(EMA)
        if ema is not None:
            return ema.loss
        if grid is None or grid.sample != self.sample:
            return None
        return grid.loss


_MEASUREMENT = pydantic.TypeAdapter(Measurement)
_REPORT = pydantic.TypeAdapter(HeldOutReport)


def doubted_rows(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The rows that did not improve with the loss, the cross-check first; none if the loss gained nothing.

    A model is better only if its judges (:attr:`MetricRow.is_judge`) gained for certain; any other metric is doubted
    if it got worse.

    Args:
        rows: of a report, the loss first.
    """
    if not rows:
        return []
    loss, *metrics = rows
    if loss.gain is None or loss.gain <= 0:
        return []
    judges = [row for row in metrics if row.is_judge]
    uncertain = [row for row in judges if row.gain is not None and not row.is_certain]
    worse = [row for row in metrics if row.lost and not row.is_judge]
    return sorted(uncertain, key=lambda row: not row.cross_check) + worse
