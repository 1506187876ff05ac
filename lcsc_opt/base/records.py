"""The plain records that the optimizer, the objective and the database exchange."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.errors import ObjectiveError

STANDARD_ERROR = "_stderr"
"""Behind the name of a metric, as lm_eval has it: the standard error of its value."""

Coefficients = npt.NDArray[np.float64]
"""``[K]`` float64, any sign, sum to one; or ``[S, K]``, a row for each layer group, each sums to one."""


TRAINER_EMA = "trainer's EMA"
"""How reports call an average that the trainer kept itself; of several, a rate or a place follows."""

CONTIGUOUS = "contiguous"
"""The layout of all weights that nobody gave another one."""
CHANNELS_LAST = "channels last"


@dataclasses.dataclass(frozen=True)
class Noise:
    """One group of sampling noise: ``group`` names its purpose, ``seed`` tells groups of one purpose apart.

    Two different groups share no random number, so a model that was searched on ``search`` can be reported on
    ``held-out``.
    """

    group: str = "search"
    seed: int = 0


SEARCH = Noise("search")
SELECTION = Noise("selection")
HELD_OUT = Noise("held-out")


PENALTY = 10.0  # times the loss of the yardstick, for a kept metric that is twice its bound


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What one fixed average of the checkpoints measures on some noise: losses on this noise are relative to it.

    Attributes:
        metrics: name → value, of the metrics that the loss is made of.
        kept: the metric that must not get worse; ``None`` if the loss has none.
        sign: of the kept metric: −1 if higher is better, else 1.
        bound: its worst value: the average's, or the one of the settings.
        deviation: the standard deviation of the kept metric between images.
        loss: the loss of the average, without a penalty.
    """

    metrics: Mapping[str, float]
    kept: str | None = None
    sign: int = 1
    bound: float = 0.0
    deviation: float = 0.0
    loss: float = 1.0

    def excess(self, value: float) -> float:
        """By how much a value of the kept metric is worse than the bound, in the metric's unit; negative if better."""
        return self.sign * (value - self.bound)

    def penalty(self, value: float) -> float:
        """What the loss has more for a value of the kept metric: its excess, relative to the bound unless that is zero.

        It is :data:`PENALTY` times the average's loss for a value that is twice the bound.
        """
        return PENALTY * abs(self.loss) * max(0.0, self.excess(value)) / (abs(self.bound) or 1.0)

    def bound_in_words(self) -> str:
        """The number, and whose it is: other noise has another one where it is the average's."""
        text = f"{self.bound:.4g}"
        if self.kept is not None and self.metrics.get(self.kept) == self.bound:
            text += ", which an average of the checkpoints has on this noise"
        return text


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """What an objective is asked to evaluate.

    >>> import numpy as np, lcsc_opt
    >>> lcsc_opt.Candidate(np.array([0.5, 0.5]), images=1000).noise
    Noise(group='search', seed=0)

    Attributes:
        coefficients: ``[K]`` float64, sum to one; or ``[S, K]``, a row for each layer group. Reports have one candidate
            of K + 1, whose last stands for the trainer's own average of the weights.
        images: how many images to sample; ``None`` leaves it to the objective's settings.
        noise: which group of noise to sample from.
        gradient: whether to compute the gradient of the loss in the coefficients, too.
        keep_weight: the weight of the kept metric's guide in a gradient; ``None`` uses the penalty of the loss.
        yardstick: what the loss is relative to; without it the metrics of the loss have no units and no bound.
        rehearsal: whether nobody compares the loss: a few images are enough.
        unbiased: whether the loss and its gradient are corrected for the bias of few images, as steps need it. Such a
            loss is comparable with no other.
        error: whether ``without_groups`` is wanted, for the errors of the loss and the metrics.
        sampler: which of the objective's samplers makes the images; searches use the first.
    """

    coefficients: Coefficients
    images: int | None = None
    noise: Noise = SEARCH
    gradient: bool = False
    keep_weight: float | None = None
    yardstick: Yardstick | None = None
    rehearsal: bool = False
    unbiased: bool = False
    error: bool = False
    sampler: int = 0

    def compares(self, images: int | None = None) -> bool:
        """Whether its loss compares with those of plain evaluations, which name no number of images and no noise.

        Args:
            images: how many a plain evaluation has; a candidate that asks for exactly so many compares, too. ``None``
                if that is not known.
        """
        return self.images in (None, images) and self.noise == SEARCH and not self.unbiased


