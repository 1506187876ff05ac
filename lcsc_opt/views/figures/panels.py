"""Figures as lists of panels, one below the other. Every figure is laid out and drawn here, in one loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.basedatatypes import BaseTraceType
from plotly.subplots import make_subplots

from lcsc_opt.views.figures.theme import Theme, figure_layout

_FRAME = 180  # pixels around the panels: titles, labels of axes, a legend
_GAP = 25  # pixels between two panels, without a title
_TITLE_LINE = 17
_TOP = 40  # pixels above the first panel: room for two lines of its title
_LONGEST_COLORBAR = 240  # pixels, of one among several panels
_LOGARITHMIC_TICKS = 3


def axis_layout(
    title: str = "", *, logarithmic: bool = False, tick_format: str | None = None, **options: Any
) -> dict[str, Any]:
    """An axis of a panel, as plotly describes it.

    Args:
        title: below or next to the axis.
        logarithmic: whether it shows logarithms; all values are then above zero.
        tick_format: the format of the labels, in d3's notation.
        options: whatever else plotly knows of an axis.
    """
    layout: dict[str, Any] = {"title": {"text": title}, "type": "linear", **options}
    if tick_format is not None:
        layout["tickformat"] = tick_format
    if logarithmic:
        # Where there is room for four ticks in a decade, plotly labels all of 1 to 9, and the labels 0.08, 0.09 and 0.1
        # overlap. Asked for this few, it labels 1, 2 and 5, and within a decade some linear ticks.
        layout["type"] = "log"
        layout["nticks"] = _LOGARITHMIC_TICKS
        layout["minor"] = {"ticks": "outside", "ticklen": 3}
    return layout


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """What is drawn above one vertical axis.

    Attributes:
        traces: traces of plotly, drawn in this order.
        y: the vertical axis.
        title: above the panel.
        height: pixels.
    """

    traces: Sequence[BaseTraceType]
    y: Mapping[str, Any] = dataclasses.field(default_factory=axis_layout)
    title: str = ""
    height: int = 240


def draw(panels: Sequence[Panel], *, x: Mapping[str, Any], theme: Theme, view: str, **layout: Any) -> go.Figure:
    """The figure of at least one panel.

    Args:
        panels: from top to bottom.
        x: the horizontal axis, which they share; its title is below the last one.
        theme: light or dark.
        view: while it stays the same, a refresh keeps what a reader zoomed or switched off.
        layout: whatever else plotly knows of a layout.
    """
    heights = [panel.height for panel in panels]
    top = max(_TOP, _TITLE_LINE * _lines(panels[0]) + 6)
    height = _FRAME + top - _TOP + sum(heights)  # the frame has room for the usual top
    gap = _GAP + _TITLE_LINE * max((_lines(panel) for panel in panels[1:]), default=0)
    drawn = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        row_heights=heights,
        subplot_titles=[panel.title for panel in panels],
        vertical_spacing=gap / height,
    )
    drawn.update_annotations(font_size=13, x=0, xanchor="left", align="left")  # the panels' titles
    drawn.update_xaxes({**x, "title": {"text": ""}})
    drawn.update_xaxes(title=x["title"], row=len(panels), col=1)
    for row, panel in enumerate(panels, start=1):
        suffix = "" if row == 1 else str(row)  # in plotly's names of axes: x, x2, x3
        drawn.update_yaxes(panel.y, row=row, col=1)
        for trace in panel.traces:
            drawn.add_trace(trace, row=row, col=1)
            if len(panels) > 1 and isinstance(trace, go.Heatmap):  # its colorbar belongs beside its panel
                length = min(panel.height, _LONGEST_COLORBAR)
                upper_edge = drawn.layout[f"yaxis{suffix}"].domain[1]
                colorbar = {"lenmode": "pixels", "len": length, "yanchor": "top", "y": upper_edge}
                drawn.data[-1].update(colorbar=colorbar)
    drawn.update_layout(figure_layout(theme, view=view, height=height), margin={"t": top})
    return drawn.update_layout(layout)


def _lines(panel: Panel) -> int:
    """How many lines the title of a panel has."""
    if panel.title:
        return len(panel.title.split("<br>"))
    return 0
