"""The figures of one study, and of the answers of several, drawn with plotly from plain data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lcsc_opt.views.figures.look import GREY, PART_COLOURS, Theme, empty_figure, figure, inert, style, template
from lcsc_opt.views.patterns import Distances, Movement, Profile, Shape
from lcsc_opt.views.progress import FailureReason, TrialTimes

NO_RESULT = "No complete trial yet. Continue the search: lcsc resume"
STEP_TITLE = "training step of the checkpoint"
COEFFICIENT = "step %{x:,}: %{customdata:.4g}"
LONGEST_REASON = 70  # characters beside a bar; the rest is under the pointer
MOST_NUMBERS = 12  # studies up to which distances are written into their cells


def coefficients_figure(
    profiles: Sequence[Profile], ema: Profile | None = None, *, theme: Theme = "light"
) -> go.Figure:
    """Found coefficients over training steps, with those of the best EMA (Liu et al. 2024, Fig. 5, 7); seeds: Fig. 8.

    A panel for each answer. A bar covers the training that its checkpoint stands for. Where checkpoints are not equally
    far apart its height is per training step, so that its area is the coefficient.
    """
    if not profiles:
        return empty_figure(NO_RESULT, theme)
    count = len(profiles)
    titles = [_heading(profile) for profile in profiles]
    made = make_subplots(
        rows=count, cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.3 / (count + 1)
    )
    for row, profile in enumerate(profiles, start=1):
        _add_bars(made, profile, row)
        if ema is not None and ema.study != profile.study:
            _add_ema(made, ema, row)
        title = "coefficient per training step" if profile.density else "coefficient"
        made.update_yaxes(title_text=title, zeroline=True, row=row, col=1)
    made.update_annotations(font_size=13, x=0, xanchor="left", align="left").update_yaxes(matches="y")
    made.update_xaxes(tickformat="~s").update_xaxes(title_text=STEP_TITLE, row=count, col=1)
    made.update_layout(template=template(theme), uirevision=inert(f"coefficients/{profiles[0].study}/{count}"))
    return made.update_layout(barmode="overlay", bargap=0, height=180 + 240 * count, showlegend=ema is not None)


def _add_bars(made: go.Figure, profile: Profile, row: int) -> None:
    intervals = np.diff(profile.steps, prepend=2 * profile.steps[0] - profile.steps[1])
    made.add_bar(
        x=profile.steps,
        y=profile.heights,
        width=intervals,
        offset=-intervals,
        name=inert(f"{profile.label}/{profile.study.rsplit('/', 1)[-1]}"),
        customdata=profile.coefficients,
        marker={"color": style(profile.optimizer).colour, "line": {"width": 0}},
        hovertemplate=COEFFICIENT,
        row=row,
        col=1,
    )


def _add_ema(made: go.Figure, ema: Profile, row: int) -> None:
    made.add_scatter(
        x=ema.steps,
        y=ema.heights,
        mode="lines",
        name="EMA*",
        legendgroup="EMA*",
        showlegend=row == 1,
        customdata=ema.coefficients,
        line={"color": GREY, "width": 2, "shape": "vh"},
        hovertemplate=COEFFICIENT,
        row=row,
        col=1,
    )


def _heading(profile: Profile) -> str:
    loss = "" if profile.loss is None else f"{profile.loss:.4g} {'held out' if profile.held_out else 'searched'}, "
    shape = f"Σ|a| = {profile.sum_abs:.2f}, {profile.effective:.0f} checkpoints matter"
    return f"{inert(f'{profile.study}, trial {profile.trial}')}<br>{inert(loss + shape)}"


def movement_figure(data: Movement, *, study: str = "", theme: Theme = "light") -> go.Figure:
    """The best coefficients at each improvement, first above last: where weight came from and went to."""
    if not len(data.trials):
        return empty_figure(NO_RESULT, theme)
    largest = float(np.quantile(np.abs(data.values), 0.995)) or float(np.abs(data.values).max()) or 1.0
    made = figure(theme, name=f"movement/{study}", title=_shown_of(data))
    made.add_heatmap(
        x=data.steps,
        y=[f"{number:.0f}" for number in data.trials],
        z=data.values.astype(np.float32),
        zmin=-largest,
        zmax=largest,
        autocolorscale=True,
        colorbar={"title": {"text": "coefficient"}, "thickness": 12},
        hovertemplate="trial %{y}, step %{x:,}: %{z:.4g}<extra></extra>",
    )
    made.update_yaxes(title_text="trial", type="category", autorange="reversed", nticks=12)
    width = f" (the largest of {data.width})" if data.width > 1 else ""
    return made.update_xaxes(title_text=STEP_TITLE + width, tickformat="~s")


def _shown_of(data: Movement) -> str:
    return f"{len(data.trials)} of {data.improvements} improvements" if data.improvements > len(data.trials) else ""


def shape_figure(data: Shape, *, study: str = "", theme: Theme = "light") -> go.Figure:
    """Σ|a|, the number of checkpoints that matter and the negative share of the best coefficients over the search."""
    if not len(data.trials):
        return empty_figure(NO_RESULT, theme)
    made = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    panels = (
        ("Σ|a|", data.sum_abs),
        ("checkpoints<br>that matter", data.effective),
        ("negative (%)", 100 * data.negative),
    )
    for row, ((title, values), colour) in enumerate(zip(panels, PART_COLOURS.values(), strict=False), start=1):
        made.add_scatter(
            x=data.evaluations,
            y=values,
            mode="lines+markers",
            name=title.replace("<br>", " "),
            line={"shape": "hv", "color": colour},
            marker={"size": 4},
            customdata=data.trials,
            hovertemplate="trial %{customdata}: %{y:.4g}<extra></extra>",
            row=row,
            col=1,
        )
        made.update_yaxes(title_text=title, row=row, col=1)
    made.update_xaxes(title_text="evaluations", row=3, col=1)
    made.update_layout(template=template(theme), uirevision=inert(f"shape/{study}"))
    return made.update_layout(height=480, showlegend=False)


def times_figure(data: TrialTimes, *, study: str = "", theme: Theme = "light") -> go.Figure:
    """Seconds a trial, stacked by part, over the search."""
    if not len(data.numbers):
        return empty_figure("No trial has ended yet. Continue the search: lcsc resume", theme, height=220)
    made = figure(theme, name=f"times/{study}", barmode="stack", bargap=0, height=340)
    for part, seconds in data.seconds.items():
        made.add_bar(
            x=data.numbers,
            y=seconds,
            width=data.width,
            offset=0,
            name="other: optimizer, database, waiting" if part == "other" else part,
            marker={"color": PART_COLOURS[part], "line": {"width": 0}},
            hovertemplate="%{y:.3g} s",
        )
    mean = f" (mean of {data.width})" if data.width > 1 else ""
    made.update_layout(hovermode="x unified", showlegend=True)
    made.update_xaxes(title_text=f"trial{mean}")
    return made.update_yaxes(title_text="time per trial (s)")


def failures_figure(data: Sequence[FailureReason], *, study: str = "", theme: Theme = "light") -> go.Figure:
    """How often each reason made an attempt fail; the most frequent on top."""
    if not data:
        return empty_figure("No attempt has failed.", theme, height=140)
    shown = data[:15]
    made = figure(theme, name=f"failures/{study}", height=120 + 34 * len(shown))
    made.add_bar(
        x=[reason.attempts for reason in shown],
        y=list(range(len(shown))),
        orientation="h",
        marker={"color": PART_COLOURS["metric"]},
        customdata=[[inert(reason.reason), _numbers(reason.trials), reason.lost] for reason in shown],
        hovertemplate="%{customdata[0]}<br>trials %{customdata[1]}; %{customdata[2]} lost<extra></extra>",
    )
    labels = [inert(_shortened(reason.reason)) for reason in shown]
    made.update_yaxes(autorange="reversed", tickvals=list(range(len(shown))), ticktext=labels)
    return made.update_xaxes(title_text="failed attempts", rangemode="tozero", tickformat="d")


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")


def distances_figure(data: Distances, *, theme: Theme = "light") -> go.Figure:
    """How far answers are from each other, as the L2 norm of the difference of their coefficients."""
    if len(data.labels) < 2:
        return empty_figure(
            "One answer has no distance yet. Search with another seed: lcsc run STUDY_FILE --seed 1", theme
        )
    count = len(data.labels)
    made = figure(theme, name="distances", height=200 + min(28 * count, 500))
    labels = [inert(label) for label in data.labels]
    made.add_heatmap(
        x=list(range(count)),
        y=list(range(count)),
        z=data.matrix,
        autocolorscale=True,
        texttemplate="%{z:.2f}" if count <= MOST_NUMBERS else None,
        customdata=[[f"{one} to {other}" for other in labels] for one in labels],
        colorbar={"title": {"text": "distance"}, "thickness": 12},
        hovertemplate="%{customdata}: %{z:.4g}<extra></extra>",
    )
    ticks = {"tickvals": list(range(count)), "ticktext": labels}
    return made.update_xaxes(**ticks).update_yaxes(autorange="reversed", **ticks)
