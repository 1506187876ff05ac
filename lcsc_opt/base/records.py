"""The plain records that the optimizer, the objective and the database exchange."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

STANDARD_ERROR = "_stderr"
"""Behind the name of a metric, as lm_eval has it: the standard error of its value."""

PENALTY = 10.0  # times the loss at EMA*, for a value that is twice the bound

Coefficients = npt.NDArray[np.float64]
"""``[K]`` float64, any sign, sum to one; or ``[S, K]``, a row for each layer group, each sums to one."""


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


@dataclasses.dataclass(frozen=True)
class Constraint:
    """The bound of the kept metric, and what is measured at EMA* on the noise of the search.

    Attributes:
        loss: EMA*'s loss.
        value: the bound: EMA*'s value of the kept metric, or the one of the settings.
        deviation: the standard deviation of the kept metric between images.
        guide: EMA*'s value of the metric whose gradient is followed.
        sign: −1 if higher values of the kept metric are better, else 1.
    """

    loss: float
    value: float
    deviation: float
    guide: float
    sign: float = 1.0

    @property
    def scale(self) -> float:
        """The loss at EMA* divided by the guide there: the factor between their units."""
        return abs(self.loss) / (self.guide or 1.0)

    def violation(self, value: float, images: int) -> float:
        """By how many standard errors, for this many images, ``value`` is worse than the bound."""
        excess = self.sign * (value - self.value)
        standard_error = self.deviation / math.sqrt(images)
        if standard_error > 0:
            return excess / standard_error
        return float(excess > 0)

    def penalty(self, value: float) -> float:
        """What is added to the loss."""
        return PENALTY * abs(self.loss) / (self.value or 1.0) * max(0.0, self.sign * (value - self.value))


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
        keep_weight: the weight of the kept metric's guide in a gradient; ``None`` uses the penalty of the loss.
        constraint: the bound of the kept metric; ``None`` evaluates without a penalty, also where a metric is kept.
        rehearsal: whether nobody compares the loss: one batch of images is enough.
        unbiased: whether the loss and its gradient are corrected for the bias of few images, as steps need it. Such a
            loss is comparable with no other.
        sampler: which of the objective's samplers makes the images; searches use the first.
    """

    coefficients: Coefficients
    images: int | None = None
    noise: Noise = SEARCH
    keep_weight: float | None = None
    constraint: Constraint | None = None
    rehearsal: bool = False
    unbiased: bool = False
    sampler: int = 0


@dataclasses.dataclass(frozen=True)
class SamplerTitle:
    """How images are sampled.

    Attributes:
        text: for people, as ``DDIMScheduler, 10 model calls an image``.
        sha256: of all settings that change the images.
    """

    text: str
    sha256: str


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
        """The cost of parts that ran at the same time: all their images, and the seconds of the slowest."""
        combined = {}
        for field in dataclasses.fields(cls):
            values = [getattr(part, field.name) for part in parts]
            is_count = field.name in ("images", "model_calls")
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
        unseen: the loss with its FID to held-out real images; ``None`` if it has none, or none are held out.
        constraint: the bound of the kept metric if this candidate is EMA*; ``None`` if no metric is kept, and of a
            candidate that has a constraint already.
        without_groups: on held-out noise, ``loss`` or a metric → its values without one of ten groups of images each
            (:mod:`lcsc_opt.base.jackknife`), for the intervals of a report; empty if they are not known.
    """

    loss: float
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cost: Cost = Cost()
    gradient: Coefficients | None = dataclasses.field(default=None, compare=False)
    violation: float | None = None
    unseen: float | None = None
    constraint: Constraint | None = None
    without_groups: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class NodeWork:
    """The workers of one machine.

    Attributes:
        name: the name of the machine; empty where workers died before it was known.
        alive: how many of them answer.
        deaths: how many died since this process started or continued the search.
    """

    name: str
    alive: int
    deaths: int
