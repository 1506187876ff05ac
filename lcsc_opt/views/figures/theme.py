"""The theme of figures: a colour, dash and marker for each optimizer on every page; a light and a dark template."""

from __future__ import annotations

import html
import textwrap
import zlib
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go

from lcsc_opt.base.records import TRAINER_EMA
from lcsc_opt.database.names import LAST_CHECKPOINT

Theme = Literal["light", "dark"]


class Style(NamedTuple):
    """How an optimizer is drawn; dash and marker distinguish it for readers who cannot see its colour."""

    colour: str
    dash: str
    marker: str


# Okabe and Ito 2008: distinguishable for colour-blind readers; without the black and the yellow, one of which cannot be
# seen on either a dark or a light page.
GREY = "#7F7F7F"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"
STYLES = {
    "EMAGrid": Style(GREY, "dash", "square"),
    "Grid": Style(SKY, "dash", "square"),
    "Landscape": Style(PURPLE, "dot", "x"),
    "LCSC": Style(VERMILLION, "solid", "diamond"),
    "LCSCGradient": Style(ORANGE, "solid", "star"),
    "CMA": Style(BLUE, "solid", "circle"),
    "LCSCQuadratic": Style(GREEN, "solid", "hexagon"),
    LAST_CHECKPOINT: Style(GREY, "solid", "circle-open"),
    TRAINER_EMA: Style(GREY, "dashdot", "square-open"),
}
_TITLE_CHARACTERS = 36
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
"""Options of plotly.js on every page: no link to its maker, and no button that uploads a figure's data."""

LIGHT = {"paper": "#FFFFFF", "text": "#1F2328", "grid": "#E3E6EA", "line": "#8C959F", "middle": "#F7F7F7"}
DARK = {"paper": "#14171A", "text": "#E6EAEE", "grid": "#2C3238", "line": "#7D8590", "middle": "#22272C"}


def style(optimizer: str) -> Style:
    """How an optimizer is drawn, which depends on its name alone and not on what else is shown."""
    if optimizer in STYLES:
        return STYLES[optimizer]
    if optimizer.startswith(TRAINER_EMA):  # of several averages
        return STYLES[TRAINER_EMA]
    rest = zlib.crc32(optimizer.encode())  # unlike hash(), the same in every process
    rest, colour = divmod(rest, len(_OTHER_COLOURS))
    rest, dash = divmod(rest, len(_OTHER_DASHES))
    marker = rest % len(_OTHER_MARKERS)
    return Style(_OTHER_COLOURS[colour], _OTHER_DASHES[dash], _OTHER_MARKERS[marker])


def with_alpha(colour: str, alpha: float) -> str:
    """``#RRGGBB`` → ``rgba(…)``."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def inert(text: object) -> str:
    """A name as plotly shows it literally: plotly reads some HTML in texts, and turns entities back."""
    return html.escape(str(text), quote=False).replace("\n", " ")


def in_lines(*texts: str) -> str:
    """Texts as the lines of a title that fits a page of 390 pixels; a long one takes several."""
    lines = [line for text in texts for line in textwrap.wrap(text, _TITLE_CHARACTERS, break_on_hyphens=False)]
    return "<br>".join(map(inert, lines))


def template(theme: Theme) -> go.layout.Template:
    """Fonts, grid and page colour; what an axis is called and where its ticks are belongs to the figure."""
    colours = DARK if theme == "dark" else LIGHT
    axis = {
        "gridcolor": colours["grid"],
        "linecolor": colours["line"],
        "zerolinecolor": colours["line"],
        "ticks": "outside",
        "tickcolor": colours["line"],
        "automargin": True,
        "showline": True,
        "zeroline": False,
        "title": {"standoff": 8},
    }
    return go.layout.Template(
        layout={
            "paper_bgcolor": colours["paper"],
            "plot_bgcolor": colours["paper"],
            "font": {"color": colours["text"], "family": "system-ui, 'Liberation Sans', Arial, sans-serif", "size": 13},
            "hoverlabel": {"bgcolor": colours["paper"], "font": {"color": colours["text"]}},
            "colorscale": {
                "diverging": [[0.0, BLUE], [0.5, colours["middle"]], [1.0, VERMILLION]],
                "sequential": [[0.0, colours["middle"]], [1.0, BLUE]],
            },
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"bgcolor": with_alpha(colours["paper"], 0.6)},
            "margin": {"l": 70, "r": 20, "t": 40, "b": 55},
        }
    )


def figure_layout(theme: Theme, *, view: str, height: int) -> dict[str, Any]:
    """What all figures have in common.

    While ``view`` stays the same, a refresh keeps what a reader zoomed or switched off.
    """
    return {"template": template(theme), "uirevision": inert(view), "height": height}


def empty_figure(message: str, theme: Theme = "light") -> go.Figure:
    """What is shown in place of a figure that has no data yet: a sentence that says what to do."""
    drawn = go.Figure(layout=figure_layout(theme, view="empty", height=260))
    drawn.update_xaxes(visible=False)
    drawn.update_yaxes(visible=False)
    return drawn.add_annotation(
        text=in_lines(message), showarrow=False, font={"size": 15}, x=0.5, y=0.5, xref="paper", yref="paper"
    )
