"""Coefficients as a Nevergrad parameter, whose free vector optimizers move; and checks of the optimizers' options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import nevergrad as ng
import numpy as np
import numpy.typing as npt
from nevergrad.parametrization._datalayers import ForwardableOperation

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.spaces import CoefficientSpace

DEFAULT_STEP_SIZE = 0.02
"""First spread of a coefficient. Nevergrad's own default, 1, leaves the region in which merged models can sample."""


class CoefficientLayer(ForwardableOperation):  # type: ignore[misc]
    """Shows a free vector ``[d]`` as the coefficients ``[K]`` of a space, in both directions.

    Nevergrad asks for the value of a candidate nine times, so the last value is kept.
    """

    def __init__(self, space: CoefficientSpace) -> None:
        super().__init__()
        self.space = space
        self._last: tuple[bytes, Coefficients] | None = None

    def forward(self, value: npt.NDArray[np.float64]) -> Coefficients:
        """``[d]`` → ``[K]``."""
        free = np.asarray(value, dtype=np.float64)
        key = free.tobytes()
        if self._last is None or self._last[0] != key:
            self._last = key, self.space.to_coefficients(free)
        return self._last[1].copy()

    def backward(self, value: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """``[K]`` → ``[d]``."""
        return self.space.to_free(np.asarray(value, dtype=np.float64))


def coefficient_array(
    space: CoefficientSpace, *, step_size: float = DEFAULT_STEP_SIZE, seed: int | None = None
) -> ng.p.Array:
    """A Nevergrad array whose value is ``[K]`` coefficients, for any optimizer of Nevergrad's registry.

    Args:
        space: which coefficients it reaches; the array starts at the space's origin.
        step_size: what every optimizer takes for one standard deviation of a coefficient.
        seed: of ``parametrization.random_state``, from which all of an optimizer's randomness comes.

    Raises:
        StudySpecError: ``step_size`` is not a finite number above 0.
    """
    check_positive("step_size", step_size)
    array = ng.p.Array(shape=(space.dimension,))
    array.set_mutation(sigma=float(step_size))
    array.add_layer(CoefficientLayer(space))
    if seed is not None:
        array.random_state = np.random.RandomState(seed)
    return array


def space_of(parametrization: ng.p.Parameter) -> CoefficientSpace | None:
    """The space behind a parameter made by :func:`coefficient_array`; ``None`` for a plain array."""
    layers = CoefficientLayer.filter_from(parametrization)
    return layers[0].space if layers else None


def steps_of(parametrization: ng.p.Parameter, steps: Sequence[int] | None) -> tuple[int, ...]:
    """The checkpoints' training steps: as given, else of the space, else 1 to K for a plain array ``[K]``.

    Raises:
        StudySpecError: the parameter is not a vector, or does not have as many coefficients as steps.
    """
    value = parametrization.value
    if not isinstance(value, np.ndarray) or value.ndim != 1:
        raise StudySpecError("expected a parametrization that is one vector of coefficients, ng.p.Array(shape=(K,))")
    space = space_of(parametrization)
    if steps is None:
        steps = tuple(range(1, len(value) + 1)) if space is None else space.steps
    if len(steps) != len(value):
        raise StudySpecError(f"steps: expected {len(value)}, one per coefficient, got {len(steps)}")
    return tuple(steps)


def check(valid: bool, name: str, expected: str, value: object) -> None:
    """Raise ``StudySpecError``, ``name: expected …, got …``, unless an option is valid."""
    if not valid:
        raise StudySpecError(f"{name}: expected {expected}, got {value!r}")


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Check that an option is a whole number from ``least``."""
    check(is_whole(value) and value >= least, name, f"a whole number from {least}", value)


def check_positive(name: str, value: Any) -> None:
    """Check that an option is a finite number above 0."""
    check(is_number(value) and value > 0, name, "a number above 0", value)


def check_numbers(name: str, values: Any) -> None:
    """Check that an option is a list of numbers, or ``None`` for the default."""
    listed = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    check(values is None or (listed and all(map(is_number, values))), name, "a list of numbers", values)


def is_number(value: object) -> bool:
    """Whether a value is a finite number; ``True`` is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; ``True`` is none."""
    return isinstance(value, int) and not isinstance(value, bool)
