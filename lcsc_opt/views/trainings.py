"""Trainings of ``lcsc train``: their learning curves and samples, read from their files.

The files of ``NAME.trajectory`` are ``NAME.jsonl``, ``NAME.samples/stepN.png`` and ``NAME.model/training.json``. Each
may be half-written, since a training may be running.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import time
from pathlib import Path

import plotly.graph_objects as go

from lcsc_opt.views.artifacts import read_png
from lcsc_opt.views.figures.panels import Axis, Panel, draw
from lcsc_opt.views.figures.theme import BLUE, Theme

_SHEET = re.compile(r"step(\d{1,12})\.png")
_CURVE_SUFFIX = ".jsonl"
ALIVE_SECONDS = 900.0  # after so long without a new line, a training does not count as running


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a learning curve: the mean loss since the line before, and the seconds of training until then."""

    step: int
    loss: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class TrainingHistory:
    """A training as its files show it now.

    Attributes:
        name: the name of the training.
        place: the trajectory's path without its suffix.
        recipe: the recipe's name.
        data: the name of the training images.
        total: how many steps were asked for.
        lines: of the curve.
        sheets: the steps that have samples.
        running: whether a line was written lately, and the last step is not reached.
    """

    name: str
    place: Path
    recipe: str
    data: str
    total: int
    lines: tuple[Line, ...]
    sheets: tuple[int, ...]
    running: bool

    @staticmethod
    def find(folder: Path) -> dict[str, TrainingHistory]:
        """Name → training, of those in this folder or one level below, newest last."""
        trainings: list[tuple[float, str, TrainingHistory]] = []
        for curve in (*folder.glob(f"*{_CURVE_SUFFIX}"), *folder.glob(f"*/*{_CURVE_SUFFIX}")):
            # a file may be deleted meanwhile, and others than a training's may have this suffix
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                changed = curve.stat().st_mtime
                training = _read(folder, curve, changed)
                trainings.append((changed, training.name, training))
        trainings.sort(key=lambda entry: entry[:2])
        return {name: training for _, name, training in trainings}

    @property
    def headline(self) -> str:
        """The training's progress, in one line."""
        title = f"{self.name}: {self.recipe} on {self.data}"
        if not self.lines:
            return f"{title}, {self.total:,} steps; no checkpoint yet"
        last = self.lines[-1]
        progress = f"{title}, step {last.step:,} of {self.total:,}, loss {last.loss:.4g}"
        is_finished = last.step >= self.total
        if not is_finished and not self.running:
            return f"{progress}: stopped; --resume continues it"
        if is_finished:
            progress += ": finished"
        if last.step > 0 and last.seconds > 0:
            rate = last.step / last.seconds
            progress += f", {rate:.3g} steps a second"
            if not is_finished:
                progress += f", {(self.total - last.step) / rate:,.0f} s left"
        return progress

    def sheet(self, step: int) -> bytes | None:
        """The samples of a step as a PNG; ``None`` if there are none, or :func:`read_png` refuses them."""
        path = _sheets(self.place).get(step)
        if path is None:
            return None
        return read_png(path)

    def figure(self, theme: Theme) -> go.Figure:
        """The loss against the step; logarithmic if all losses are above zero."""
        curve = go.Scatter(
            x=[line.step for line in self.lines],
            y=[line.loss for line in self.lines],
            mode="lines",
            name=self.recipe,
            line={"color": BLUE, "width": 1.5},
            hovertemplate="step %{x:,}<br>loss %{y:.4g}<extra></extra>",
        )
        is_positive = all(line.loss > 0 for line in self.lines)
        panel = Panel([curve], y=Axis("mean loss since the checkpoint before", logarithmic=is_positive))
        x = Axis("training step", options={"range": [0, self.total]})
        return draw([panel], x=x, theme=theme, view=self.name)


def _read(folder: Path, curve: Path, changed: float) -> TrainingHistory:
    """The training of a curve that was last written then; raises where nothing valid describes it."""
    place = curve.with_name(curve.name.removesuffix(_CURVE_SUFFIX))
    description = json.loads((place.with_name(f"{place.name}.model") / "training.json").read_text(encoding="utf-8"))
    total = int(description["steps"])
    lines = _lines(curve)
    is_finished = bool(lines) and lines[-1].step >= total
    return TrainingHistory(
        name=str(place.relative_to(folder)),
        place=place,
        recipe=str(description["recipe"]),
        data=str(description["data"]),
        total=total,
        lines=tuple(lines),
        sheets=tuple(sorted(_sheets(place))),
        running=time.time() - changed < ALIVE_SECONDS and not is_finished,
    )


def _lines(curve: Path) -> list[Line]:
    """The valid lines of a curve; the last one may be half-written."""
    lines = []
    for text in curve.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
            content = json.loads(text)
            line = Line(int(content["step"]), float(content["loss"]), float(content["seconds"]))
            if math.isfinite(line.loss) and math.isfinite(line.seconds):
                lines.append(line)
    return lines


def _sheets(place: Path) -> dict[int, Path]:
    """Step → the file of its samples."""
    try:
        files = list(place.with_name(f"{place.name}.samples").iterdir())
    except OSError:
        return {}
    sheets = {}
    for file in files:
        match = _SHEET.fullmatch(file.name)
        if match is not None:
            sheets[int(match[1])] = file
    return sheets
