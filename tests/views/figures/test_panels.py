"""Panels: their axes, and what is drawn over them."""

from __future__ import annotations

import plotly.graph_objects as go
import pytest

from lcsc_opt.views.figures.panels import Axis, Level, Panel, draw


def bars(*values: float) -> list[go.Bar]:
    return [go.Bar(x=list(range(len(values))), y=list(values))]


def test_panels_share_their_horizontal_axis_and_its_title_is_below_the_last_one() -> None:
    made = draw([Panel(bars(1)), Panel(bars(2))], x=Axis("step", tick_format="~s"), theme="light", view="two")
    assert (made.layout.xaxis.title.text, made.layout.xaxis2.title.text) == ("", "step")
    assert (made.layout.xaxis.matches, made.layout.xaxis2.tickformat) == ("x2", "~s")
    assert [trace.yaxis for trace in made.data] == ["y", "y2"]


def test_the_scale_of_colours_is_beside_its_panel() -> None:
    heat_map = go.Heatmap(z=[[1, 2], [3, 4]])
    made = draw([Panel(bars(1)), Panel([heat_map], height=100)], x=Axis(), theme="light", view="two")
    scale = made.data[1].colorbar
    assert (scale.y, scale.yanchor, scale.len) == (made.layout.yaxis2.domain[1], "top", 100)
    [alone] = draw([Panel([heat_map])], x=Axis(), theme="light", view="one").data
    assert alone.colorbar.y is None, "plotly's own place"


@pytest.mark.parametrize(("logarithmic", "place"), [(False, 100.0), (True, 2.0)])
def test_the_name_of_a_level_is_at_the_level(logarithmic: bool, place: float) -> None:
    panel = Panel(bars(1, 1000), y=Axis(logarithmic=logarithmic), level=Level(100.0, "EMA*"))
    layout = draw([panel], x=Axis(), theme="light", view="level").layout
    [line] = layout.shapes
    [name] = layout.annotations
    assert (line.y0, line.y1, name.y, name.text) == (100.0, 100.0, place, "EMA*")
    assert layout.yaxis.type == ("log" if logarithmic else "linear")
