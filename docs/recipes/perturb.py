"""``Perturb``: an optimizer as small as one can be. The recipe "Add an optimizer" of CONTRIBUTING.md."""

from __future__ import annotations

from typing import Any

import nevergrad as ng
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer

from lcsc_opt.base.settings import Positive
from lcsc_opt.coefficients.profiles import normalize


class _Perturb(Optimizer):  # type: ignore[misc]
    """One running search; :class:`Perturb` configures it."""

    def __init__(self, *, config: Perturb, **options: Any) -> None:
        super().__init__(**options)
        self._options = config.config()

    def _internal_ask_candidate(self) -> ng.p.Parameter:
        best = self.recommend().value  # [K] coefficients, or [S, K]
        noise = self._rng.standard_normal(best.shape)
        return self.parametrization.spawn_child(new_value=normalize(best + self._options["mutation"] * noise))


class Perturb(ConfiguredOptimizer):  # type: ignore[misc]
    """Gaussian noise on the best so far.

    Args:
        mutation: its standard deviation on each coefficient.
    """

    def __init__(self, *, mutation: Positive = 0.005) -> None:
        super().__init__(_Perturb, locals(), as_config=True)
