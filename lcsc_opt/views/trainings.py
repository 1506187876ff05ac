"""Trainings of ``lcsc train``: their learning curves and samples, read from their files.

The files of ``NAME.trajectory`` are ``NAME.jsonl``, ``NAME.samples/stepN.png`` and ``NAME.model/training.json``. Each
may be half-written, since a training may be running.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import sqlalchemy as sa

from lcsc_opt.views.artifacts import MOST_BYTES, mimetype
from lcsc_opt.views.figures.look import BLUE, Theme, figure

_SHEET = re.compile(r"step(\d{1,12})\.png")
_CURVE, _DESCRIPTION = ".jsonl", "training.json"
_MOST_FILE = 64 * 2**20  # bytes of a curve; a line takes some 60
ALIVE_SECONDS = 120.0  # after so long without a new line, a training does not count as running
_ALIVE_GAPS = 3.0  # unless its lines are rare: after so many times the longest time between two of them


def looked_in(url: str) -> Path:
    """The folder whose trainings are shown: the database's, else the working directory."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return Path(str(parsed.database)).parent.absolute()
    return Path().absolute()


def find_trainings(folder: Path) -> dict[str, Path]:
    """Name → the trajectory's path without its suffix, of trainings in this folder or one level below, newest last."""
    found: dict[str, tuple[float, Path]] = {}
    for curve in (*folder.glob(f"*{_CURVE}"), *folder.glob(f"*/*{_CURVE}")):
        place = curve.with_name(curve.name.removesuffix(_CURVE))
        if not curve.is_symlink() and _description(place):
            found[str(place.relative_to(folder))] = (_changed(curve), place)
    return {name: found[name][1] for name in sorted(found, key=lambda name: (found[name][0], name))}


@dataclasses.dataclass(frozen=True)
class TrainingHistory:
    """A training as its files show it now.

    Attributes:
        name: of the training.
        recipe: the recipe's name.
        data: the name of the training images.
        total: how many steps were asked for.
        steps: the step of each line of the curve.
        losses: for each line, the mean loss since the line before.
        seconds: for each line, seconds of training until then.
        sheets: the steps that have samples.
        running: whether a line was written lately, for the time that lines take, and the last step is not reached.
    """

    name: str
    recipe: str
    data: str
    total: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    sheets: tuple[int, ...]
    running: bool

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


def read_training(name: str, place: Path) -> TrainingHistory | None:
    """Read a training; ``None`` if it is gone."""
    described = _description(place)
    if not described:
        return None
    curve = place.with_name(place.name + _CURVE)
    lines = _lines(curve)
    total = int(described["steps"])
    reached = bool(lines) and lines[-1][0] >= total
    seconds = tuple(seconds for _, _, seconds in lines)
    return TrainingHistory(
        name=name,
        recipe=str(described["recipe"]),
        data=str(described["data"]),
        total=total,
        steps=tuple(int(step) for step, _, _ in lines),
        losses=tuple(loss for _, loss, _ in lines),
        seconds=seconds,
        sheets=tuple(sorted(_sheets(place))),
        running=not reached and time.time() - _changed(curve) < _patience(seconds),
    )


def _patience(seconds: Sequence[float]) -> float:
    """How many seconds without a new line a training may be running."""
    longest = max((after - before for before, after in itertools.pairwise((0.0, *seconds))), default=0.0)
    return max(ALIVE_SECONDS, _ALIVE_GAPS * longest)


def read_sheet(place: Path, step: int) -> bytes | None:
    """The samples of a step as a PNG; ``None`` if there are none, or the file is no PNG, a link or too large."""
    path = _sheets(place).get(step)
    try:
        if path is None or path.is_symlink() or path.parent.is_symlink() or path.stat().st_size > MOST_BYTES:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    return content if mimetype(content) == "image/png" else None


def training_figure(training: TrainingHistory, theme: Theme) -> go.Figure:
    """The loss against the step; logarithmic if all losses are above zero."""
    drawn = figure(theme, name=training.name)
    drawn.add_scatter(
        x=list(training.steps),
        y=list(training.losses),
        mode="lines",
        name=training.recipe,
        line={"color": BLUE, "width": 1.5},
        hovertemplate="step %{x:,}<br>loss %{y:.4g}<extra></extra>",
    )
    drawn.update_xaxes(title_text="training step", range=[0, training.total])
    scale = "log" if all(loss > 0 for loss in training.losses) else "linear"
    drawn.update_yaxes(title_text="mean loss since the checkpoint before", type=scale)
    return drawn


def _description(place: Path) -> dict[str, Any] | None:
    """The content of ``training.json``; ``None`` if it is not valid."""
    try:
        content = json.loads(_text(place.with_name(f"{place.name}.model") / _DESCRIPTION))
    except ValueError:
        return None
    usable = (
        isinstance(content, dict) and {"recipe", "data"} <= content.keys() and isinstance(content.get("steps"), int)
    )
    return content if usable else None


def _lines(curve: Path) -> list[tuple[int, float, float]]:
    """Step, loss and seconds of each whole line."""
    found = []
    for line in _text(curve).splitlines():
        try:
            content = json.loads(line)
            step, loss, seconds = int(content["step"]), float(content["loss"]), float(content["seconds"])
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
        if math.isfinite(loss) and math.isfinite(seconds):
            found.append((step, loss, seconds))
    return found


def _sheets(place: Path) -> dict[int, Path]:
    try:
        entries = list(place.with_name(f"{place.name}.samples").iterdir())
    except OSError:
        return {}
    named = ((_SHEET.fullmatch(path.name), path) for path in entries)
    return {int(match[1]): path for match, path in named if match is not None}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.stat().st_size <= _MOST_FILE else ""
    except OSError:
        return ""


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
