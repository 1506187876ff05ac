"""The learning curve of a training: a line of JSON for each checkpoint, or for each step."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.base.files import write_atomically


class LearningCurve:
    """``{"step", "loss", "seconds"}`` in each line; the loss is the mean since the line before.

    Args:
        path: of the file.
        write: whether this process writes.

    Attributes:
        begun: the losses of the line that is not written yet.
    """

    def __init__(self, path: Path, *, write: bool = True) -> None:
        self._path, self._write = path, write
        self.begun: list[float] = []

    def add(self, losses: list[float]) -> None:
        """Remember the losses of further steps."""
        self.begun.extend(losses)

    def write(self, step: int, seconds: float) -> None:
        """Write a line for the losses that were added since the last line."""
        mean = math.fsum(self.begun) / len(self.begun)
        self.begun = []
        if self._write:
            line = {"step": step, "loss": mean, "seconds": round(seconds, 3)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines after a step, and an unfinished line."""
        if not self._write or not self._path.exists():
            return
        kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_atomically(self._path, "".join(f"{line}\n" for line in kept).encode(), error=TrainingError)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
