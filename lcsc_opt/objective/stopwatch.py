"""The wall-clock seconds of the stages of one evaluation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

from lcsc_opt.base.records import Cost

Stage = Literal["merge", "sample", "features", "metric"]


class Stopwatch:
    """Adds up the time of each stage."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = {"merge": 0.0, "sample": 0.0, "features": 0.0, "metric": 0.0}

    @contextlib.contextmanager
    def timing(self, stage: Stage) -> Iterator[None]:
        """Count the time while this is open for a stage."""
        start = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - start

    def cost(self, *, images: int = 0, model_calls: int = 0) -> Cost:
        """The seconds of each stage, and of all together."""
        return Cost(
            images=images,
            model_calls=model_calls,
            seconds=sum(self._seconds.values()),
            merge_seconds=self._seconds["merge"],
            sample_seconds=self._seconds["sample"],
            features_seconds=self._seconds["features"],
            metric_seconds=self._seconds["metric"],
        )
