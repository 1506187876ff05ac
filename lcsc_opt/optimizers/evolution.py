"""``LCSC``: the evolutionary search of Liu et al. 2024, Algorithm 1, as a Nevergrad optimizer.

What the paper leaves open (M_CP, how two parents are mixed, the size of the mutation and of a generation) are
settings; their defaults are ours, not the paper's. Mutations of 0.007 and 0.014 do equally well in the searches of
``benchmarks/optimizers.py``.
"""

from __future__ import annotations

import bisect
from collections import deque
from typing import Annotated, Any

import nevergrad as ng
import numpy as np
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer
from pydantic import Field

from lcsc_opt.base.records import Coefficients
from lcsc_opt.base.settings import Count, Positive
from lcsc_opt.coefficients.profiles import ema_profiles, normalize, window_ema_rates
from lcsc_opt.optimizers.parametrization import Numbers, steps_of

_SMALLEST_SUM = 0.1  # a child with a smaller sum is drawn again: the division would enlarge it more than tenfold


class _LCSC(Optimizer):  # type: ignore[misc]
    """One running search; :class:`LCSC` configures it."""

    def __init__(self, *, config: LCSC, **options: Any) -> None:
        super().__init__(**options)
        self._options = config.config()
        steps = steps_of(self.parametrization)
        rates = self._options["rates"] or window_ema_rates(steps)
        self._initial = [*ema_profiles(steps, rates)]  # line 2
        self._shape = self.parametrization.value.shape  # [K] or [S, K]
        self._to_ask = deque(self._initial)
        # P. Only its best M_CP members can ever be parents or the answer, so only these are kept in memory.
        self._population: list[tuple[float, int, Coefficients]] = []
        self._parents: list[Coefficients] = []  # CP
        self._children_left = 0

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        coefficients = self._to_ask.popleft() if self._to_ask else self._child()
        return self.parametrization.spawn_child(new_value=coefficients)

    def _internal_tell_candidate(self, candidate: ng.p.Parameter, loss: float) -> None:
        member = (loss, self.num_tell, candidate.value)  # of equal losses, the earlier one is better
        bisect.insort(self._population, member, key=lambda stored: stored[:2])
        del self._population[self._options["max_parents"] :]

    def _child(self) -> Coefficients:
        """Lines 7 to 10. The parents stay the same for one generation (lines 6 to 12)."""
        if not self._children_left:
            self._parents = [coefficients for _, _, coefficients in self._population]
            if not self._parents:  # several workers ask a child before the first loss is told
                self._parents = self._initial
            self._children_left = self._options["generation_size"]
        self._children_left -= 1
        child = self._unnormalized_child()
        while True:
            is_small = child.sum(axis=-1, keepdims=True) < _SMALLEST_SUM
            if not is_small.any():
                return normalize(child)  # line 10
            # row by row: among many rows one is nearly always small, and no child would ever be good
            child = np.where(is_small, self._unnormalized_child(), child)

    def _unnormalized_child(self) -> Coefficients:
        """Two parents mixed, or one of them, with Gaussian noise; of any sum."""
        rng: np.random.RandomState = self._rng
        first, second = (self._parents[int(i)] for i in rng.randint(len(self._parents), size=2))
        child = first
        if rng.random_sample() < self._options["crossover"]:  # mix both, coefficient by coefficient
            child = np.where(rng.random_sample(self._shape) < 0.5, first, second)
        mutated: Coefficients = child + self._options["mutation"] * rng.standard_normal(self._shape)
        return mutated


class LCSC(ConfiguredOptimizer):  # type: ignore[misc]
    """Algorithm 1 with its settings.

    Args:
        max_parents: M_CP, how many of the best are parents.
        mutation: standard deviation of the Gaussian noise on each coefficient.
        crossover: chance that a child's parents are mixed; otherwise it is a mutation of one of them.
        generation_size: children that share one set of parents; with 1, each child joins the population at once.
        rates: EMA rates per training step of the first population; by default the paper's seven (Table 10), or seven
            others that the window of checkpoints can tell apart.
    """

    def __init__(
        self,
        *,
        max_parents: Count = 3,
        mutation: Positive = 0.007,
        crossover: Annotated[float, Field(ge=0, le=1)] = 0.5,
        generation_size: Count = 1,
        rates: Numbers | None = None,
    ) -> None:
        super().__init__(_LCSC, locals(), as_config=True)
