# ruff: noqa: D102, ARG002 - the methods are those of every objective
"""An objective with stages and a gradient for searches on a cluster; copied beside a study file, never imported here.

The loss is a sum over images of squares of differences from a target, so its gradient is exact.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from lcsc_opt.base.records import Candidate, Cost, Evaluation
from lcsc_opt.objective.contract import StagedObjective

STEPS = tuple(range(100, 1300, 100))
IMAGES = 12
PLACE = ("SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES")


class Squares(StagedObjective):
    """Takes ``seconds`` for its images. Writes into ``log`` the process, the node and the GPU that sample."""

    def __init__(self, seconds: float, log: str) -> None:
        self._seconds, self._log = seconds, log

    @property
    def steps(self) -> tuple[int, ...]:
        return STEPS

    @property
    def images_per_evaluation(self) -> int:
        return IMAGES

    def describe(self) -> dict[str, Any]:
        return {"squares": IMAGES}

    def why_no_gradient(self) -> str | None:
        return None

    def images_of(self, candidate: Candidate) -> int:
        return IMAGES if candidate.images is None else candidate.images

    def prepare(self, candidate: Candidate) -> np.ndarray:
        return candidate.coefficients

    def sample(
        self, candidate: Candidate, prepared: np.ndarray, first: int, last: int, *, gradient: bool = False
    ) -> Any:
        if self._log:
            with Path(self._log).open("a") as file:
                file.write(f"{os.getpid()} {' '.join(os.environ.get(name, '-') for name in PLACE)}\n")
        time.sleep(self._seconds * (last - first) / IMAGES)
        return float(np.square(_rows(first, last) @ prepared - 0.3).sum()), last - first

    def score(self, candidate: Candidate, parts: Any, *, gradient: bool = False) -> tuple[Evaluation, list[Any]]:
        images = sum(count for _, count in parts)
        loss = sum(total for total, _ in parts) / images
        return Evaluation(loss, {}, Cost(images=images)), [1 / images if gradient else None] * len(parts)

    def slope(self, candidate: Candidate, first: int, last: int, back: float) -> tuple[np.ndarray, Cost]:
        rows = _rows(first, last)
        return 2 * back * rows.T @ (rows @ candidate.coefficients - 0.3), Cost()


def _rows(first: int, last: int) -> np.ndarray:
    """``[n, K]``: the factor of each image for each checkpoint."""
    return np.cos(np.outer(np.arange(first, last) + 1.0, np.arange(len(STEPS)) + 0.5))


def build(settings: dict[str, Any]) -> Squares:
    """Settings: ``seconds`` of an evaluation, and ``log``."""
    return Squares(float(settings.get("seconds", 0.0)), str(settings.get("log", "")))
