"""The answer: the best model that is known, by measurements that decided nothing before.

The user had models already: the last checkpoint, perhaps an average of the trainer's, EMA*. Searches add their best
trials, means of the iterates of those that follow a path, and points on the straight way to the best of them: a shorter
step is often safer where the data are few.

Three rules decide. Along a search's path, the latest model is taken that is behind the best by no more than one
standard error: its steps fall to zero, so the later a model, the less of their noise is in it.
The answer is the best of what the user had, unless something found is *certainly* better. What is certainly worse to a
judge is no answer: in features that are not in the loss, or in the network of an ``fdr``, which can fall by its pixels
and tones alone. All go by the paired error of a difference, over the images of both models and over the real images
that both are compared with. Of a loss that is one number, the error is how far the difference scatters: between its
repetitions, and between the data of the search and those of the choice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lcsc_opt.base.jackknife import GROUPS, half_width, standard_error
from lcsc_opt.database.measurement import UNSEEN, Measurement, Model

WAY = {"¼": 0.25, "½": 0.5, "¾": 0.75}  # of the way from EMA* to what was found
CERTAIN = 2.0  # standard errors
OPTIMISM = 1.0  # standard errors of the real images that a search has seen (benchmarks/mature.py)

LOSS = "loss"

_Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Gain:
    """How much better one model is than another.

    Attributes:
        value: the share by which it is lower.
        error: the standard error of that.
    """

    value: float
    error: float

    @property
    def exceeds_error(self) -> bool:
        """Whether it is more than one standard error."""
        return self.value > self.error

    @property
    def is_certain(self) -> bool:
        """Whether it is more than chance."""
        return self.value > CERTAIN * self.error


def choose(had: Sequence[Measurement], found: Sequence[Measurement]) -> Measurement:
    """The answer, by the second rule of this module.

    Args:
        had: models that need no search, on the noise of the choice.
        found: the best of each search, on the same noise; at least one model if ``had`` is empty.
    """
    if not had:
        return lowest(found)
    best_had = lowest(had)
    if not found:
        return best_had
    best_found = lowest(found)
    if gain(best_had, best_found).is_certain:
        return best_found
    return best_had


def best_of(models: Sequence[Measurement], path: Sequence[Measurement]) -> Measurement:
    """The best model of a search, by the first rule of this module.

    Args:
        models: at least one.
        path: those of them that stand on the path of the search, in the order of time.
    """
    best = lowest(models)  # which may stand off the path
    if not path:
        return best
    end = lowest(path)
    latest = next(model for model in reversed(path) if not gain(model, end).exceeds_error)
    if gain(latest, best).exceeds_error:
        return best
    return latest


def lowest(models: Sequence[Measurement]) -> Measurement:
    """The model that gains most over the first; unlike the loss, a gain also counts real images that no search sees."""
    return max(models, key=lambda model: gain(models[0], model).value)


def is_vetoed(model: Measurement, had: Sequence[Measurement], judges: Sequence[str]) -> bool:
    """Whether a model is certainly worse than the best that the user had, by the third rule of this module.

    Args:
        model: what was found.
        had: models that need no search.
        judges: metrics; lower is better. Those that were not measured of both say nothing.
    """
    if not had:
        return False
    best_had = lowest(had)
    known = [judge for judge in judges if judge in model.values and judge in best_had.values]
    return any(gain(model, best_had, judge).is_certain for judge in known)


def gain(base: Measurement, model: Measurement, metric: str = LOSS) -> Gain:
    """How much better a model is than ``base``, on the same noise, as a share of the base's value.

    A distance is measured to the real images that the search sees, and to others, where some are held out. The first
    are many, and the search has fitted them, so what is gained there is partly optimism; the others are few, and
    uncertain. Both are weighed by their errors.

    Where images or outcomes tell no error, :func:`_scatter` does.
    """
    unit = abs(base.value(metric) or 0.0) or 1.0  # of zero there are no shares
    seen = _Difference.of(base, model, metric, unit)
    if seen.without is None:
        return Gain(seen.value, _scatter(base, model, metric) / unit)
    # what a search gains by fitting the real images that it sees counts as one more error of theirs
    variance = (1 + OPTIMISM**2) * seen.variance_of_real
    unseen = _Difference.of(base, model, _unseen(metric), unit)
    if unseen.without is None:
        return Gain(seen.value, math.sqrt(_variance(seen.without[:GROUPS]) + variance))
    total = variance + unseen.variance_of_real
    share = variance / total if total > 0 else 0.5  # of the images that no search sees
    value = (1 - share) * seen.value + share * unseen.value
    of_real = (1 - share) ** 2 * variance + share**2 * unseen.variance_of_real
    # both distances are of the same samples, so their errors are not independent
    of_samples = _variance((1 - share) * seen.without[:GROUPS] + share * unseen.without[:GROUPS])
    return Gain(value, math.sqrt(of_samples + of_real))


def _scatter(base: Measurement, model: Measurement, metric: str) -> float:
    """The error of a difference of two numbers, in the metric's unit, so that :data:`CERTAIN` times it is 95 %.

    It never depends on where the metric is zero. Repetitions on other seeds scatter, and Student's interval of their
    mean is taken. They may all be of the same data, and the search has had others: where the search's difference is
    farther from theirs than they are from one another, the data decide, of which there are two sets. A score that gives
    the same number on all of them is a function of the weights alone, and has no error.

    Infinite if there is neither a repetition nor a value of the search.
    """
    differences = np.subtract(base.values.get(metric, (0.0,)), model.values.get(metric, (0.0,)))  # [R]
    repetitions = len(differences)
    deviation = 0.0
    if repetitions > 1:
        deviation = float(differences.std(ddof=1))
    of_mean = _half_width(deviation / math.sqrt(repetitions), repetitions - 1)
    searched = (base.model.searched, model.model.searched)
    if metric != LOSS or searched[0] is None or searched[1] is None:
        return of_mean / CERTAIN if repetitions > 1 else math.inf
    apart = abs(float(differences.mean()) - (searched[0] - searched[1]))
    if apart <= _half_width(deviation * math.sqrt(1 + 1 / repetitions), repetitions - 1):
        return of_mean / CERTAIN
    return _half_width(apart / math.sqrt(2), 1) / CERTAIN


def _half_width(error: float, degrees: int) -> float:
    """As :func:`~lcsc_opt.base.jackknife.half_width`; without an error there are no degrees of freedom to know."""
    if error == 0:
        return 0.0
    return half_width(error, degrees)


def _unseen(metric: str) -> str:
    """The same distance to real images that no search sees: ``fid@inception`` → ``fid_held_out@inception``."""
    if metric == LOSS:
        return UNSEEN
    formula, at, extractor = metric.partition("@")
    return f"{formula}_held_out{at}{extractor}"


@dataclasses.dataclass(frozen=True)
class _Difference:
    """By how much lower a metric is.

    Attributes:
        value: with all images.
        without: ``[2 G]``, without each group of samples, then of real images; ``[G]`` for scores, which compare with
            none; ``None`` if that is not known.
    """

    value: float
    without: _Floats | None

    @classmethod
    def of(cls, base: Measurement, model: Measurement, name: str, unit: float) -> _Difference:
        """In this unit; of means over groups of noise."""
        value = ((base.value(name) or 0.0) - (model.value(name) or 0.0)) / unit
        if name not in base.without_groups or name not in model.without_groups:
            return cls(value, None)
        columns = np.mean(base.without_groups[name], axis=0) - np.mean(model.without_groups[name], axis=0)
        return cls(value, columns / unit)

    @property
    def variance_of_real(self) -> float:
        """Over the real images; zero for scores."""
        if self.without is None or len(self.without) == GROUPS:
            return 0.0
        return _variance(self.without[GROUPS:])


def _variance(without: _Floats) -> float:
    """Of a statistic, from its values ``[G]`` without one group each."""
    return standard_error(without.tolist()) ** 2


def on_the_way(start: Model, end: Model, way: Mapping[str, float] = WAY) -> list[Model]:
    """Points between two models, found by the study of ``end``; ``[S, K]`` if one of both has rows."""
    difference = end.coefficients - start.coefficients
    return [
        Model(
            f"{part} of the way from {start.name} to {end.name}",
            start.coefficients + share * difference,
            study=end.study,
        )
        for part, share in way.items()
    ]
