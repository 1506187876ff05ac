"""The answer: the best model that is known, by measurements that decided nothing before.

The user had models already: the last checkpoint, perhaps an average of the trainer's, EMA*. A search adds its best
trials, and points on the straight way to the best of them: a shorter step is often safer where the data are few. The
answer is the best of what the user had, unless something that was found is better by more than a standard error of the
difference on the same noise.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import TypeVar

from lcsc_opt.base.jackknife import GROUPS, standard_error
from lcsc_opt.base.records import Coefficients
from lcsc_opt.database.report import SINGLE_GROUP_NOISE, Measurement

WAY = {"¼": 0.25, "½": 0.5, "¾": 0.75}  # of the way from EMA* to what was found

Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True)
class Gain:
    """How much better one model is than another on the same noise, as a share of the other's values.

    Attributes:
        share: the mean over the loss and its judge.
        error: the standard error of the share; ``None`` if it is not known.
    """

    share: float
    error: float | None

    @classmethod
    def over(cls, base: Measurement, model: Measurement, judge: str | None) -> Gain:
        """The gain of ``model`` over ``base`` in the loss and in ``judge``, a metric that is lower where it is better.

        Jackknife: the values without each group of samples are paired, so that what both owe to the noise cancels.
        """
        metrics = [metric for metric in ("loss", judge) if metric in ("loss", *base.metrics) and metric is not None]
        share = statistics.fmean(_share(base.value(metric), model.value(metric)) for metric in metrics)
        if not all(metric in one.without_groups for metric in metrics for one in (base, model)):
            return cls(share, None)
        shares = []
        for group in range(GROUPS):
            of_others = (
                _share(base.without_groups[metric][group], model.without_groups[metric][group]) for metric in metrics
            )
            shares.append(statistics.fmean(of_others))
        return cls(share, standard_error(shares))

    @property
    def is_more_than_chance(self) -> bool:
        """Whether it is above its standard error; if that is not known, above 2 %."""
        return self.share > (SINGLE_GROUP_NOISE if self.error is None else self.error)


def choose(
    had: Mapping[Model, Measurement], found: Mapping[Model, Measurement], *, judge: str | None = None
) -> tuple[Model, Model | None]:
    """The answer, and the best of what the user had; ``None`` for the latter if nothing of that could be measured.

    Args:
        had: models that need no search.
        found: what the search adds; at least one model if ``had`` is empty.
        judge: a metric in features that are not in the loss, if there is one.
    """
    if not had:
        return min(found, key=lambda model: found[model].loss), None
    best_had = min(had, key=lambda model: had[model].loss)
    gains = {model: Gain.over(had[best_had], measurement, judge) for model, measurement in found.items()}
    best_found = max(gains, key=lambda model: gains[model].share, default=None)
    if best_found is None or not gains[best_found].is_more_than_chance:
        return best_had, best_had
    return best_found, best_had


def on_the_way(start: Coefficients, end: Coefficients) -> dict[str, Coefficients]:
    """What part of the way → the coefficients there, ``[K]``, or ``[S, K]`` if one of both has rows."""
    return {part: start + share * (end - start) for part, share in WAY.items()}


def _share(base: float | None, value: float | None) -> float:
    assert base is not None
    assert value is not None
    difference = base - value
    return difference / abs(base) if base else difference
