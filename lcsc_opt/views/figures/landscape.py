"""The figure of a landscape, drawn with plotly from plain data (Liu et al. 2024, Fig. 3 and 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from lcsc_opt.database.history import Floats
from lcsc_opt.views.figures.look import GREY, Theme, empty_figure, figure, inert, style, with_alpha
from lcsc_opt.views.landscape import Candidates, Landscape, Point

WIDE = 3.0  # the highest over the lowest loss, from which on colours are logarithmic
TICKS = 6
FARTHEST = 1.0  # how far beyond the grid an answer still widens the view, in units of the grid's side
OUTLINE = {"width": 1.5, "color": "#FFFFFF"}
NO_LANDSCAPE = "No landscape yet. Compute one: lcsc landscape experiment/optimizer/seed"


def landscape_figure(data: Landscape | None, *, theme: Theme = "light") -> go.Figure:
    """The loss on the plane as contours; on it the corners, the candidates of searches, and their answers.

    Args:
        data: ``None`` where there is no landscape.
        theme: of the page.
    """
    if data is None:
        return empty_figure(NO_LANDSCAPE, theme)
    if np.isnan(data.values).all():
        return empty_figure(f"{data.study}: no point of the plane is evaluated yet. Continue: lcsc resume", theme)
    made = figure(theme, name=f"landscape/{data.study}", title=_title(data), height=720)
    _add_contours(made, data)
    _add_failed(made, data.failed)
    for known in data.candidates:
        _add_candidates(made, known)
    _add_corners(made, data)
    for known in data.candidates:
        _add_answer(made, known)
    _add_lowest(made, data)
    low, high = _view(data)
    first, second, third = (inert(label) for label in data.corner_labels)
    made.update_xaxes(title_text=f"x: from {first} (0) to {second} (1)", range=[low[0], high[0]], constrain="domain")
    made.update_yaxes(title_text=f"y: from {first} (0) to {third} (1)", range=[low[1], high[1]], constrain="domain")
    made.update_yaxes(scaleanchor="x")
    return made.update_layout(legend={"orientation": "h", "y": -0.12}, hovermode="closest", margin={"t": 125})


def _title(data: Landscape) -> str:
    """What is shown, and what a reader must know about it."""
    parts = [f"{data.metric} on the plane through {', '.join(data.corner_labels)}"]
    if data.done < data.total:
        parts[0] += f": {data.done} of {data.total} points"
    if data.candidates:
        parts.append(f"Candidates are where the plane is nearest in {data.space}; their own loss is another one.")
    if not data.comparable:
        parts.append(f"The plane is of {data.images:,} images a point, the searches are not: losses differ by that.")
    parts.append(_outside(data))
    return "<br>".join([inert(parts[0]), *(f"<sub>{inert(part)}</sub>" for part in parts[1:] if part)])


def _add_contours(made: go.Figure, data: Landscape) -> None:
    heights, ticks, texts = heights_of(data.values)
    made.add_contour(
        x=data.axis,
        y=data.axis,
        z=heights,
        text=[["" if np.isnan(value) else f"{value:.4g}" for value in row] for row in data.values],
        zmin=0,
        zmax=max(ticks[-1], 1e-12),
        colorscale=[[0.0, with_alpha(GREY, 0.0)], [1.0, with_alpha(GREY, 0.9)]],  # over a light or a dark page
        connectgaps=True,
        ncontours=20,
        contours={"coloring": "heatmap"},
        line={"width": 0.7, "color": with_alpha(GREY, 0.9)},
        name="plane",
        showlegend=False,
        colorbar={"title": {"text": inert(data.metric)}, "thickness": 12, "tickvals": ticks, "ticktext": texts},
        hovertemplate="(%{x:.3g}, %{y:.3g}): " + _braced(inert(data.metric)) + " %{text}<extra></extra>",
    )


def heights_of(values: Floats) -> tuple[Floats, list[float], list[str]]:
    """What colours stand for: how far above the lowest loss, in orders of magnitude where losses differ much.

    Returns:
        ``[n, n]`` heights from zero, the heights of the colour bar's ticks, and the losses at these.
    """
    lowest, highest = float(np.nanmin(values)), float(np.nanmax(values))
    if lowest > 0 and highest / lowest > WIDE:
        losses = np.geomspace(lowest, highest, TICKS)
        heights, ticks = np.log10(values / lowest), np.log10(losses / lowest)
    else:
        losses = np.linspace(lowest, highest, TICKS)
        heights, ticks = values - lowest, losses - lowest
    return heights, ticks.tolist(), [f"{loss:.3g}" for loss in losses]


def _add_failed(made: go.Figure, failed: Floats) -> None:
    if len(failed):
        made.add_scatter(
            x=failed[:, 0],
            y=failed[:, 1],
            mode="markers",
            name="failed",
            marker={"symbol": "x-thin-open", "size": 7, "line": {"width": 1}},
            hovertemplate="(%{x:.3g}, %{y:.3g}): failed<extra></extra>",
        )


def _add_candidates(made: go.Figure, known: Candidates) -> None:
    """A dot for each candidate, and the way that the best one went."""
    drawn, name = style(known.optimizer), inert(known.study)
    shared = {"legendgroup": inert(known.optimizer), "showlegend": False}
    if known.label == known.optimizer:  # the points of a grid are no way
        way = known.positions[known.improved]
        line = {"color": with_alpha(drawn.colour, 0.7), "width": 1.5, "dash": drawn.dash}
        made.add_scatter(x=way[:, 0], y=way[:, 1], mode="lines", line=line, hoverinfo="skip", **shared)
    made.add_scatter(
        x=known.positions[:, 0],
        y=known.positions[:, 1],
        mode="markers",
        marker={"symbol": drawn.marker, "size": 5, "color": with_alpha(drawn.colour, 0.55)},
        customdata=np.column_stack([known.numbers, known.losses]),
        hovertemplate=f"{_braced(name)}, trial %{{customdata[0]}}: %{{customdata[1]:.4g}}<extra></extra>",
        **shared,
    )


def _braced(name: str) -> str:
    """A name within a template of plotly, which would read ``%{…}`` in it."""
    return name.replace("%{", "% {")


def _add_corners(made: go.Figure, data: Landscape) -> None:
    shown = [*data.corners, data.corners[0]]
    made.add_scatter(
        x=[point.x for point in shown],
        y=[point.y for point in shown],
        mode="lines+markers+text",
        name="corners",
        text=[*(inert(_with_loss(label, point)) for label, point in zip(data.corner_labels, shown, strict=False)), ""],
        textposition=["bottom right", "bottom right", "top right", "middle center"],
        line={"width": 1, "dash": "dot", "color": GREY},
        marker={"symbol": "square", "size": 10, "color": GREY, "line": OUTLINE},
        hovertemplate="%{text}<extra></extra>",
    )


def _with_loss(label: str, point: Point) -> str:
    return label if point.loss is None else f"{label}: {point.loss:.4g}"


def _add_answer(made: go.Figure, known: Candidates) -> None:
    if known.answer is None:
        return
    drawn, label = style(known.optimizer), inert(known.label)
    first = not any(trace.name == label for trace in made.data)
    text = f"{known.study}, trial {known.answer.trial}"
    made.add_scatter(
        x=[known.answer.x],
        y=[known.answer.y],
        mode="markers",
        name=label,
        legendgroup=inert(known.optimizer),
        showlegend=first,
        text=[inert(_with_loss(text, known.answer))],
        marker={"symbol": drawn.marker, "size": 15, "color": drawn.colour, "line": OUTLINE},
        hovertemplate="%{text}<extra></extra>",
    )


def _add_lowest(made: go.Figure, data: Landscape) -> None:
    """The lowest point of the plane, and the best answer of all, by name."""
    found = data.found
    named = [("lowest on the plane", data.best)]
    named += [] if found is None else [(f"best found: {found.label}", found.answer)]
    low, high = _view(data)
    for (label, point), height in zip(named, (45, 150), strict=False):  # so that one does not cover the other
        if point is not None and _is_within(np.array([[point.x, point.y]]), low, high)[0]:
            made.add_annotation(**_arrow(inert(_with_loss(label, point)), point, (low + high) / 2, height))


def _arrow(text: str, point: Point, middle: Floats, height: int) -> dict[str, Any]:
    """A label between a point and the middle of the view, where there is room for it."""
    shift = {"ax": 70 if point.x < middle[0] else -70, "ay": -height if point.y < middle[1] else height}
    box = {"bgcolor": "rgba(255,255,255,0.85)", "font": {"color": "#000000", "size": 12}}
    return {
        "text": text,
        "x": point.x,
        "y": point.y,
        **shift,
        "arrowhead": 2,
        "arrowwidth": 1.5,
        "arrowcolor": GREY,
        **box,
    }


def _view(data: Landscape) -> tuple[Floats, Floats]:
    """The lowest and the highest x and y that are shown: the grid, and answers that are not far from it."""
    low, high = (np.full(2, value) for value in (data.axis[0], data.axis[-1]))
    side = float(data.axis[-1] - data.axis[0])
    answers = [[known.answer.x, known.answer.y] for known in data.candidates if known.answer is not None]
    for place in np.array(answers).reshape(-1, 2):
        if (place >= low - FARTHEST * side).all() and (place <= high + FARTHEST * side).all():
            low, high = np.minimum(low, place), np.maximum(high, place)
    pad = 0.03 * (high - low).max()
    return low - pad, high + pad


def _outside(data: Landscape) -> str:
    """What a reader does not see: candidates, and by name the answers, that lie too far away."""
    low, high = _view(data)
    count = sum(int((~_is_within(known.positions, low, high)).sum()) for known in data.candidates)
    if not count:
        return ""
    answers = [(known, known.answer) for known in data.candidates if known.answer is not None]
    far = [
        f"{known.label}/{known.seed} at ({answer.x:.3g}, {answer.y:.3g})"
        for known, answer in answers
        if not _is_within(np.array([[answer.x, answer.y]]), low, high)[0]
    ]
    named = f", among them the answer of {', of '.join(far)}" if far else ""
    return f"{count} candidates lie outside of this view{named}."


def _is_within(positions: Floats, low: Floats, high: Floats) -> np.ndarray:
    return np.asarray(((positions >= low) & (positions <= high)).all(axis=1))
