"""How figures look: one colour, dash and marker for each optimizer on every page, and a light and a dark template."""

from __future__ import annotations

import html
import zlib
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go

Theme = Literal["light", "dark"]


class Style(NamedTuple):
    """How an optimizer is drawn; the dash and the marker tell it from others for those who see no colours."""

    colour: str
    dash: str
    marker: str


# Okabe and Ito 2008: distinguishable for colour-blind readers; without the black and the yellow, one of which cannot be
# seen on either a dark or a light page.
GREY, ORANGE, SKY, GREEN = "#7F7F7F", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
STYLES = {
    "EMAGrid": Style(GREY, "dash", "square"),
    "PowerEMAGrid": Style(SKY, "dash", "square"),
    "LCSC": Style(VERMILLION, "solid", "diamond"),
    "LCSCGradient": Style(ORANGE, "solid", "star"),
    "CMA": Style(BLUE, "solid", "circle"),
    "LCSCQuadratic": Style(GREEN, "solid", "hexagon"),
    "DE": Style(GREEN, "dashdot", "triangle-up"),
    "OnePlusOne": Style(PURPLE, "solid", "triangle-down"),
    "PSO": Style(SKY, "solid", "cross"),
    "RandomSearch": Style(GREY, "dot", "x"),
}
_OTHER_COLOURS = (ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE)
_OTHER_DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot")
_OTHER_MARKERS = ("pentagon", "hexagon", "bowtie", "hourglass", "star-triangle-up", "diamond-wide", "diamond-tall")

CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "responsive": True,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
}
"""Of plotly.js, on every page: no link to its maker, and no button that sends a figure's data to them."""

PART_COLOURS = {"merge": BLUE, "sample": ORANGE, "features": GREEN, "metric": PURPLE, "other": GREY}

LIGHT = {"paper": "#FFFFFF", "text": "#1F2328", "grid": "#E3E6EA", "line": "#8C959F", "middle": "#F7F7F7"}
DARK = {"paper": "#14171A", "text": "#E6EAEE", "grid": "#2C3238", "line": "#7D8590", "middle": "#22272C"}


def style(optimizer: str) -> Style:
    """How an optimizer is drawn, told by its name alone, whatever else is shown."""
    if optimizer in STYLES:
        return STYLES[optimizer]
    index = zlib.crc32(optimizer.encode())
    index, colour = divmod(index, len(_OTHER_COLOURS))
    index, dash = divmod(index, len(_OTHER_DASHES))
    return Style(_OTHER_COLOURS[colour], _OTHER_DASHES[dash], _OTHER_MARKERS[index % len(_OTHER_MARKERS)])


def with_alpha(colour: str, alpha: float) -> str:
    """``#RRGGBB`` → ``rgba(…)``."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def inert(text: object) -> str:
    """A name as plotly shows it literally: plotly reads some HTML in texts, and turns entities back."""
    return html.escape(str(text), quote=False).replace("\n", " ")


def template(theme: Theme) -> go.layout.Template:
    """Fonts, grid and page colour; what an axis is called and where its ticks are belongs to the figure."""
    colours = DARK if theme == "dark" else LIGHT
    axis = {
        **{"gridcolor": colours["grid"], "linecolor": colours["line"], "zerolinecolor": colours["line"]},
        **{"ticks": "outside", "tickcolor": colours["line"], "automargin": True, "showline": True, "zeroline": False},
        "title": {"standoff": 8},
    }
    diverging = [[0.0, BLUE], [0.5, colours["middle"]], [1.0, VERMILLION]]
    return go.layout.Template(
        layout={
            "paper_bgcolor": colours["paper"],
            "plot_bgcolor": colours["paper"],
            "font": {"color": colours["text"], "family": "system-ui, 'Liberation Sans', Arial, sans-serif", "size": 13},
            "hoverlabel": {"bgcolor": colours["paper"], "font": {"color": colours["text"]}},
            "colorscale": {"diverging": diverging, "sequential": [[0.0, colours["middle"]], [1.0, BLUE]]},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"bgcolor": with_alpha(colours["paper"], 0.6)},
            "margin": {"l": 70, "r": 20, "t": 40, "b": 55},
        }
    )


def figure(theme: Theme, *, name: str, title: str = "", height: int = 420, **layout: Any) -> go.Figure:
    """A figure without traces. While ``name`` stays the same, a refresh keeps what a reader zoomed or switched off."""
    made = go.Figure()
    made.update_layout(template=template(theme), uirevision=inert(name), height=height, **layout)
    return made.update_layout(title={"text": title, "font": {"size": 14}})


def empty_figure(message: str, theme: Theme = "light", *, height: int = 260) -> go.Figure:
    """What is shown in place of a figure that has no data yet: a sentence that says what to do."""
    made = figure(theme, name="empty", height=height)
    made.update_xaxes(visible=False).update_yaxes(visible=False)
    place: dict[str, Any] = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}
    return made.add_annotation(text=inert(message), showarrow=False, font={"size": 15}, **place)
