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
from lcsc_opt.views.figures.look import BLUE, Theme, figure

_SHEET = re.compile(r"step(\d{1,12})\.png")
_CURVE = ".jsonl"
ALIVE_SECONDS = 900.0  # after so long without a new line, a training does not count as running


@dataclasses.dataclass(frozen=True)
class TrainingHistory:
    """A training as its files show it now.

    Attributes:
        name: of the training.
        place: the trajectory's path without its suffix.
        recipe: the recipe's name.
        data: the name of the training images.
        total: how many steps were asked for.
        steps: the step of each line of the curve.
        losses: for each line, the mean loss since the line before.
        seconds: for each line, seconds of training until then.
        sheets: the steps that have samples.
        running: whether a line was written lately, and the last step is not reached.
    """

    name: str
    place: Path
    recipe: str
    data: str
    total: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    sheets: tuple[int, ...]
    running: bool

    @staticmethod
    def find(folder: Path) -> dict[str, TrainingHistory]:
        """Name → training, of those in this folder or one level below, newest last."""
        found: list[tuple[float, TrainingHistory]] = []
        for curve in (*folder.glob(f"*{_CURVE}"), *folder.glob(f"*/*{_CURVE}")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it is gone, or of something else
                changed = curve.stat().st_mtime
                found.append((changed, _read(folder, curve, changed)))
        return {training.name: training for _, training in sorted(found, key=lambda pair: (pair[0], pair[1].name))}

    @property
    def headline(self) -> str:
        """The training's progress, in one line."""
        what = f"{self.name}: {self.recipe} on {self.data}"
        if not self.steps:
            return f"{what}, {self.total:,} steps; no checkpoint yet"
        done = f"{what}, step {self.steps[-1]:,} of {self.total:,}, loss {self.losses[-1]:.4g}"
        rate = self.steps[-1] / self.seconds[-1] if self.seconds[-1] > 0 else 0.0
        speed = f", {rate:.3g} steps a second" if rate else ""
        if self.steps[-1] >= self.total:
            return f"{done}: finished{speed}"
        left = f", {(self.total - self.steps[-1]) / rate:,.0f} s left" if rate and self.running else ""
        return f"{done}{speed}{left}" if self.running else f"{done}: stopped; --resume goes on"

    def sheet(self, step: int) -> bytes | None:
        """The samples of a step as a PNG; ``None`` if there are none, or they are none that may be read."""
        path = _sheets(self.place).get(step)
        return None if path is None else read_png(path)

    def figure(self, theme: Theme) -> go.Figure:
        """The loss against the step; logarithmic if all losses are above zero."""
        drawn = figure(theme, name=self.name)
        drawn.add_scatter(
            x=list(self.steps),
            y=list(self.losses),
            mode="lines",
            name=self.recipe,
            line={"color": BLUE, "width": 1.5},
            hovertemplate="step %{x:,}<br>loss %{y:.4g}<extra></extra>",
        )
        drawn.update_xaxes(title_text="training step", range=[0, self.total])
        scale = "log" if all(loss > 0 for loss in self.losses) else "linear"
        drawn.update_yaxes(title_text="mean loss since the checkpoint before", type=scale)
        return drawn


def _read(folder: Path, curve: Path, changed: float) -> TrainingHistory:
    """The training of a curve that was last written then; raises where nothing valid describes it."""
    place = curve.with_name(curve.name.removesuffix(_CURVE))
    described = json.loads((place.with_name(f"{place.name}.model") / "training.json").read_text(encoding="utf-8"))
    total, recipe, data = int(described["steps"]), str(described["recipe"]), str(described["data"])
    lines = []
    for line in curve.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):  # half a line
            content = json.loads(line)
            lines.append((int(content["step"]), float(content["loss"]), float(content["seconds"])))
    lines = [line for line in lines if math.isfinite(line[1]) and math.isfinite(line[2])]
    steps, losses, seconds = zip(*lines, strict=True) if lines else ((), (), ())
    running = time.time() - changed < ALIVE_SECONDS and not (steps and steps[-1] >= total)
    name, sheets = str(place.relative_to(folder)), tuple(sorted(_sheets(place)))
    return TrainingHistory(name, place, recipe, data, total, steps, losses, seconds, sheets, running)


def _sheets(place: Path) -> dict[int, Path]:
    try:
        entries = list(place.with_name(f"{place.name}.samples").iterdir())
    except OSError:
        return {}
    named = ((_SHEET.fullmatch(path.name), path) for path in entries)
    return {int(match[1]): path for match, path in named if match is not None}
