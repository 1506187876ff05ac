from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest
from optuna.storages import RDBStorage
from optuna_dashboard._custom_plot_data import is_valid_graph_object_id

from lcsc_opt.base.errors import StudyStoreError
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.reader import HistoryReader
from lcsc_opt.views.curves import AXES, comparison
from lcsc_opt.views.figures.comparison import comparison_figure
from lcsc_opt.views.figures.look import DARK, LIGHT, STYLES, empty_figure, inert, style, template
from lcsc_opt.views.figures.of_study import own_figures, study_figures
from lcsc_opt.views.figures.study import (
    coefficients_figure,
    distances_figure,
    failures_figure,
    movement_figure,
    shape_figure,
    times_figure,
)
from lcsc_opt.views.patterns import Distances, Movement, Profile, Shape
from lcsc_opt.views.progress import FailureReason, trial_times
from tests.history_examples import history
from tests.study_examples import write_study

HOSTILE = "<script>alert(1)</script><a href='javascript:alert(1)'>x</a>"


def profile(study: str = "digits/LCSC/0", *, optimizer: str = "LCSC", density: bool = False) -> Profile:
    values, steps = np.array([-0.5, 0.25, 1.25]), np.array([100.0, 200.0, 400.0 if density else 300.0])
    heights = values / [100, 100, 200] if density else values
    return Profile(study, optimizer, optimizer, 4, 2.5, True, steps, values, heights, density, 2.0, 2.4, 0.25)


def texts(figure: go.Figure) -> str:
    return json.dumps(json.loads(figure.to_json()), ensure_ascii=False)


# colours


def test_an_optimizer_looks_the_same_in_every_process() -> None:
    names = [*STYLES, "TBPSA", "NGOpt", "my own"]
    code = "import sys; from lcsc_opt.views.figures.look import style; print([style(n) for n in sys.argv[1:]])"
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr([style(name) for name in names])


def test_known_optimizers_differ_in_colour_or_dash() -> None:
    assert len({(known.colour, known.dash) for known in STYLES.values()}) == len(STYLES)


def test_others_are_never_taken_for_a_known_one() -> None:
    known = {(drawn.colour, drawn.dash) for drawn in STYLES.values() if drawn.dash == "solid"}
    for number in range(300):
        drawn = style(f"other {number}")
        assert (drawn.colour, drawn.dash) not in known
    assert len({style(f"other {number}") for number in range(300)}) > 100


@pytest.mark.parametrize("page", [LIGHT["paper"], DARK["paper"]])
def test_every_colour_is_seen_on_both_pages(page: str) -> None:
    for known in STYLES.values():
        assert contrast(known.colour, page) > 2.0, known


