"""The figure of a front: FID and recall against precision, drawn with plotly from plain data."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from lcsc_opt.views.figures.look import Theme, figure, inert, style
from lcsc_opt.views.front import Front, FrontCurve, Measured

LEFT, RIGHT = [0.0, 0.46], [0.56, 1.0]  # of the figure's width


def front_figure(front: Front, *, theme: Theme = "light") -> go.Figure:
    """Precision on both x axes; on y FID (lower is better) and recall (higher is better).

    A curve of each optimizer and seed, with the weight at each mark, and one of plain averages, of which only EMA* is
    written out; the study of each mark is shown under the pointer.

    Args:
        front: plain data.
        theme: of the page.
    """
    made = figure(theme, name=f"front/{front.name}", height=460)
    for curve in front.all_curves:
        texts = [_text(front, point) for point in curve.points]
        _add(made, curve, [point.fid for point in curve.points], texts, "")
        _add(made, curve, [point.recall for point in curve.points], texts, "2", legend=False)
    precision, fid, recall = (inert(f"{name}{front.extractor}") for name in ("precision", "FID", "recall"))
    positive = all(point.fid > 0 for point in front.points)
    made.update_layout(
        xaxis={"title": {"text": precision}, "domain": LEFT},
        yaxis={"title": {"text": fid}, "type": "log" if positive else "linear", "tickformat": "~g"},
        xaxis2={"title": {"text": precision}, "domain": RIGHT, "anchor": "y2"},
        yaxis2={"title": {"text": recall}, "anchor": "x2"},
        legend={"orientation": "h", "y": 1.12},
    )
    return made


def _text(front: Front, point: Measured) -> str:
    """Averages lie too close to each other to be written at their marks."""
    if front.ema is not None and point in front.ema.points:
        return "EMA*" if point == front.ema_star else ""
    return inert(point.short)


def _add(
    made: go.Figure, curve: FrontCurve, values: list[float], texts: list[str], axis: str, *, legend: bool = True
) -> None:
    drawn = style(curve.optimizer)
    shared: dict[str, Any] = {"legendgroup": inert(curve.label), "showlegend": legend}
    made.add_scatter(
        x=[point.precision for point in curve.points],
        y=values,
        xaxis=f"x{axis}",
        yaxis=f"y{axis}",
        mode="lines+markers+text",
        name=inert(curve.label),
        text=texts,
        textposition="top center",
        cliponaxis=False,
        line={"color": drawn.colour, "dash": drawn.dash, "width": 1.5},
        marker={"symbol": drawn.marker, "size": 9, "color": drawn.colour},
        customdata=[[_hover(point)] for point in curve.points],
        hovertemplate="%{customdata[0]}<extra></extra>",
        **shared,
    )


def _hover(point: Measured) -> str:
    images = "" if point.images is None else f", {point.images:,} images"
    return "<br>".join(
        [
            f"<b>{inert(point.study)}</b>, trial {point.trial}",
            inert(point.shown),
            f"FID {point.fid:.4g}, precision {point.precision:.3f}, recall {point.recall:.3f}",
            f"{inert(point.noise)} noise{images}",
        ]
    )
