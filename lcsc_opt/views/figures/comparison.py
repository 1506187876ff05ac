"""The figure that compares optimizers, drawn with plotly from plain data."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from lcsc_opt.views.curves import AXES, Comparison, Curve
from lcsc_opt.views.figures.look import GREY, Theme, empty_figure, figure, inert, style, with_alpha

NUMBER = "%{y:.4g}"
FEW = 10  # evaluations


def comparison_figure(
    data: Comparison, *, log_x: bool = False, log_y: bool = True, theme: Theme = "light"
) -> go.Figure:
    """Best so far of each optimizer: mean and range over its seeds, EMA* as a line, held-out losses as marks.

    All but the marks are losses on the search's noise.

    Args:
        data: along one axis.
        log_x: of what was spent.
        log_y: of the loss; linear where a loss is not positive.
        theme: of the page.
    """
    if not data.curves:
        return empty_figure(
            f"No result yet in {data.experiment or 'this experiment'}. Start a search: lcsc run STUDY_FILE", theme
        )
    made = figure(theme, name=f"comparison/{data.experiment}/{data.axis}/{log_x}/{log_y}", hovermode="x unified")
    for curve in data.curves:
        if len(curve.seeds) > 1:
            _add_band(made, curve)
    for curve in data.curves:
        _add_line(made, curve)
        _add_held_out(made, curve)
    if data.ema is not None:
        made.add_hline(y=data.ema, line={"color": GREY, "dash": "dash", "width": 1})
        made.add_annotation(
            text="EMA*",
            x=1,
            xref="paper",
            y=math.log10(data.ema) if _log(data, log_y) else data.ema,
            xanchor="right",
            yanchor="bottom",
            showarrow=False,
            font={"color": GREY},
        )
    made.update_xaxes(title_text=AXES[data.axis], type="log" if log_x else "linear", tickformat="~s")
    if data.axis == "evaluations" and not log_x and max(curve.positions[-1] for curve in data.curves) < FEW:
        made.update_xaxes(dtick=1)  # no ticks between whole numbers
    made.update_yaxes(title_text=f"best {inert(data.metric)} so far (marks: held out)")
    made.update_yaxes(type="log" if _log(data, log_y) else "linear", tickformat="~g")
    return made


def _log(data: Comparison, wanted: bool) -> bool:
    lowest = [min([float(curve.lowest.min()), *(value for _, value in curve.held_out)]) for curve in data.curves]
    return wanted and min(lowest) > 0 and (data.ema is None or data.ema > 0)


def _add_band(made: go.Figure, curve: Curve) -> None:
    shared = {
        **{"x": curve.positions, "mode": "lines", "legendgroup": inert(curve.optimizer), "showlegend": False},
        **{"hoverinfo": "skip", "line": {"width": 0, "shape": "hv"}},
    }
    made.add_scatter(y=curve.lowest, **shared)
    made.add_scatter(
        y=curve.highest, fill="tonexty", fillcolor=with_alpha(style(curve.optimizer).colour, 0.18), **shared
    )


def _add_line(made: go.Figure, curve: Curve) -> None:
    drawn = style(curve.optimizer)
    width = 2.5 if curve.finished else 1.2
    made.add_scatter(
        x=curve.positions,
        y=curve.mean,
        mode="lines" if len(curve.positions) > 1 else "lines+markers",  # a line of one point is not seen
        name=inert(curve.label),
        legendgroup=inert(curve.optimizer),
        line={"color": drawn.colour, "dash": drawn.dash, "width": width, "shape": "hv"},
        hovertemplate=NUMBER,
    )


def _add_held_out(made: go.Figure, curve: Curve) -> None:
    if not curve.held_out:
        return
    drawn = style(curve.optimizer)
    ends, values = zip(*curve.held_out, strict=True)
    made.add_scatter(
        x=list(ends),
        y=list(values),
        mode="markers",
        name=f"{inert(curve.label)}, held out",
        legendgroup=inert(curve.optimizer),
        showlegend=False,
        cliponaxis=False,
        marker={"symbol": drawn.marker, "size": 10, "color": drawn.colour, "line": {"width": 1, "color": "#FFFFFF"}},
        hovertemplate=NUMBER,
    )
