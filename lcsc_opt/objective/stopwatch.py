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
        seconds_of_stages = {f"{stage}_seconds": seconds for stage, seconds in self._seconds.items()}
        return Cost(images, model_calls, sum(seconds_of_stages.values()), **seconds_of_stages)
