"""Histories made by hand, without a database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcsc_opt.database.history import TRIAL, Standing, Trials
from lcsc_opt.database.report import HeldOutReport, Measurement, Model
from lcsc_opt.database.summary import Summary

RUNNING, COMPLETE, FAIL = 0, 1, 3


def measured(
    loss: float,
    *,
    name: str = "trial 0",
    trial: int | None = None,
    images: int = 0,
    seeds: Sequence[int] = (0,),
    **metrics: float,
) -> Measurement:
    """A measurement with the same values on each group of noise."""
    values = {metric: (value,) * len(seeds) for metric, value in {**metrics, "loss": loss}.items()}
    return Measurement(Model(name, np.array([1.0]), trial=trial), images, tuple(seeds), values)


def reported(loss: float, *, trial: int | None = None) -> HeldOutReport:
    """A report of a loss alone."""
    return HeldOutReport(measured(loss, trial=trial))


def trial_array(
    losses: Sequence[float | None],
    *,
    images: float = 10.0,
    seconds: float = 1.0,
    gap: float = 0.5,
    running: int = 0,
    columns: Mapping[str, Any] | None = None,
) -> Trials:
    """A trial for each loss, one after the other with a gap between them; ``None`` stands for one that failed."""
    trials = np.zeros(len(losses) + running, dtype=TRIAL)
    trials["number"] = np.arange(len(trials))
    trials["loss"] = np.nan
    trials["started"] = 1000 + np.arange(len(trials)) * (seconds + gap)
    trials["ended"] = np.nan
    done = slice(0, len(losses))
    trials["loss"][done] = [np.nan if loss is None else loss for loss in losses]
    trials["state"][done] = [FAIL if loss is None else COMPLETE for loss in losses]
    trials["ended"][done] = trials["started"][done] + seconds
    trials["seconds"][done], trials["images"][done], trials["model_calls"][done] = seconds, images, 2 * images
    for name, value in (columns or {}).items():
        trials[name] = value
    return trials


def standing(trials: Trials, *, optimizer: str = "LCSC", seed: int = 0, **changes: Any) -> Standing:
    """A study of these trials."""
    return Standing(
        **{
            **{"study_id": seed, "study": f"digits/{optimizer}/{seed}", "experiment": "digits", "optimizer": optimizer},
            **{"seed": seed, "summary": Summary.of(trials), "ended": True, "metric": "FID", "steps": (100, 200, 300)},
            **{"budget": {"evaluations": np.isfinite(trials["ended"]).sum()}, **changes},
        }
    )


def history(
    losses: Sequence[float | None],
    *,
    held_out: float | None = None,
    images: float = 10.0,
    seconds: float = 1.0,
    gap: float = 0.5,
    running: int = 0,
    columns: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Standing:
    """A study of a :func:`trial_array`."""
    trials = trial_array(losses, images=images, seconds=seconds, gap=gap, running=running, columns=columns)
    return standing(trials, **{"held_out": None if held_out is None else reported(held_out), **changes})
