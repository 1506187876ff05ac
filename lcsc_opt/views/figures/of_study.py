"""From a study database to the figures of a study, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from optuna.storages import RDBStorage

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.database.comparing import best_ema
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.names import split_name
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.curves import comparison
from lcsc_opt.views.figures.comparison import comparison_figure
from lcsc_opt.views.figures.look import Theme
from lcsc_opt.views.figures.study import (
    coefficients_figure,
    failures_figure,
    movement_figure,
    shape_figure,
    times_figure,
)
from lcsc_opt.views.patterns import movement_of, profile_of, shape_of
from lcsc_opt.views.progress import failures_of, trial_times


def study_figures(storage: RDBStorage, study: str, *, theme: Theme = "light") -> dict[str, go.Figure]:
    """What is saved into optuna-dashboard of a study: ``best_so_far`` and ``coefficients``, both valid HTML ids.

    Raises:
        StudyStoreError: there is no such study.
    """
    reader = HistoryReader(storage)
    studies = reader.read(split_name(study)[0])
    own = next(iter(reader.read_studies([study])), None)  # a landscape is not among them
    if own is None:
        known = ", ".join(history.study for history in studies)
        raise StudyStoreError(f"{study}: no such study; the experiment has: {known}")
    ema = best_ema(studies)
    both = [own] if ema is None or ema.study == study else [own, ema]
    return {
        "best_so_far": comparison_figure(comparison(both), theme=theme),
        "coefficients": _coefficients(reader, own, ema, theme),
    }


def own_figures(
    reader: HistoryReader, study: StudyHistory, studies: Sequence[StudyHistory], *, theme: Theme = "light"
) -> dict[str, go.Figure]:
    """What is drawn of one study alone; ``studies`` are those of its experiment, of which EMA* is one."""
    drawn = {
        "coefficients": _coefficients(reader, study, best_ema(studies), theme),
        "movement": movement_figure(movement_of(reader, study), study=study.study, theme=theme),
        "shape": shape_figure(shape_of(reader, study), study=study.study, theme=theme),
        "times": times_figure(trial_times(study), study=study.study, theme=theme),
    }
    if failures := failures_of(study):
        drawn["failures"] = failures_figure(failures, study=study.study, theme=theme)
    return drawn


def _coefficients(reader: HistoryReader, study: StudyHistory, ema: StudyHistory | None, theme: Theme) -> go.Figure:
    own, against = profile_of(reader, study), None if ema is None else profile_of(reader, ema)
    return coefficients_figure([] if own is None else [own], against, theme=theme)
