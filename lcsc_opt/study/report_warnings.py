"""What a held-out report warns of: other metrics, the trainer's models, another sampler, images of the search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial

from lcsc_opt.base.records import SamplerTitle, Yardstick
from lcsc_opt.database.report import SINGLE_GROUP_NOISE, MetricRow, doubted_rows
from lcsc_opt.database.states import compared_trials

Rows = Sequence[MetricRow]
"""One model against another: the loss, or the score that is maximized, then other metrics."""

_SEARCH_AGAIN = {  # whether the search's own loss fell below EMA*'s → what may help
    True: (
        ", or search again with more data or fewer evaluations: the searched loss was below EMA*'s, "
        "so the search overfitted"
    ),
    False: ", or search again with more evaluations: the searched loss did not get below EMA*'s",
    None: "",
}
_COMPARE_IMAGES = "compare images of the two models before you use the answer"
_SINGLE_IMAGE_METRICS = ("precision", "near", "hinge")  # the metrics that keep: precision guards
_LEAST_TREND = 10  # trials
_TREND_LEVEL = 0.05


def warning_of(
    rows: Rows,
    against_trained: Sequence[Rows] = (),
    *,
    yardstick: Yardstick | None = None,
    searched_below_ema: bool | None = None,
) -> str | None:
    """One line: the first of these that holds; ``None`` if none does.

    1. The metric that is kept is beyond its bound.
    2. The loss is worse than that of a model of the trainer's.
    3. The loss gained against the baseline, and other metrics did not.
    4. A judge of the loss is worse than at a model of the trainer's; or the loss is, perhaps by chance.

    Args:
        rows: of the report.
        against_trained: the same model against each of the trainer's: the last checkpoint, and its EMA.
        yardstick: what the losses are relative to, on the noise of the report.
        searched_below_ema: whether the search's own loss fell below EMA*'s; ``None`` if EMA* was not searched.
    """
    kept_metric = None if yardstick is None else yardstick.kept
    for row in rows:
        if yardstick is not None and row.metric == kept_metric and row.misses(yardstick.bound):
            return _broken_bound(row, yardstick.bound)
    worse = [_worse_than(rows, trained, searched_below_ema) for trained in against_trained]
    lost = [warning for warning, trained in zip(worse, against_trained, strict=True) if trained[0].lost]
    doubt = _doubt(rows, is_kept=kept_metric is not None)
    return next((warning for warning in (*lost, doubt, *worse) if warning is not None), None)


def _broken_bound(row: MetricRow, bound: float) -> str:
    """The warning that ``keep`` did not hold a metric at its bound."""
    return (
        f"keep: {row.metric} is {row.value:.4g}, beyond its bound of {bound:.4g} by more than the error; "
        "continue the search, or search with more images per evaluation"
    )


def _worse_than(rows: Rows, trained: Rows, searched_below_ema: bool | None) -> str | None:
    """The warning that the search lost to a model of the trainer's, or may have, whatever it gained against EMA*.

    Below EMA* in its own loss and worse held out, it has overfitted its data; not below, it was too short. ``None`` if
    neither the loss nor a judge is worse for certain, and the loss by at most 2 %.

    Args:
        rows: the found model against EMA*.
        trained: the same model against the trainer's.
        searched_below_ema: as of :func:`warning_of`.
    """
    loss = trained[0]
    worse = [row for row in trained if row.lost and (row is loss or row.is_judge)]
    chance = ""
    if not worse:
        if loss.gain is None or loss.gain >= -SINGLE_GROUP_NOISE * abs(loss.baseline or 0.0):
            return None
        worse = [loss]
        chance = ", which may be chance"
    gain = rows[0].gain
    gained = f"better than {rows[0].against}, but " if gain is not None and gain > 0 else ""
    advice = _SEARCH_AGAIN[searched_below_ema]
    return f"{gained}worse than the {loss.against}: {_changes(worse)}{chance}; use the {loss.against}{advice}"


def _doubt(rows: Rows, *, is_kept: bool) -> str | None:
    """The warning that the loss gained alone; ``None`` if it did not."""
    doubted = doubted_rows(rows)
    if not doubted:
        return None
    loss = rows[0]
    advice = _advice(loss, doubted, is_kept=is_kept)
    return f"compared with {loss.against}: {loss.change}, but {_changes(doubted)}: {advice}"


def _advice(loss: MetricRow, doubted: Rows, *, is_kept: bool) -> str:
    """What the gain may be, and what to do before the answer is used; ``is_kept``: ``keep`` guards a metric already."""
    if not loss.is_certain:
        return "neither gain is certain; run lcsc evaluate with more --groups, or continue the search"
    worse = [row for row in doubted if row.gain is not None and row.gain <= 0]
    if not worse:
        return f"run lcsc evaluate with more --groups, and {_COMPARE_IMAGES}"
    if worse[0].cross_check:
        return f"the gain may exist only in the loss's own features; {_COMPARE_IMAGES}"
    advice = f"the loss gained at the cost of other metrics; {_COMPARE_IMAGES}"
    could_be_kept = any(row.metric.partition("@")[0] in _SINGLE_IMAGE_METRICS for row in worse)
    if could_be_kept and not is_kept:
        advice += ", or search with keep: precision"
    return advice


def turned(rows: Rows, elsewhere: Rows, samplers: Sequence[SamplerTitle]) -> str | None:
    """The warning that the loss or a judge of it gained, and is worse in another sampler; ``None`` if none is.

    Args:
        rows: one model against another.
        elsewhere: both in the other sampler; empty if one was not measured there.
        samplers: that of the rows, and the other.
    """
    gained = {}
    for row in rows:
        if (row is rows[0] or row.is_judge) and row.gain is not None and row.gain > 0:
            gained[row.metric] = row
    lost = [row for row in elsewhere if row.lost and row.metric in gained]
    if not lost:
        return None
    here = _changes([gained[row.metric] for row in lost])
    return (
        f"compared with {rows[0].against}, the answer is worse in another sampler: {here} with {samplers[0].text}, "
        f"but {_changes(lost)} with {samplers[1].text}; use the answer only with the sampler that it was searched with"
    )


def _changes(rows: Rows) -> str:
    return " and ".join(row.change for row in rows)


def overfitting(trials: Sequence[FrozenTrial]) -> str | None:
    """A warning if, in the later half of the search, the loss fell and that to held-out real images rose.

    Both are trends of Kendall's rank correlation with time (Mann 1945) at a level of 5 %.
    """
    from scipy.stats import kendalltau  # takes a second

    # the loss, and the loss with its FID to the held-out real images
    pairs = [(trial.value, trial.user_attrs.get("unseen")) for trial in compared_trials(trials)]
    complete_pairs = [pair for pair in pairs if pair[1] is not None]
    recent = np.array(complete_pairs[len(complete_pairs) // 2 :])
    if len(recent) < _LEAST_TREND:
        return None
    loss_trend, unseen_trend = (kendalltau(np.arange(len(recent)), column) for column in recent.T)
    is_certain = max(loss_trend.pvalue, unseen_trend.pvalue) < _TREND_LEVEL
    if not is_certain or not loss_trend.statistic < 0 < unseen_trend.statistic:
        return None
    rise = f"{recent[:, 1].min():.4g} → {recent[:, 1].max():.4g}"
    return (
        "the loss fell, but the distance to held-out real images rose in the later half of the search "
        f"({rise}): the search is overfitting the reference images. Use more of them, one row of coefficients, or "
        "a smaller budget"
    )
