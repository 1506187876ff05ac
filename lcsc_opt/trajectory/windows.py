"""Which checkpoints of a training belong to which mean, while its length is not known: numbers only.

A window is as many checkpoints as one row is the mean of, a power of two. All windows of a training have one size, and
there are ``means / 2`` to ``means`` of them: when all are full, the size doubles, and neighbours are merged in pairs.
So the size depends only on how many checkpoints were added, and a training that was killed and resumed has the same
windows as one that was not.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory.means import Interval


@dataclasses.dataclass
class Windows:
    """The checkpoints that were added to the means of a training.

    Attributes:
        means: the most full windows that there may be; even.
        additions: how many checkpoints were added.
        first: the step of the first checkpoint in the open window.
        before_last: the step of the last checkpoint but one.
        last: the step of the last checkpoint; -1 before the first one.
    """

    means: int
    additions: int = 0
    first: int = -1
    before_last: int = -1
    last: int = -1

    @classmethod
    def of_state(cls, state: object) -> Windows:
        """Windows out of the state of a training.

        Raises:
            TrajectoryError: it is not such a state.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        is_state = isinstance(state, Mapping) and state.keys() == names
        if not is_state or not all(isinstance(number, int) for number in state.values()):  # type: ignore[attr-defined]
            raise TrajectoryError("The state is not that of a writer of means: load what its state_dict() gave.")
        return cls(**state)  # type: ignore[arg-type]

    def state(self) -> dict[str, Any]:
        """Plain numbers, for :meth:`of_state`."""
        return dataclasses.asdict(self)

    @property
    def size(self) -> int:
        """How many checkpoints a full window has: the smallest power of two for which there are enough windows."""
        size = 1
        while self.additions > self.means * size:
            size *= 2
        return size

    @property
    def count(self) -> int:
        """How many checkpoints are in the open window, which may be full."""
        if self.additions == 0:
            return 0
        return (self.additions - 1) % self.size + 1

    @property
    def is_full(self) -> bool:
        """Whether the next checkpoint begins another window."""
        return self.additions > 0 and self.count == self.size

    @property
    def closed(self) -> int:
        """How many checkpoints are in the windows before the open one."""
        return self.additions - self.count

    @property
    def interval(self) -> Interval:
        """That of the open window."""
        return Interval(self.first, self.last, self.count)

    def add(self, step: int) -> None:
        """Add the checkpoint of ``step``."""
        if self.is_full or self.additions == 0:
            self.first = step
        self.additions += 1
        self.before_last = self.last
        self.last = step


def pair_to_merge(intervals: Sequence[Interval], size: int, before: float = math.inf) -> int | None:
    """The first of two neighbouring rows that are one window of at most ``size`` checkpoints; ``None`` if none are.

    Args:
        intervals: of all rows, from the first checkpoint.
        size: of a full window.
        before: only rows that end before this step are merged; a training that is resumed needs the others.
    """
    position = 0  # of the row's first checkpoint
    for row, (interval, following) in enumerate(itertools.pairwise(intervals)):
        count = interval.checkpoints
        # windows begin at multiples of their size: equal neighbours may be halves of two different windows
        is_pair = following.checkpoints == count and position % (2 * count) == 0
        if is_pair and 2 * count <= size and following.last_step < before:
            return row
        position += count
    return None
