"""Three-point brackets: how ``LCSCGradient`` searches tuned numbers that images have no derivative in.

Each check of the average is followed by one plain evaluation for each such number: the same average, with this number a
little higher or lower. Both have the noise of the search, so their losses compare, however small the difference is.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque

import numpy as np
import numpy.typing as npt

from lcsc_opt.coefficients.tuning import RANGE, TunedSpace

_Point = npt.NDArray[np.float64]

_FIRST_WIDTH = RANGE / 4
_LEAST_WIDTH = RANGE / 64  # the best number moves with the coefficients, so brackets never close


@dataclasses.dataclass(frozen=True)
class Probe:
    """One number of a checked average, moved.

    Attributes:
        check: the uid of the check.
        point: ``[K + m]``, what is evaluated.
        index: which of the m numbers is moved.
        distance: by how much it is moved, in units of a point; negative if it is lowered.
    """

    check: str
    point: _Point
    index: int
    distance: float


class Bracket:
    """A number, and how much higher the loss is on both sides of it.

    A better side becomes the number. With two worse sides, the number moves to the vertex of the parabola through all
    three, and the sides come nearer.

    Attributes:
        center: the number, in units of a point.
    """

    def __init__(self, center: float) -> None:
        self.center = center
        self._width = _FIRST_WIDTH
        self._rises: dict[int, tuple[float, float]] = {}  # direction → distance and rise of the loss

    def next_distance(self) -> float:
        """The signed distance to the side whose loss is not known; the upper one first. Zero at a bound."""
        direction = -1 if 1 in self._rises else 1
        side = min(max(0.0, self.center + direction * self._width), RANGE)
        return side - self.center

    def tell(self, distance: float, rise: float) -> None:
        """The loss at the side of :meth:`next_distance` minus the loss at the number; infinite if it failed."""
        direction = -1 if 1 in self._rises else 1
        if rise < 0:
            self.center += distance
            self._rises = {-direction: (abs(distance), -rise)}
            return
        self._rises[direction] = (abs(distance), rise)
        if len(self._rises) == 2:
            self.center += _vertex(*self._rises[-1], *self._rises[1])
            self._width = max(self._width / 2, _LEAST_WIDTH)
            self._rises = {}


def _vertex(below: float, rise_below: float, above: float, rise_above: float) -> float:
    """Where the parabola through (−below, rise_below), (0, 0) and (above, rise_above) is lowest, with no rise below 0.

    It is in the nearer halves of both sides; 0 if a side is beyond a bound or failed, or all three are equal.
    """
    if not math.isfinite(rise_below + rise_above):
        return 0.0
    curvature = rise_above * below + rise_below * above
    if curvature == 0:
        return 0.0
    return (rise_below * above**2 - rise_above * below**2) / (2 * curvature)


class Brackets:
    """The brackets of all numbers without a derivative. Its state comes from what it is told.

    Args:
        space: of the points.
        point: ``[K + m]``, where the numbers begin.
    """

    def __init__(self, space: TunedSpace, point: _Point) -> None:
        self._space = space
        units = space.units_of(point).tolist()
        self._brackets: dict[int, Bracket] = {}
        for index, number in enumerate(space.numbers):
            if not number.differentiable:
                self._brackets[index] = Bracket(units[index])
        self._check = ""
        self._check_loss: float | None = None
        self._to_ask: deque[Probe] = deque()

    def begin(self, check: str, point: _Point) -> None:
        """Probe around ``point``, which a check evaluates; probes of an earlier check are not compared any more."""
        self._check = check
        self._check_loss = None
        self._to_ask.clear()
        for index, bracket in self._brackets.items():
            distance = bracket.next_distance()
            while distance == 0:  # beyond a bound nothing is better
                bracket.tell(distance, math.inf)
                distance = bracket.next_distance()
            probed = point.copy()
            self._space.units_of(probed)[index] = bracket.center + distance
            self._to_ask.append(Probe(check, probed, index, distance))

    def next(self) -> Probe | None:
        """The next probe of the last check; ``None`` when all were asked."""
        if not self._to_ask:
            return None
        return self._to_ask.popleft()

    def tell_check(self, check: str, loss: float | None) -> None:
        """The loss of a check; ``None`` if it failed."""
        if check == self._check:
            self._check_loss = loss

    def tell(self, probe: Probe, loss: float | None) -> float | None:
        """The loss of a probe, ``None`` if it failed → where its number is now, if the probe compares."""
        bracket = self._brackets[probe.index]
        if probe.check != self._check or self._check_loss is None:
            return None
        rise = math.inf
        if loss is not None:
            rise = loss - self._check_loss
        bracket.tell(probe.distance, rise)
        return bracket.center
