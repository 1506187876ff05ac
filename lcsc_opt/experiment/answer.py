"""The answer: the best model that is known, by measurements that decided nothing before.

The user had models already: the last checkpoint, perhaps an average of the trainer's, EMA*. Searches add their best
trials, and points on the straight way to the best of them: a shorter step is often safer where the data are few. The
answer is the best of what the user had, unless something that was found is better by more than a standard error of the
difference on the same noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lcsc_opt.base.jackknife import GROUPS, standard_error
from lcsc_opt.database.measurement import Measurement, Model
from lcsc_opt.database.metric_rows import SINGLE_GROUP_NOISE

WAY = {"¼": 0.25, "½": 0.5, "¾": 0.75}  # of the way from EMA* to what was found


def choose(had: Sequence[Measurement], found: Sequence[Measurement], *, judge: str | None = None) -> Measurement:
    """The answer.

    Args:
        had: models that need no search, on one group of noise.
        found: what searches add, on the same noise; at least one model if ``had`` is empty.
        judge: a metric in features that are not in the loss, if there is one; lower is better. It counts only where
            all models were measured with it.
    """
    if not all(judge in model.values for model in (*had, *found)):
        judge = None
    if not had:
        return min(found, key=lambda model: model.loss)
    best_had = min(had, key=lambda model: model.loss)
    best_found = max(found, key=lambda model: share_gained(best_had, model, judge), default=None)
    if best_found is None or share_gained(best_had, best_found, judge) <= error_of_share(best_had, best_found, judge):
        return best_had
    return best_found


def share_gained(base: Measurement, model: Measurement, judge: str | None) -> float:
    """How much lower a model's loss and judge are, as the mean of shares of the base's, on the first group of noise."""
    metrics = _compared_metrics(judge)
    return statistics.fmean(_share(base.values[name][0], model.values[name][0]) for name in metrics)


def error_of_share(base: Measurement, model: Measurement, judge: str | None) -> float:
    """The standard error of :func:`share_gained`; where it is not known, 2 % are assumed.

    Jackknife: the values without each group of samples are paired, so that what both owe to the noise cancels.
    """
    metrics = _compared_metrics(judge)
    if not all(name in one.without_groups for name in metrics for one in (base, model)):
        return SINGLE_GROUP_NOISE
    shares = []
    for group in range(GROUPS):
        shares_of_metrics = [
            _share(base.without_groups[name][0][group], model.without_groups[name][0][group]) for name in metrics
        ]
        shares.append(statistics.fmean(shares_of_metrics))
    return standard_error(shares)


def on_the_way(start: Model, end: Model) -> list[Model]:
    """Points between two models; ``[S, K]`` if one of both has rows."""
    difference = end.coefficients - start.coefficients
    return [
        Model(
            f"{part} of the way from {start.name} to {end.name}",
            start.coefficients + share * difference,
            study=end.study,
        )
        for part, share in WAY.items()
    ]


def _compared_metrics(judge: str | None) -> list[str]:
    return ["loss"] if judge is None else ["loss", judge]


def _share(base: float, value: float) -> float:
    """By which share of ``base`` the value is lower; if that is zero, by how much."""
    difference = base - value
    return difference / abs(base) if base else difference
