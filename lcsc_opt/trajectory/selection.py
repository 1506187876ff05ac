"""Which of a run's checkpoints take part: by their steps alone, before any weights are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lcsc_opt.base.errors import TrajectoryError

SHOWN_STEPS = 6


@dataclasses.dataclass(frozen=True)
class Selection:
    """Checkpoints of a window, an interval apart, as Liu et al. select them (Sec. 5.1 and App. B).

    Everything counts back from the last step n_K; what is ``None`` does not select. They are applied in this order:

    Attributes:
        first_step: leaves out what was saved before this step.
        window: n_K − n_1, in steps: leaves out what is further than this from the last step. The window of 40,000 with
            an interval of 100 is 401 checkpoints.
        interval: n_k − n_{k−1}, in steps: of the points n_K, n_K − interval, n_K − 2 · interval … that are not before
            the first step that is left, each keeps the nearest of the checkpoints to which it is the nearest point; of
            two that are as near, the later one. Where steps are multiples of a number that divides the interval
            this is (n_K − n) % interval = 0; a step that is off by one, or a last checkpoint between two
            regular ones, does not empty the selection.
        last: keeps this many, the last ones.

    Raises:
        TrajectoryError: a number that is not whole, or too small.
    """

    last: int | None = None
    first_step: int | None = None
    window: int | None = None
    interval: int | None = None

    def __post_init__(self) -> None:
        least = {"last": 2, "first_step": 0, "window": 1, "interval": 1}
        for name, value in self.given.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
                raise TrajectoryError(f"{name}: expected a whole number of at least {least[name]}, got {value!r}.")

    @property
    def given(self) -> dict[str, int]:
        """What selects, name → number."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def choose(self, steps: Sequence[int]) -> list[int]:
        """The positions in ``steps`` that are selected, in order.

        Args:
            steps: ``[K]``, increasing.

        Raises:
            TrajectoryError: fewer than two are left; the message says which steps there are.
        """
        if not steps:
            raise TrajectoryError("There is no checkpoint to select from.")
        final = steps[-1]
        first = steps[0] if self.first_step is None else self.first_step
        first = first if self.window is None else max(first, final - self.window)
        chosen = [position for position, step in enumerate(steps) if step >= first]
        if self.interval is not None:
            chosen = _on_grid(chosen, [final - steps[position] for position in chosen], self.interval)
        chosen = chosen if self.last is None else chosen[-self.last :]
        if len(chosen) < 2:
            raise TrajectoryError(
                f"{self._named()} {'leaves' if self.given else 'leave'} {len(chosen)} of {len(steps)} checkpoints and "
                f"a trajectory needs at least 2: there are {steps_in_words(steps)}."
            )
        return chosen

    def _named(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.given.items()) or "The files"


def _on_grid(positions: list[int], ages: list[int], interval: int) -> list[int]:
    """Of every multiple of ``interval`` the position whose age (n_K − n) is nearest to it."""
    nearest: dict[int, tuple[int, int]] = {}  # multiple → (how far, position)
    for position, age in zip(positions, ages, strict=True):
        point = min((2 * age + interval - 1) // (2 * interval), ages[0] // interval)  # halves go to the later point
        candidate = (abs(age - point * interval), -position)
        nearest[point] = min(nearest.get(point, candidate), candidate)
    return sorted(-position for _, position in nearest.values())


def steps_in_words(steps: Sequence[int]) -> str:
    """A list of steps for a message, however long it is."""
    if len(steps) <= SHOWN_STEPS:
        return f"step{'s' * (len(steps) != 1)} {', '.join(map(str, steps))}"
    return f"{len(steps)} steps {', '.join(map(str, steps[:3]))}, …, {steps[-1]}"
