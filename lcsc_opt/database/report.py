"""The report of a study's answer on held-out noise: frozen records, and how they are stored as JSON.

A loss can fall while single images get worse. So the rows after the loss are other metrics. One of them is the
cross-check: a distance in features that the search did not see.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lcsc_opt.base.records import SEARCH, Coefficients, Noise, SamplerTitle, Yardstick
from lcsc_opt.database.arrays import array_of, stored_array
from lcsc_opt.database.names import EMA

MEASURED = "measured"  # the attribute of a study with all measurements on other noise than the search's
YARDSTICKS = "yardsticks"  # the one with what losses are relative to, on the search's noise and on other
HELD_OUT_REPORT = "held_out"  # the one with the report
SINGLE_GROUP_NOISE = 0.02  # of the value; one group has no spread, and a smaller change counts as noise
Interval = tuple[float, float]
"""Its lower and its upper end."""

_NO_METRICS: Mapping[str, float] = {}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The loss and the metrics of one model on one group of noise.

    Attributes:
        seed: of the group of noise.
        loss: on this noise.
        metrics: name → value.
        without_groups: ``loss`` or the name of a metric → its values without one of ten groups of images each; empty if
            they are not known.
    """

    seed: int
    loss: float
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    without_groups: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], *, seed: int | None = None) -> Measurement:
        """A stored measurement; ``seed`` is needed where it is stored without one."""
        without_groups = stored.get("without_groups") or {}
        return cls(
            seed=int(stored["seed"]) if seed is None else seed,
            loss=stored["loss"],
            metrics=stored.get("metrics") or _NO_METRICS,
            without_groups={name: tuple(column) for name, column in without_groups.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """The inverse of :meth:`from_json`."""
        return {"seed": self.seed, **self.values_to_json()}

    def values_to_json(self) -> dict[str, Any]:
        """The same without the seed."""
        values: dict[str, Any] = {"loss": self.loss, "metrics": dict(self.metrics)}
        if self.without_groups:
            values["without_groups"] = {name: list(column) for name, column in self.without_groups.items()}
        return values

    def value(self, metric: str) -> float | None:
        """The value of a metric, or of ``loss``; ``None`` if it was not measured."""
        if metric == "loss":
            return self.loss
        return self.metrics.get(metric)


def sample_key(images: int, noise: Noise, sampler: SamplerTitle | None) -> str:
    """What a measurement is made on, as a key; ``sampler`` is ``None`` for that of the search."""
    key = f"{images} {noise.group} {noise.seed}"
    if sampler is not None:
        key += f" {sampler.sha256[:16]}"
    return key


def search_yardstick(attributes: Mapping[str, Any]) -> Yardstick | None:
    """What the losses of a study are relative to, from its attributes; ``None`` if they are absolute."""
    for key, stored in (attributes.get(YARDSTICKS) or {}).items():
        if key.split()[1] == SEARCH.group:
            return Yardstick(**stored)
    return None


@dataclasses.dataclass(frozen=True)
class MeasurementKey:
    """What a measurement is stored under in the study attribute ``measured``: the model, and images and noise.

    Attributes:
        model: a hash of its coefficients, or of its weights if it is no combination.
        sample: number of images, group and seed of the noise; and which sampler, if it is not the search's.
    """

    model: str
    sample: str

    @classmethod
    def of(
        cls,
        coefficients: Coefficients,
        images: int,
        noise: Noise,
        sampler: SamplerTitle | None = None,
        *,
        weights_sha256: str | None = None,
    ) -> MeasurementKey:
        """The key of a model.

        Args:
            coefficients: ``[K]`` or ``[S, K]``.
            images: how many; 0 if none are sampled.
            noise: the group.
            sampler: ``None`` for that of the search, if any.
            weights_sha256: of the trainer's own average, which the coefficients do not tell; ``None`` otherwise.
        """
        sample = sample_key(images, noise, sampler)
        model = weights_sha256 or hashlib.sha256(coefficients.tobytes()).hexdigest()
        return cls(model=model[:16], sample=sample)

    def find(self, measured: Mapping[str, Any] | None, *, seed: int) -> Measurement | None:
        """The measurement on noise of this seed among those of the attribute; ``None`` if it is not there."""
        stored = (measured or {}).get(self.model, {}).get(self.sample)
        if stored is None:
            return None
        return Measurement.from_json(stored, seed=seed)

    def added(self, measured: Mapping[str, Any] | None, measurement: Measurement) -> dict[str, Any]:
        """The attribute with one more measurement."""
        models = dict(measured or {})
        samples = dict(models.get(self.model, {}))
        samples[self.sample] = measurement.values_to_json()
        models[self.model] = samples
        return models


@dataclasses.dataclass(frozen=True)
class MeasuredModel:
    """One model on one or more groups of noise.

    Attributes:
        loss: mean over the groups of noise.
        metrics: name → mean over the groups, of the metrics that all groups have.
        images: images of each group; 0 where the objective samples none, ``None`` if that is not stored.
        groups: a measurement for each group of noise.
    """

    loss: float
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    images: int | None = None
    groups: tuple[Measurement, ...] = ()

    @classmethod
    def mean_of(cls, groups: Sequence[Measurement], *, images: int) -> MeasuredModel:
        """The means of these measurements."""
        common = [name for name in groups[0].metrics if all(name in group.metrics for group in groups)]
        return cls(
            loss=statistics.fmean(group.loss for group in groups),
            metrics={name: statistics.fmean(group.metrics[name] for group in groups) for name in common},
            images=images,
            groups=tuple(groups),
        )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> MeasuredModel:
        """A stored model; everything but the loss may be missing."""
        return cls(
            loss=stored["loss"],
            metrics=stored.get("metrics") or _NO_METRICS,
            images=stored.get("images"),
            groups=tuple(Measurement.from_json(group) for group in stored.get("groups") or ()),
        )

    def to_json(self) -> dict[str, Any]:
        """The inverse of :meth:`from_json`."""
        return {
            "loss": self.loss,
            "metrics": dict(self.metrics),
            "images": self.images,
            "groups": [group.to_json() for group in self.groups],
        }

    def value(self, metric: str) -> float | None:
        """The mean of a metric, or of ``loss``; ``None`` if it was not measured in all groups."""
        if metric == "loss":
            return self.loss
        return self.metrics.get(metric)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the groups of noise; reports that store no groups are of seed 0."""
        return tuple(group.seed for group in self.groups) or (0,)

    def values(self, metric: str) -> dict[int, float]:
        """Seed of a group of noise → value of a metric, or of ``loss``; empty if a group does not have it."""
        by_seed = {}
        for group in self.groups:
            value = group.value(metric)
            if value is None:
                return {}
            by_seed[group.seed] = float(value)
        return by_seed


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A plain average of the checkpoints, measured on the same noise as the answer.

    Attributes:
        name: ``EMA*``, or what stands in for it.
        measured: its loss and metrics.
        study: the study whose answer it is; ``None`` of a baseline that was not searched for.
        trial: the number of the trial in that study.
        label: which average it is, for people.
    """

    name: str
    measured: MeasuredModel
    study: str | None = None
    trial: int | None = None
    label: str | None = None

    @classmethod
    def from_json(cls, name: str, stored: Mapping[str, Any]) -> Baseline:
        """A stored baseline of this name."""
        return cls(
            name=name,
            measured=MeasuredModel.from_json(stored),
            study=stored.get("study"),
            trial=stored.get("trial"),
            label=stored.get("label"),
        )

    def to_json(self) -> dict[str, Any]:
        """The inverse of :meth:`from_json`, without the name."""
        origin = {"study": self.study, "trial": self.trial, "label": self.label} if self.study else {}
        return {**origin, **self.measured.to_json()}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The model that is handed out: the best that is known, by noise and real images that decided nothing before.

    Attributes:
        name: for people, as ``trial 38``, ``½ of the way from EMA* to trial 38``, ``EMA*``, ``last checkpoint``.
        coefficients: ``[K]`` or ``[S, K]``; of the trainer's own EMA ``[K + 1]``.
        selection: its loss on the noise of the choice.
        measured: on held-out noise.
        trial: its number in the study; ``None`` if it is no trial of the study.
        had: the best model that the user had before the search, by the choice; ``None`` if none could be measured.
    """

    name: str
    coefficients: Coefficients = dataclasses.field(compare=False)
    selection: float
    measured: MeasuredModel
    trial: int | None = None
    had: Baseline | None = None

    @property
    def is_found(self) -> bool:
        """Whether the search found it, and the user did not have it before."""
        return self.had is None or self.had.name != self.name

    @classmethod
    def from_json(cls, stored: Mapping[str, Any] | None) -> Choice | None:
        """A stored answer; ``None`` before there is one."""
        if stored is None:
            return None
        had = stored.get("had")
        return cls(
            name=stored["name"],
            coefficients=array_of(stored["coefficients"]),
            selection=stored["selection"],
            measured=MeasuredModel.from_json(stored["measured"]),
            trial=stored.get("trial"),
            had=None if had is None else Baseline.from_json(had["name"], had),
        )

    def to_json(self) -> dict[str, Any]:
        """The inverse of :meth:`from_json`."""
        return {
            "name": self.name,
            "coefficients": stored_array(self.coefficients),
            "selection": self.selection,
            "measured": self.measured.to_json(),
            "trial": self.trial,
            "had": None if self.had is None else {"name": self.had.name, **self.had.to_json()},
        }


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """One metric of a study's answer on held-out noise, compared with the baseline's on the same noise.

    Attributes:
        metric: its name; ``loss`` is the loss.
        sign: 1 if lower is better, -1 if higher is; ``None`` if the objective does not say.
        value: mean over the groups of noise.
        spread: the sample standard deviation over the groups; for one group, or where all have the same value, the
            standard error that was measured with it, or ``None``.
        against: the name of the baseline; ``None`` if it was not measured.
        baseline: the baseline's value.
        baseline_spread: the same of the baseline's.
        gain: how much better the answer is than the baseline, in the metric's unit; negative if it is worse.
        gain_spread: the sample standard deviation of the gain over the groups of noise; for one group, or where it is
            the same in all, the root of both squared standard errors, or ``None``.
        lost: whether ``gain_interval`` is below zero; if that is not known, whether the answer is worse by more than
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

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> MetricRow:
        """A stored row; one of before 0.3.0 has no intervals."""
        values = dict(stored)
        for name in ("interval", "baseline_interval", "gain_interval"):
            if values.get(name) is not None:
                low, high = values[name]
                values[name] = (low, high)
        return cls(**values)

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
        """``precision 0.621 → 0.517``: the baseline's value and the answer's; and whether a gain may be chance."""
        if self.baseline is None:
            return f"{self.metric} {self.value:.4g}"
        text = f"{self.metric} {self.baseline:.4g} → {self.value:.4g}"
        if self.gain is not None and self.gain > 0 and not self.is_certain:
            text += ", perhaps by chance"
        return text

    def misses(self, bound: float) -> bool:
        """Whether the whole interval is worse than ``bound``; if that is not known, the value by more than 2 %."""
        if self.interval is None:
            tolerance = SINGLE_GROUP_NOISE * abs(bound)
        else:
            tolerance = (self.interval[1] - self.interval[0]) / 2
        return (self.sign or 0) * (self.value - bound) > tolerance


@dataclasses.dataclass(frozen=True)
class HeldOutReport:
    """A study's answer on noise that the search never saw.

    Attributes:
        trial: the number of the chosen trial; ``None`` if it is not stored.
        answer: what was measured of it.
        selection: the trials that it was chosen from → their losses on the selection noise.
        baselines: what was measured on the same noise, too.
        rows: the loss, and all metrics that are not the loss itself.
        warning: one line if the loss is below its baseline, but other metrics did not follow.
        sampler: how the images were made; ``None`` without images.
        also: the same answer, measured in another sampler; ``None`` if the objective has one only.
        choice: the best model that is known, which may be another than the search's answer.
    """

    trial: int | None
    answer: MeasuredModel
    selection: Mapping[int, float] = dataclasses.field(default_factory=dict)
    baselines: tuple[Baseline, ...] = ()
    rows: tuple[MetricRow, ...] = ()
    warning: str | None = None
    sampler: str | None = None
    also: HeldOutReport | None = None
    choice: Choice | None = None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any] | None) -> HeldOutReport | None:
        """The study attribute ``held_out``; ``None`` before there is one."""
        if stored is None:
            return None
        baselines = stored.get("baselines") or {}
        return cls(
            trial=stored.get("trial"),
            answer=MeasuredModel.from_json(stored),
            selection=dict(zip(stored.get("chosen_from", ()), stored.get("selection", ()), strict=True)),
            baselines=tuple(Baseline.from_json(name, baseline) for name, baseline in baselines.items()),
            rows=tuple(MetricRow.from_json(row) for row in stored.get("rows") or ()),
            warning=stored.get("warning"),
            sampler=stored.get("sampler"),
            also=cls.from_json(stored.get("also")),
            choice=Choice.from_json(stored.get("choice")),
        )

    def to_json(self) -> dict[str, Any]:
        """What is stored with the study, and printed by ``lcsc evaluate --format json``."""
        stored = {
            "trial": self.trial,
            **self.answer.to_json(),
            "chosen_from": list(self.selection),  # two lists: keys in JSON are texts
            "selection": list(self.selection.values()),
        }
        if self.baselines:
            stored["baselines"] = {baseline.name: baseline.to_json() for baseline in self.baselines}
        stored["rows"] = [dataclasses.asdict(row) for row in self.rows]
        if self.warning is not None:
            stored["warning"] = self.warning
        if self.sampler is not None:
            stored["sampler"] = self.sampler
        if self.also is not None:
            stored["also"] = self.also.to_json()
        if self.choice is not None:
            stored["choice"] = self.choice.to_json()
        return stored

    @property
    def loss(self) -> float:
        """The answer's loss, the mean over the groups of noise."""
        return self.answer.loss

    @property
    def metrics(self) -> Mapping[str, float]:
        """Everything that was measured of the answer, each the mean over the groups of noise."""
        return self.answer.metrics

    @property
    def images(self) -> int | None:
        """Images of each group of noise, or ``None`` if that is not stored."""
        return self.answer.images

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the groups of noise."""
        return self.answer.seeds

    @property
    def sample(self) -> tuple[int | None, tuple[int, ...]]:
        """Images and groups of noise: losses compare only where these are the same, since FID depends on both."""
        return self.images, self.seeds

    def baseline(self, name: str) -> MeasuredModel | None:
        """What was measured of the baseline of this name; ``None`` if it was not."""
        return next((baseline.measured for baseline in self.baselines if baseline.name == name), None)

    @property
    def doubted(self) -> tuple[str, ...]:
        """The metrics that did not improve with the loss."""
        return tuple(row.metric for row in doubted_rows(self.rows))

    def ema(self, grid: HeldOutReport | None) -> float | None:
        """EMA*'s loss on this noise; ``None`` if it was not measured there.

        Args:
            grid: the report of the EMA grid, which may have fewer images.
        """
        if self.rows and self.rows[0].against == EMA:
            return self.rows[0].baseline
        if grid is None or grid.sample != self.sample:
            return None
        return grid.loss


def score_row(rows: Sequence[MetricRow]) -> MetricRow:
    """The row of the loss; of a maximized score, that of the metric which is the loss times −1.

    Args:
        rows: of a report, the loss first.
    """
    loss, *metrics = rows
    for row in metrics:
        is_negative = row.value == -loss.value and (row.baseline or 0.0) == -(loss.baseline or 0.0)
        if row.sign == -1 and is_negative:
            return row
    return loss


def doubted_rows(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The rows that did not improve with the loss, judges first; none if the loss is not below the baseline's.

    An answer is better only if its judges (:attr:`MetricRow.is_judge`) gained for certain; any other metric is doubted
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
