"""Small drawings for a notebook's cell, as SVG: they need no script, no network and no program that renders them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from lcsc_opt.database.history import Floats, SummarizedStudy
from lcsc_opt.views.curves import curves

_WIDTH = 360
_HEIGHT = 150
_LEFT = 8  # pixels around what is drawn
_TOP = 18
_COLOURS = ("#888888", "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")


def curves_svg(studies: Sequence[SummarizedStudy]) -> str:
    """The best loss so far over evaluations, a line for each optimizer, with its last value."""
    drawn = curves(studies, "evaluations")
    if not drawn:
        return ""
    values = [float(value) for curve in drawn for value in curve.mean if math.isfinite(value)]
    most = max(float(curve.positions[-1]) for curve in drawn)
    low = min(values)
    height = max(values) - low or 1.0
    shapes = []
    for index, curve in enumerate(drawn):
        colour = _COLOURS[index % len(_COLOURS)]
        points = []
        before = None
        for position, value in zip(curve.positions, curve.mean, strict=True):
            if not math.isfinite(value):
                continue
            x = _LEFT + position / (most or 1.0) * _WIDTH
            y = _TOP + (1 - (value - low) / height) * _HEIGHT
            if before is not None:
                points.append(f"{x:.1f},{before:.1f}")  # it stays until the next evaluation
            points.append(f"{x:.1f},{y:.1f}")
            before = y
        shapes.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        text = html.escape(f"{curve.label}: {float(curve.mean[-1]):.4g}")
        shapes.append(_text(_LEFT + _WIDTH + 10, _TOP + 14 + 18 * index, text, colour))
    shapes.append(_text(_LEFT, 12, f"best loss so far, over {most:.0f} evaluations"))
    return _svg(shapes)


def bars_svg(steps: Sequence[int], coefficients: Floats) -> str:
    """``[K]`` coefficients over training steps, as bars."""
    low = min(0.0, float(coefficients.min()))
    high = max(0.0, float(coefficients.max()))
    scale = _HEIGHT / ((high - low) or 1.0)
    zero = _TOP + high * scale
    width = _WIDTH / len(coefficients)
    shapes = [f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{zero:.1f}" y2="{zero:.1f}" stroke="#888888"/>']
    for index, coefficient in enumerate(coefficients):
        length = abs(float(coefficient)) * scale
        top = zero - length if coefficient > 0 else zero
        shapes.append(
            f'<rect x="{_LEFT + index * width:.1f}" y="{top:.1f}" width="{max(width - 1, 0.5):.1f}" '
            f'height="{length:.1f}" fill="{_COLOURS[1]}"/>'
        )
    title = f"coefficients, {low:.2g} to {high:.2g}, of the checkpoints at steps {steps[0]} to {steps[-1]}"
    return _svg([_text(_LEFT, 12, title), *shapes])


def _text(x: float, y: float, text: str, colour: str = "currentColor") -> str:
    return f'<text x="{x}" y="{y}" font-size="12" font-family="sans-serif" fill="{colour}">{text}</text>'


def _svg(shapes: Sequence[str]) -> str:
    width = _LEFT + _WIDTH + 220
    height = _TOP + _HEIGHT + 8
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">{"".join(shapes)}</svg>'