def contrast(one: str, other: str) -> float:
    """Of WCAG 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_text_is_easily_read_in_both_themes() -> None:
    for colours in (LIGHT, DARK):
        assert contrast(colours["text"], colours["paper"]) > 7
    assert template("dark").layout.paper_bgcolor != template("light").layout.paper_bgcolor


# comparison


def test_a_comparison_draws_mean_band_and_held_out_marks() -> None:
    studies = [
        history([9.0, 8.0], optimizer="EMAGrid"),
        history([5.0, 6.0, 3.0], held_out=3.5),
        history([7.0, 1.0, 2.0], seed=1, held_out=1.5),
        history([4.0], optimizer="CMA", ended=False),
    ]
    made = comparison_figure(comparison(studies, "images"))
    lines = {trace.name: trace for trace in made.data if trace.showlegend is not False}
    assert list(lines) == ["EMA*", "LCSC (2 seeds)", "CMA, seed 0, unfinished"]
    lcsc = lines["LCSC (2 seeds)"]
    assert (list(lcsc.x), list(lcsc.y), lcsc.line.shape) == ([10, 20, 30], [6, 3, 2], "hv")
    assert lcsc.line.color == style("LCSC").colour
    assert (lcsc.mode, lines["CMA, seed 0, unfinished"].mode) == ("lines", "lines+markers")  # the latter is one point
    assert (made.layout.xaxis.dtick, comparison_figure(comparison(studies, "evaluations")).layout.xaxis.dtick) == (
        None,
        1,
    )
    low, high = (trace for trace in made.data if trace.hoverinfo == "skip")
    assert (list(low.y), list(high.y), high.fill) == ([5, 1, 1], [7, 5, 3], "tonexty")
    (marks,) = (trace for trace in made.data if trace.mode == "markers")
    assert (list(marks.x), list(marks.y)) == ([30, 30], [3.5, 1.5])
    assert made.layout.xaxis.title.text == AXES["images"] == "images sampled"
    assert made.layout.yaxis.title.text == "best FID so far (marks: held out)"
    (ema,) = made.layout.shapes
    assert (ema.y0, ema.y1) == (8.0, 8.0)


def test_logarithmic_axes_are_kept_for_positive_losses() -> None:
    positive, negative = comparison([history([3.0, 2.0])]), comparison([history([3.0, -2.0])])
    assert comparison_figure(positive).layout.yaxis.type == "log"
    assert comparison_figure(positive, log_y=False, log_x=True).layout.yaxis.type == "linear"
    assert comparison_figure(positive, log_x=True).layout.xaxis.type == "log"
    assert comparison_figure(negative).layout.yaxis.type == "linear"


def test_a_refresh_keeps_what_a_reader_zoomed_and_another_axis_does_not() -> None:
    def revision(values: list[float | None], axis: str = "images") -> str:
        return str(comparison_figure(comparison([history(values)], axis)).layout.uirevision)

    assert revision([3.0]) == revision([3.0, 2.0, 1.0])
    assert revision([3.0]) != revision([3.0], "evaluations")


def test_many_trials_are_few_points() -> None:
    made = comparison_figure(comparison([history(list(np.linspace(9, 1, 4000)), seed=seed) for seed in range(3)]))
    assert max(len(trace.x) for trace in made.data) <= 2000
    assert len(made.to_json()) < 200_000


# one study


def test_coefficients_are_bars_over_the_training_that_they_stand_for() -> None:
    made = coefficients_figure([profile(density=True)], profile("digits/EMAGrid/0", optimizer="EMAGrid"))
    bars, ema = made.data
    assert (list(bars.x), list(bars.width), list(bars.offset)) == ([100, 200, 400], [100, 100, 200], [-100, -100, -200])
    assert list(bars.customdata) == [-0.5, 0.25, 1.25]
    assert (ema.name, ema.mode) == ("EMA*", "lines")
    assert made.layout.yaxis.title.text == "coefficient per training step"
    assert "Σ|a| = 2.00" in texts(made)


def test_seeds_have_a_panel_each() -> None:
    made = coefficients_figure([profile(f"digits/LCSC/{seed}") for seed in range(3)])
    assert [bars.yaxis for bars in made.data] == ["y", "y2", "y3"]
    assert made.layout.yaxis2.title.text == "coefficient"


def test_ema_is_not_drawn_over_itself() -> None:
    grid = profile("digits/EMAGrid/0", optimizer="EMAGrid")
    assert len(coefficients_figure([grid], grid).data) == 1


def test_the_heatmap_has_a_row_for_each_improvement_and_zero_in_the_middle() -> None:
    data = Movement(
        np.array([0.0, 7]), np.array([3.0, 2]), np.array([100.0, 200]), np.array([[1.0, 0], [1.5, -0.5]]), 1, 9
    )
    made = movement_figure(data, study="digits/LCSC/0")
    (heat,) = made.data
    assert list(heat.y) == ["0", "7"]
    assert heat.zmin == -heat.zmax
    assert np.asarray(heat.z).tolist() == [[1.0, 0.0], [1.5, -0.5]]
    assert made.layout.title.text == "2 of 9 improvements"
    assert made.layout.yaxis.autorange == "reversed"


def test_time_per_trial_is_stacked_by_part() -> None:
    times = trial_times(history([3.0, 2.0], columns={"sample_seconds": 0.5, "merge_seconds": 0.25}))
    made = times_figure(times)
    assert made.layout.barmode == "stack"
    assert [trace.name for trace in made.data] == ["merge", "sample", "other: optimizer, database, waiting"]
    assert made.layout.yaxis.title.text == "time per trial (s)"


def test_shape_and_distances_have_axes_with_names() -> None:
    ones = np.ones(3)
    made = shape_figure(Shape(ones, ones, ones, ones, 0.25 * ones))
    assert [trace.y[0] for trace in made.data] == [1, 1, 25]
    assert made.layout.xaxis3.title.text == "evaluations"
    distances = distances_figure(Distances(("LCSC/0", "LCSC/1"), np.array([[0, 2.0], [2, 0]])))
    assert np.asarray(distances.data[0].z).tolist() == [[0, 2], [2, 0]]
    assert list(distances.layout.xaxis.ticktext) == ["LCSC/0", "LCSC/1"]


@pytest.mark.parametrize(
    "made",
    [
        comparison_figure(comparison([])),
        coefficients_figure([]),
        movement_figure(Movement(*[np.zeros(0)] * 3, np.zeros((0, 0)), 1, 0)),  # type: ignore[arg-type, call-arg]
        shape_figure(Shape(*[np.zeros(0)] * 5)),
        times_figure(trial_times(history([]))),
        distances_figure(Distances(("LCSC/0",), np.zeros((1, 1)))),
    ],
)
def test_a_figure_without_data_says_what_to_run(made: go.Figure) -> None:
    assert not made.data
    (sentence,) = made.layout.annotations
    assert "lcsc r" in sentence.text
    assert made.layout.xaxis.visible is False


def test_markup_in_names_is_text() -> None:
    assert inert(HOSTILE).count("<") == 0
    for made in (
        comparison_figure(comparison([history([2.0, 1.0], optimizer=HOSTILE, held_out=1.5, metric=HOSTILE)])),
        coefficients_figure([profile(HOSTILE, optimizer=HOSTILE)]),
        failures_figure([FailureReason(HOSTILE, 2, (1, 2), 1)]),
        distances_figure(Distances((HOSTILE, "b"), np.zeros((2, 2)))),
        empty_figure(HOSTILE),
    ):
        assert "<script" not in texts(made)
        assert "<a" not in texts(made)


# from a database


def test_the_figures_of_a_study_can_be_saved_into_optuna_dashboard(url: str) -> None:
    storage: RDBStorage = open_storage(url, write=True)
    write_study(storage, "digits/EMAGrid/0", [9.0, 8.0])
    write_study(storage, "digits/LCSC/0", [4.0, None, 2.0], held_out={"trial": 2, "loss": 2.5})
    made = study_figures(storage, "digits/LCSC/0")
    assert list(made) == ["best_so_far", "coefficients"]
    *_, own = studies = (reader := HistoryReader(storage)).read("digits")
    drawn = own_figures(reader, own, studies)
    assert list(drawn) == ["coefficients", "movement", "shape", "times", "failures"]
    assert all(is_valid_graph_object_id(name) for name in [*made, *drawn])
    assert {trace.name for trace in made["best_so_far"].data if trace.mode == "lines"} == {"EMA*", "LCSC"}
    assert len(made["coefficients"].data) == 2
    with pytest.raises(StudyStoreError, match=r"digits/LCSC/1: no such study; the experiment has: digits/EMAGrid/0"):
        study_figures(storage, "digits/LCSC/1")


def test_figures_import_no_torch() -> None:
    ours = ("database.summary", "views.figures.of_study", "views.landscape", "views.report", "cli.landscape")
    code = f"import sys, {', '.join(f'lcsc_opt.{name}' for name in ours)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
