"""The figures, drawn from plain data with matplotlib and saved as PNG or SVG."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from lcsc_opt.analysis.comparison import BASELINES, Floats, StudySummary, best_ema, mean_curve
from lcsc_opt.errors import StudyStoreError

# Okabe and Ito 2008: distinguishable for colour-blind readers. An optimizer has the same colour everywhere.
COLOURS = {
    "EMAGrid": "#777777",
    "PowerEMAGrid": "#56B4E9",
    "LCSC": "#D55E00",
    "CMA": "#0072B2",
    "DE": "#009E73",
    "OnePlusOne": "#CC79A7",
    "PSO": "#E69F00",
    "RandomSearch": "#000000",
}
OTHER_COLOURS = ("#8A2BE2", "#8B4513", "#2F4F4F", "#808000")
AXES = ("evaluations", "images sampled", "seconds of evaluation")


def colour(optimizer: str) -> str:
    """The colour of an optimizer, by its name alone."""
    return COLOURS.get(optimizer) or OTHER_COLOURS[zlib.crc32(optimizer.encode()) % len(OTHER_COLOURS)]


def draw_comparison(studies: Sequence[StudySummary]) -> Figure:
    """Best so far against evaluations, images and seconds: mean and range over seeds; EMA* as a line.

    Diamonds at the right end are held-out values.
    """
    figure = _figure(13, 4)
    drawn = [study for study in studies if len(study.curve)]
    ema = best_ema(drawn)
    loss = next((study.metric for study in drawn), "loss")
    for axis, label in enumerate(AXES):
        axes = figure.add_subplot(1, 3, axis + 1)
        _draw_curves(axes, drawn, axis)
        if ema is not None:
            axes.axhline(ema.curve[-1, 3], color=COLOURS["EMAGrid"], linestyle="--", linewidth=1, label=ema.label)
        axes.set_xlabel(label)
        if axis < 2:  # 300,000 images as 300k
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if all(study.curve[-1, 3] > 0 for study in drawn):
            _plain_log_scale(axes)
    figure.suptitle(f"best {loss} so far", fontsize=11)
    axes = figure.axes[0]
    axes.set_ylabel(f"{loss} on the search's noise (diamonds: held out)")
    if drawn:
        axes.legend(frameon=False, fontsize=9)
    return figure


def _plain_log_scale(axes: Axes) -> None:
    """A logarithmic loss, labelled 2, 5, 10 and not in powers."""
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_curves(axes: Axes, studies: Sequence[StudySummary], axis: int) -> None:
    names = list(dict.fromkeys(study.optimizer for study in studies))
    for name in names:
        group = [study for study in studies if study.optimizer == name]
        shade = colour(name)
        x, mean, low, high = mean_curve(group, axis)
        label = BASELINES.get(name, name) + (f" ({len(group)} seeds)" if len(group) > 1 else "")
        axes.step(x, mean, where="post", color=shade, label=None if name == "EMAGrid" else label)
        axes.fill_between(x, low, high, step="post", color=shade, alpha=0.2, linewidth=0)
        held_out = [study.held_out for study in group if study.held_out is not None]
        if held_out:
            axes.plot([x[-1]] * len(held_out), held_out, "D", color=shade, markersize=5, clip_on=False)


def draw_coefficients(study: StudySummary, ema: StudySummary | None) -> Figure:
    """Found coefficients over training steps, with those of the best EMA (Liu et al. 2024, Fig. 5)."""
    if study.best_coefficients is None:
        raise StudyStoreError(f"{study.study}: no complete trial to draw; run it first")
    figure = _figure(9, 3.6)
    axes = figure.add_subplot()
    shade = colour(study.optimizer)
    axes.vlines(study.steps, 0, study.best_coefficients, color=shade, linewidth=1.2, label=study.label)
    if ema is not None and ema.best_coefficients is not None and ema.study != study.study:
        axes.plot(ema.steps, ema.best_coefficients, color=COLOURS["EMAGrid"], label=ema.label, linewidth=1.5)
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.set_xlabel("training step of the checkpoint")
    axes.set_ylabel("coefficient")
    total = np.abs(study.best_coefficients).sum()
    axes.set_title(f"{study.study}, trial {study.best_trial}: Σ|a| = {total:.2f}", fontsize=10)
    axes.legend(frameon=False, loc="upper left")
    return figure


def draw_image_pairs(first: Floats, second: Floats, titles: tuple[str, str], *, columns: int = 10) -> Figure:
    """Two grids of the same size, one below the other; images at the same place come from the same noise.

    Args:
        first: ``[n, H, W]`` or ``[n, H, W, 3]`` in [0, 1].
        second: as ``first``.
        titles: above the grids.
        columns: of each grid.
    """
    rows = -(-len(first) // columns)
    figure = _figure(0.62 * columns, 1.24 * rows + 0.9)
    for place, (images, title) in enumerate(zip((first, second), titles, strict=True), start=1):
        axes = figure.add_subplot(2, 1, place)
        axes.imshow(_tile(images, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)
    return figure


def _tile(images: Floats, columns: int) -> Floats:
    """``[n, H, W, …]`` → one ``[rows (H + 1), columns (W + 1), …]`` sheet, white between the images."""
    rows, (height, width) = -(-len(images) // columns), images.shape[1:3]
    sheet = np.ones((rows * (height + 1), columns * (width + 1), *images.shape[3:]))
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save(figure: Figure, path: Path) -> Path:
    """Write a figure; the suffix, ``.png`` or ``.svg``, says how.

    Raises:
        StudyStoreError: when it is another suffix, or the file cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise StudyStoreError(f"{path}: expected a file that ends in .png or .svg")
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lstrip("."), dpi=150)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
    except OSError as error:
        raise StudyStoreError(f"{path}: {error.strerror}; give another folder with --figures") from error
    return path


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
