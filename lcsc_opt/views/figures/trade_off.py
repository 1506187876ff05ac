"""Two held-out metrics of the answers of an experiment, or of all points of its sweep; all that a sweep varied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import plotly.graph_objects as go

from lcsc_opt.base.errors import LcscError
from lcsc_opt.base.sweep import split_point
from lcsc_opt.database.history import StudyHistory
from lcsc_opt.database.names import label, short_metric
from lcsc_opt.views import number
from lcsc_opt.views.figures.look import Theme, figure, inert, style

_FIRST = ("precision", "recall")  # what a lower FID may cost
_LOSSES = ("fid", "loss")


def metrics_of(studies: Iterable[StudyHistory]) -> list[str]:
    """The names of all held-out metrics, precision and recall first, the loss last."""
    known = dict.fromkeys(name for study in studies for name in _values(study))
    return sorted(known, key=lambda name: (_place(name, _FIRST), name == "loss"))


def trade_off_figure(
    studies: Sequence[StudyHistory], x: str | None = None, y: str | None = None, *, theme: Theme = "light"
) -> go.Figure | None:
    """A mark for each answer, on noise that no search saw; those of one optimizer and seed over a sweep are joined.

    Args:
        studies: of an experiment, or of several points of a sweep, in the order of the points.
        x: name of a held-out metric, or ``loss``; without it precision, or the first that is measured.
        y: the same; without it FID, else the loss.
        theme: of the page.

    Returns:
        ``None`` without two metrics to choose from.

    Raises:
        LcscError: no answer has this metric.
    """
    known = metrics_of(studies)
    for name in (x, y):
        if name is not None and name not in known:
            raise LcscError(f"{name}: no answer has this held-out metric; there are {', '.join(known) or 'none'}")
    y = y or min(known, key=lambda name: (name == x, _place(name, _LOSSES)), default=None)
    x = x or next((name for name in known if name != y), None)
    if x is None or y is None:
        return None
    curves: dict[tuple[str, int], list[StudyHistory]] = {}
    for study in studies:
        if {x, y} <= _values(study).keys():
            curves.setdefault((study.optimizer, study.seed), []).append(study)
    made = figure(theme, name=f"trade-off/{studies[0].experiment}/{x}/{y}", height=460)
    for (optimizer, seed), group in curves.items():
        drawn, values = style(optimizer), [_values(study) for study in group]
        made.add_scatter(
            x=[value[x] for value in values],
            y=[value[y] for value in values],
            mode="lines+markers+text" if len(group) > 1 else "markers",
            name=inert(f"{group[0].label}/{seed}"),
            text=[inert(", ".join(split_point(study.experiment)[1].values())) for study in group],
            textposition="top center",
            cliponaxis=False,
            line={"color": drawn.colour, "dash": drawn.dash, "width": 1.5},
            marker={"symbol": drawn.marker, "size": 9, "color": drawn.colour},
            customdata=[inert(f"{study.study}, trial {study.chosen}") for study in group],
            hovertemplate="%{customdata}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
        )
    made.update_xaxes(title_text=f"held-out {inert(short_metric(x))}", tickformat="~g")
    return made.update_yaxes(title_text=f"held-out {inert(short_metric(y))}", tickformat="~g")


def parallel_figure(points: Mapping[str, Sequence[StudyHistory]], theme: Theme = "light") -> go.Figure:
    """Parallel coordinates of a sweep: a line for each answer, through the values of what was varied to its loss.

    Values of a setting are evenly apart; losses are to scale, the lowest at the bottom. A line of Scatter: plotly's
    own Parcoords makes functions of texts, which the pages' policy forbids.

    Args:
        points: experiment → its studies; those without a held-out loss are left out.
        theme: of the page.
    """
    answers = [
        (study, split_point(point)[1], loss)
        for point, studies in points.items()
        for study in studies
        if (loss := study.held_out_loss) is not None
    ]
    made = figure(theme, name=f"parallel/{','.join(points)}", height=360)
    end, losses = "held-out loss", [loss for *_, loss in answers] or [0.0]
    lowest, span = min(losses), max(losses) - min(losses) or 1.0
    ticks = {(end, number(loss)): (loss - lowest) / span for loss in (min(losses), max(losses))}
    for key in dict.fromkeys(key for _, varied, _ in answers for key in varied):
        known = sorted({varied[key] for _, varied, _ in answers if key in varied}, key=_in_order)
        ticks |= {(key, value): i / max(len(known) - 1, 1) for i, value in enumerate(known)}
    drawn = set[str]()
    for study, varied, loss in answers:
        look = style(study.optimizer)
        made.add_scatter(
            x=[*varied, end],
            y=[*(ticks[each] for each in varied.items()), (loss - lowest) / span],
            name=inert(label(study.optimizer)),
            legendgroup=inert(study.optimizer),
            showlegend=study.optimizer not in drawn,
            mode="lines+markers",
            line={"color": look.colour, "dash": look.dash, "width": 1.5},
            marker={"symbol": look.marker, "size": 7},
            hovertemplate=f"{inert(study.study)}<br>{number(loss)}<extra></extra>",
        )
        drawn.add(study.optimizer)
    for (axis, text), height in ticks.items():
        made.add_annotation(x=axis, y=height, text=inert(text), showarrow=False, xanchor="right", xshift=-8)
    made.update_yaxes(visible=False)
    return made.update_xaxes(type="category", showgrid=True, showline=False)


def _in_order(value: str) -> tuple[float, str]:
    """Sorts numbers by their value, before texts."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _values(study: StudyHistory) -> dict[str, float]:
    """Name → value of everything that was measured of the answer on held-out noise."""
    if study.held_out is None or study.held_out.loss is None:
        return {}
    return {"loss": study.held_out.loss, **study.held_out.metrics}


def _place(name: str, order: Sequence[str]) -> int:
    formula = name.partition("@")[0]
    return order.index(formula) if formula in order else len(order)
