from __future__ import annotations

from lcsc_opt.views.curves import AXES
from lcsc_opt.views.figures.comparison import comparison_figure
from lcsc_opt.views.figures.theme import STYLES, style
from tests.history_examples import history

# colours


def test_an_optimizer_looks_the_same_in_every_process_and_unlike_others() -> None:
    assert style("TBPSA") == ("#CC79A7", "dash", "hourglass")
    assert style("my own") == ("#E69F00", "dot", "star-triangle-up")
    assert len({(known.colour, known.dash) for known in STYLES.values()}) == len(STYLES)
    others = {style(f"other {number}") for number in range(300)}
    assert "solid" not in {drawn.dash for drawn in others}
    assert len(others) > 100


# comparison


def test_a_comparison_draws_mean_and_band() -> None:
    studies = [
        history([9.0, 8.0], optimizer="EMAGrid"),
        history([5.0, 6.0, 3.0], held_out=3.5),
        history([7.0, 1.0, 2.0], seed=1, held_out=1.5),
        history([4.0], optimizer="CMA", ended=False),
    ]
    made = comparison_figure(studies, "images")
    lines = {trace.name: trace for trace in made.data if trace.showlegend is not False}
    assert list(lines) == ["EMA*", "LCSC (2 seeds)", "CMA, seed 0, unfinished"]
    lcsc = lines["LCSC (2 seeds)"]
    assert (list(lcsc.x), list(lcsc.y), lcsc.line.shape) == ([10, 20, 30], [6, 3, 2], "hv")
    assert lcsc.line.color == style("LCSC").colour
    assert (lcsc.mode, lines["CMA, seed 0, unfinished"].mode) == ("lines", "lines+markers")  # the latter is one point
    assert comparison_figure(studies, "evaluations").layout.xaxis.dtick == 1
    low, high = (trace for trace in made.data if trace.hoverinfo == "skip")
    assert (list(low.y), list(high.y), high.fill) == ([5, 1, 1], [7, 5, 3], "tonexty")
    assert low.name == high.name == lcsc.name, "a refresh leaves off by name what a reader has switched off"
    assert made.layout.xaxis.title.text == AXES["images"] == "images sampled"
    assert made.layout.yaxis.title.text == "best FID so far"
    (ema,) = made.layout.shapes
    assert (ema.y0, ema.y1) == (8.0, 8.0)


def test_logarithmic_axes_are_kept_for_positive_losses() -> None:
    positive, negative = [history([3.0, 2.0])], [history([3.0, -2.0])]
    assert comparison_figure(positive).layout.yaxis.type == "log"
    assert comparison_figure(negative).layout.yaxis.type == "linear"