@dataclasses.dataclass(frozen=True)
class SamplerTitle:
    """How images are sampled.

    Attributes:
        text: for people, as ``DDIMScheduler, 10 model calls an image``.
        sha256: of all settings that change the images.
    """

    text: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportedMetrics:
    """Metrics that only held-out reports have.

    Attributes:
        signs: metric → 1 if lower is better, −1 if higher is better. Reports say which of them got worse.
        terms: the metrics that a loss of several is made of; empty of a single one.
        cross_check: the one that shows whether a gain in the loss is real, such as FID in features that the loss does
            not see; lower is better.
        cross_check_text: that metric, and what sees the images there, in words.
        judges: metrics in which no answer may be certainly worse than what the user had, such as the cross-check; lower
            is better.
        real_halves: metric → its value for held-out real images in place of samples; empty if none are held out.
        real_count: how many these are. Distances of fewer images are larger.
        few_real_images: how many real images a search and its reports compare with, where they are few; else 0.
    """

    signs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    terms: tuple[str, ...] = ()
    cross_check: str | None = None
    cross_check_text: str | None = None
    judges: tuple[str, ...] = ()
    real_halves: Mapping[str, float] = dataclasses.field(default_factory=dict)
    real_count: int = 0
    few_real_images: int = 0


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one evaluation cost. Seconds are wall-clock; a search measures those that an objective leaves at zero."""

    images: int = 0
    model_calls: int = 0
    seconds: float = 0.0
    merge_seconds: float = 0.0
    sample_seconds: float = 0.0
    features_seconds: float = 0.0
    metric_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """The cost of both, one after the other."""
        sums = {name: value + getattr(other, name) for name, value in dataclasses.asdict(self).items()}
        return Cost(**sums)

    @classmethod
    def of_parts(cls, parts: Sequence[Cost]) -> Cost:
        """The cost of one or more parts that ran at the same time: all images and calls, the seconds of the slowest."""
        combined = {}
        for field in dataclasses.fields(cls):
            values = [getattr(part, field.name) for part in parts]
            is_count = isinstance(field.default, int)
            combined[field.name] = sum(values) if is_count else max(values)
        return cls(**combined)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an objective answers.

    >>> import lcsc_opt
    >>> lcsc_opt.Evaluation(loss=0.25, metrics={"accuracy": 0.75}).loss
    0.25

    Attributes:
        loss: what the optimizer minimizes; lower is better.
        metrics: every number that was measured, as it is reported (FID, …).
        cost: images, model calls and seconds.
        gradient: the gradient of the loss with respect to the coefficients, of their shape; ``None`` if not asked for.
        violation: by how many standard errors the kept metric is worse than its bound; ``None`` without a bound.
        unseen: where ``without_groups`` is wanted, the loss with its FID to held-out real images; ``None`` if it has
            none, or none are held out.
        without_groups: on the noise of choice and report, ``loss``, ``unseen`` or a metric → its values without one of
            ten groups of images each, then without one of ten groups of real images where it compares with some
            (:mod:`lcsc_opt.base.jackknife`); empty if they are not known.
    """

    loss: float
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cost: Cost = Cost()
    gradient: Coefficients | None = dataclasses.field(default=None, compare=False)
    violation: float | None = None
    unseen: float | None = None
    without_groups: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Numbers of numpy and torch become Python's, which the database stores, and the gradient float64.

        Raises:
            TypeError, ValueError: something else stands where a number should be.
        """
        numbers: dict[str, Any] = {
            "loss": _as_float(self.loss),
            "metrics": {name: _as_float(value) for name, value in self.metrics.items()},
            "without_groups": {name: tuple(map(float, values)) for name, values in self.without_groups.items()},
        }
        if self.gradient is not None:
            numbers["gradient"] = np.asarray(self.gradient, dtype=np.float64)
        for name in ("violation", "unseen"):
            if getattr(self, name) is not None:
                numbers[name] = _as_float(getattr(self, name))
        for name, value in numbers.items():
            object.__setattr__(self, name, value)


def _as_float(number: Any) -> float:
    """A number of Python's, numpy's or torch's, also one with a graph."""
    detach = getattr(number, "detach", None)
    return float(number if detach is None else detach())


def metric_of_loss(metrics: Mapping[str, float], loss: float) -> str | None:
    """The name of the metric that a loss is, with either sign; ``None`` if it is none of them.

    Only the first can be: an objective lists the metric first that it searches, and another one may have the same value
    by chance.
    """
    first = next(iter(metrics), None)
    if first is None or abs(metrics[first]) != abs(loss):
        return None
    return first


def as_json(value: Any) -> Any:
    """A value as the database gives it back: what JSON holds of it, and the same in every process.

    Numbers and arrays of numpy and torch become Python's, tuples and sets lists, and what has only a text, such as a
    path or a dtype, that text.

    Raises:
        ObjectiveError: a value is described only by where it is in memory, which is elsewhere in the next process; or
            the key of a mapping is neither text nor a number.
    """
    try:
        return json.loads(json.dumps(value, default=_instead_of))
    except TypeError as error:  # of a key
        raise ObjectiveError(f"describe: {error}") from error


def _instead_of(value: Any) -> Any:
    """What JSON, which lacks this type, holds in place of a value; raises as :func:`as_json`."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(as_json, value), key=str)
    if hasattr(value, "tolist"):
        return value.tolist()
    text = str(value)
    if " at 0x" in text:
        raise ObjectiveError(f"describe: {text} is another text in every process; describe it by a number or a name")
    return text
