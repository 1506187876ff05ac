"""The rows of arrays that stand for trials, without coefficients, and the summary of them."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lcsc_opt.base.records import metric_of_loss
from lcsc_opt.database.history import COSTS, TRIAL, Trials
from lcsc_opt.database.names import short_metric
from lcsc_opt.database.states import SUCCEEDED
from lcsc_opt.database.summary import Summary

_ABBREVIATIONS = ("fid", "kid")


def summary_of(trials: Sequence[FrozenTrial]) -> Summary:
    """The summary of trials by number, whose values are losses."""
    summary = Summary.of(trial_rows(trials))
    for trial in trials:
        if trial.number == summary.best:
            metric = name_of_loss(trial.user_attrs.get("metrics") or {}, summary.loss)
            return dataclasses.replace(summary, metric=metric)
    return summary


def trial_rows(trials: Sequence[FrozenTrial]) -> Trials:
    """``[n]`` of :data:`TRIAL`, from trials whose values are losses."""
    rows = np.zeros(len(trials), dtype=TRIAL)
    for row, trial in zip(rows, trials, strict=True):
        attributes = trial.user_attrs
        row["number"] = trial.number
        row["state"] = trial.state.value
        row["retried"] = trial.state in SUCCEEDED and bool(attributes.get("attempts"))
        row["started"] = _seconds(trial.datetime_start)
        row["ended"] = _seconds(trial.datetime_complete)
        row["loss"] = np.nan
        if trial.state in SUCCEEDED and trial.value is not None:
            row["loss"] = trial.value
        if trial.state == TrialState.FAIL:
            row["asked"] = attributes.get("images") or 0
        cost = attributes.get("cost", {})
        for name in COSTS:
            row[name] = cost.get(name, 0.0)
    return rows


def _seconds(moment: datetime.datetime | None) -> float:
    if moment is None:
        return np.nan
    return moment.timestamp()


def name_of_loss(metrics: Mapping[str, float], loss: float | None) -> str:
    """``FID`` for the metric ``fid``; ``loss`` if the loss is no metric, one times −1, or a metric of that name."""
    if loss is None:
        return "loss"
    name = metric_of_loss(metrics, loss)
    # a function's metric "loss" has the function's name before it
    if name is None or metrics[name] != loss or name.endswith(".loss"):
        return "loss"
    formula, at, extractor = short_metric(name).partition("@")
    if formula in _ABBREVIATIONS:
        formula = formula.upper()
    return f"{formula}{at}{extractor}"
