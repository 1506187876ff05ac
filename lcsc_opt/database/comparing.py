"""How the studies of an experiment compare: EMA*, how far a loss is from it, and means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from lcsc_opt.database.history import HeldOut

EMA_GRID = "EMAGrid"


class Search(Protocol):
    """A study, read in full or in short."""

    @property
    def optimizer(self) -> str:
        """Its name."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the search is over."""
        ...

    @property
    def searched(self) -> float | None:
        """Lowest loss of the search."""
        ...

    @property
    def held_out_loss(self) -> float | None:
        """The answer's loss on held-out noise."""
        ...


Known = TypeVar("Known", bound=Search)


def best_ema(studies: Sequence[Known]) -> Known | None:
    """EMA*: of the finished EMA grids the one with the lowest held-out loss, else with the lowest searched one."""

    def rank(study: Known) -> tuple[float, float]:
        held_out = study.held_out_loss
        return (math.inf if held_out is None else held_out, study.searched or 0.0)

    grids = [study for study in studies if study.optimizer == EMA_GRID and study.ended and study.searched is not None]
    return min(grids, key=rank, default=None)


def mean_and_spread(values: Iterable[float | None]) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation, ``None`` of a single value, of what is known; ``None`` of nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def ema_beside(held_out: HeldOut | None, ema: HeldOut | None) -> float | None:
    """EMA*'s loss on the noise that ``held_out`` is of; ``None`` where it was not measured on that.

    Args:
        held_out: of a study.
        ema: of the EMA grid, whose own report may be of fewer images.
    """
    if held_out is None:
        return None
    if "EMA*" in held_out.baselines:
        return held_out.baselines["EMA*"]
    return ema.loss if ema is not None and ema.sample == held_out.sample else None


def relative(value: float | None, reference: float | None) -> float | None:
    """How far ``value`` is above ``reference``, as a share of it: -0.6 is 60 % below.

    ``None`` where one is not known, or the two have different signs: a share then means nothing.
    """
    if value is None or not reference or value * reference < 0:
        return None
    return (value - reference) / abs(reference)
