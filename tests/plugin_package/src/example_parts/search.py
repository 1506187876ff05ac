"""An optimizer, and a space of coefficients."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pydantic
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer

Floats = npt.NDArray[np.float64]


class _Perturb(Optimizer):  # type: ignore[misc]
    def __init__(
        self, parametrization: Any, budget: int | None = None, num_workers: int = 1, config: Perturb | None = None
    ) -> None:
        super().__init__(parametrization, budget=budget, num_workers=num_workers)
        self._config = config or Perturb()

    def _internal_ask_candidate(self) -> Any:
        best = self.recommend().value
        moved = best + self._config.mutation * self._rng.standard_normal(best.shape)
        return self.parametrization.spawn_child(new_value=moved / moved.sum(axis=-1, keepdims=True))


class Perturb(ConfiguredOptimizer):  # type: ignore[misc]
    """Gaussian noise on the best so far."""

    def __init__(self, *, mutation: Annotated[float, pydantic.Field(gt=0)] = 0.005) -> None:
        super().__init__(_Perturb, locals(), as_config=True)
        self.mutation = mutation


@dataclasses.dataclass(frozen=True, eq=False)
class TailSpace:
    """The coefficients of the last checkpoints only; the first of these takes what is left of the sum."""

    steps: tuple[int, ...]
    origin: Floats
    checkpoints: int = 2

    @property
    def shape(self) -> tuple[int, ...]:
        """``[d]`` or ``[S, d]``."""
        return (*self.origin.shape[:-1], self.checkpoints - 1)

    def to_coefficients(self, free: Floats) -> Floats:
        """``[d]`` → ``[K]``."""
        coefficients = self.origin.copy()
        count = free.shape[-1]
        coefficients[..., -count:] += free
        coefficients[..., -count - 1] = 1 - np.delete(coefficients, -count - 1, axis=-1).sum(axis=-1)
        return coefficients

    def to_free(self, coefficients: Floats) -> Floats:
        """``[K]`` → ``[d]``."""
        return np.asarray((coefficients - self.origin)[..., 1 - self.checkpoints :])

    def to_free_gradient(self, free: Floats, gradient: Floats) -> Floats:
        """``[K]`` → ``[d]``."""
        count = free.shape[-1]
        return np.asarray(gradient[..., -count:] - gradient[..., -count - 1, None])
