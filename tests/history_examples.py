"""Histories made by hand, without a database."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial

from lcsc_opt.base.study_spec import EMA_GRID
from lcsc_opt.database.history import Standing
from lcsc_opt.database.measurement import Measurement, Model
from lcsc_opt.database.names import EMA, split_name
from lcsc_opt.database.report import Part, Report
from lcsc_opt.database.summary import Summary
from lcsc_opt.experiment.finalists import name_of_search


def measured(
    loss: float,
    *,
    name: str = "trial 0",
    trial: int | None = None,
    images: int = 0,
    seeds: Sequence[int] = (0,),
    **metrics: Any,
) -> Measurement:
    """A measurement with the same values on each group of noise."""
    values = {metric: (value,) * len(seeds) for metric, value in {**metrics, "loss": loss}.items()}
    return Measurement(Model(name, np.array([1.0, loss, -loss]), trial=trial), images, tuple(seeds), values)


def report_of(
    found: Mapping[str, Measurement],
    *had: Measurement,
    answer: str | None = None,
    sampler: str | None = None,
    **more: Any,
) -> Report:
    """A report of the best models of searches, study → what was measured, which get the names that reports give them.

    The best of all grids is EMA*, which the user had, as ``had``. The answer is the best of all, unless it is named.
    """
    grids = [study for study in found if split_name(study)[1] == EMA_GRID]
    best_grid = min(grids, key=lambda study: found[study].loss, default=None)
    named = {study: _as_found(study, found[study], is_ema=study == best_grid) for study in found}
    averages = [measurement for measurement in named.values() if measurement.model.name == EMA]
    of_user = {measurement.model.name: measurement for measurement in (*had, *averages)}
    models = of_user | {measurement.model.name: measurement for measurement in named.values()}
    best = min(models.values(), key=lambda measurement: measurement.loss)
    return Report(
        **{
            "parts": (Part(sampler, tuple(models.values())),),
            "answer": answer or best.model.name,
            "had": tuple(of_user),
            "found": {study: measurement.model.name for study, measurement in named.items()},
            "evaluations": dict.fromkeys(named, 1),
            "top": 20,
            **more,
        }
    )


def _as_found(study: str, measurement: Measurement, *, is_ema: bool) -> Measurement:
    trial = measurement.model.trial or 0
    name = EMA if is_ema else f"{name_of_search(study)}, trial {trial}"
    model = dataclasses.replace(measurement.model, name=name, study=study, trial=trial)
    return dataclasses.replace(measurement, model=model)


def reported(
    loss: float, *, trial: int | None = None, study: str = "digits/LCSC/0", searched: float | None = None
) -> Report:
    """A report of one search and its loss alone; ``searched`` is what the search measured of the same model."""
    found = measured(loss, trial=trial)
    model = dataclasses.replace(found.model, searched=searched)
    return report_of({study: dataclasses.replace(found, model=model)})


def in_one_report(studies: Sequence[Standing], *had: Measurement, **more: Any) -> list[Standing]:
    """Studies whose own reports are joined to that of their experiment."""
    found = {study.study: study.found for study in studies if study.found is not None}
    report = report_of(found, *had, **more)
    return [dataclasses.replace(study, report=report) for study in studies]


START = datetime.datetime(2026, 1, 1)


def trials_of(
    losses: Sequence[float | None],
    *,
    images: int = 10,
    seconds: float = 1.0,
    gap: float = 0.5,
    running: int = 0,
    cost: Mapping[str, float] | None = None,
    **attributes: Any,
) -> list[FrozenTrial]:
    """A trial for each loss, one after the other with a gap between them; ``None`` stands for one that failed."""
    trials = []
    for number, loss in enumerate([*losses, *[None] * running]):
        begin = START + datetime.timedelta(seconds=number * (seconds + gap))
        is_running = number >= len(losses)
        trial = create_trial(
            state=TrialState.RUNNING if is_running else TrialState.FAIL if loss is None else TrialState.COMPLETE,
            value=loss,
            user_attrs=dict(attributes),
        )
        trial.number, trial.datetime_start = number, begin
        trial.datetime_complete = None if is_running else begin + datetime.timedelta(seconds=seconds)
        if not is_running:
            spent = {"images": images, "model_calls": 2 * images, "seconds": seconds}
            trial.user_attrs["cost"] = {**spent, **(cost or {})}
        trials.append(trial)
    return trials


def standing(trials: Sequence[FrozenTrial], *, optimizer: str = "LCSC", seed: int = 0, **changes: Any) -> Standing:
    """A study of these trials, whose loss is called FID."""
    summary = dataclasses.replace(Summary.of(trials), metric="fid")
    ended = sum(trial.state.is_finished() for trial in trials)
    return Standing(
        **{
            **{"study_id": seed, "study": f"digits/{optimizer}/{seed}", "experiment": "digits", "optimizer": optimizer},
            **{"seed": seed, "summary": summary, "ended": True, "steps": (100, 200, 300)},
            **{"budget": {"evaluations": ended}, **changes},
        }
    )


def history(
    losses: Sequence[float | None],
    *,
    optimizer: str = "LCSC",
    seed: int = 0,
    held_out: float | None = None,
    images: int = 10,
    seconds: float = 1.0,
    gap: float = 0.5,
    running: int = 0,
    cost: Mapping[str, float] | None = None,
    **changes: Any,
) -> Standing:
    """A study of :func:`trials_of`, with a report of its own."""
    trials = trials_of(losses, images=images, seconds=seconds, gap=gap, running=running, cost=cost)
    report = None
    if held_out is not None:
        best = min((loss for loss in losses if loss is not None), default=None)
        report = reported(held_out, study=f"digits/{optimizer}/{seed}", searched=best)
    return standing(trials, optimizer=optimizer, seed=seed, **{"report": report, **changes})
