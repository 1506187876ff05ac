"""Coefficients as a Nevergrad parameter, whose free vector optimizers move; and how they are evaluated.

Nevergrad's ask and tell carry a candidate and a number. An optimizer that wants other noise, fewer images or a gradient
says so with :func:`ask_with` before it returns what it asks, and finds the whole evaluation there when it is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import nevergrad as ng
import numpy as np
import numpy.typing as npt
import pydantic
from nevergrad.parametrization._datalayers import ForwardableOperation

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import Candidate, Coefficients, Evaluation
from lcsc_opt.base.settings import Finite
from lcsc_opt.coefficients.profiles import close_sum, default_origin, exact_sum
from lcsc_opt.coefficients.spaces import CoefficientSpace

DEFAULT_STEP_SIZE = 0.02
"""First spread of a coefficient. Nevergrad's own default, 1, leaves the region in which merged models can sample."""

Numbers = Annotated[Sequence[Finite], pydantic.Field(min_length=1)]
"""The type of an option that lists numbers."""

# Keys of a candidate's metadata, where Nevergrad's optimizers also store theirs.
_ASKED_WITH = "lcsc_asked_with"
_EVALUATION = "lcsc_evaluation"

_SUM_TOLERANCE = 1e-9  # of the initial value of a plain array


class _CoefficientLayer(ForwardableOperation):  # type: ignore[misc]
    """Shows a free vector ``[d]`` as the coefficients ``[K]`` of a space (``[S, K]``, if it has rows), and back.

    Nevergrad reads the value of a candidate five times between its ask and its tell, so the last one is kept.
    """

    def __init__(self, space: CoefficientSpace) -> None:
        super().__init__()
        self.space = space
        self._last_free = b""
        self._last_coefficients: Coefficients | None = None

    def forward(self, value: npt.NDArray[np.float64]) -> Coefficients:
        """``[d]`` → ``[K]``."""
        free = np.asarray(value, dtype=np.float64)
        content = free.tobytes()
        if self._last_coefficients is None or content != self._last_free:
            self._last_free = content
            self._last_coefficients = self.space.to_coefficients(free)
        return np.asarray(self._last_coefficients.copy())  # a copy, which the caller may change

    def backward(self, value: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """``[K]`` → ``[d]``."""
        return self.space.to_free(np.asarray(value, dtype=np.float64))


def coefficient_array(
    space: CoefficientSpace, *, step_size: float = DEFAULT_STEP_SIZE, seed: int | None = None
) -> ng.p.Array:
    """A Nevergrad array whose value is ``[K]`` or ``[S, K]`` coefficients, for any optimizer of Nevergrad's registry.

    Args:
        space: which coefficients it reaches; the array starts at the space's origin.
        step_size: one standard deviation of a coefficient, for every optimizer.
        seed: the seed of ``parametrization.random_state``, from which all of an optimizer's randomness comes.
    """
    array = ng.p.Array(shape=space.shape)
    array.set_mutation(sigma=float(step_size))
    array.add_layer(_CoefficientLayer(space))
    if seed is not None:
        array.random_state = np.random.RandomState(seed)
    return array


def space_of(parametrization: ng.p.Parameter) -> CoefficientSpace | None:
    """The space behind a parameter made by :func:`coefficient_array`; ``None`` for a plain array."""
    layers: list[_CoefficientLayer] = _CoefficientLayer.filter_from(parametrization)
    if layers:
        return layers[0].space
    return None


def steps_of(parametrization: ng.p.Parameter) -> tuple[int, ...]:
    """The checkpoints' training steps: of the space, else 1 to K for a plain array ``[K]``.

    Raises:
        StudySpecError: the parameter is not a vector.
    """
    space = space_of(parametrization)
    if space is not None:
        return space.steps
    value = parametrization.value
    if not isinstance(value, np.ndarray) or value.ndim != 1:
        raise StudySpecError("expected a parametrization that is one vector of coefficients, ng.p.Array(shape=(K,))")
    return tuple(range(1, len(value) + 1))


def start_of(parametrization: ng.p.Parameter) -> Coefficients:
    """Where a search starts: coefficients ``[K]`` or ``[S, K]``, each row with a sum of one.

    It is the value of the parameter. A plain array whose value is all zero, Nevergrad's default, starts at the default
    origin.

    Raises:
        StudySpecError: the parameter is not a vector, or its value is neither zero nor sums to one.
    """
    steps = steps_of(parametrization)
    value = np.asarray(parametrization.value, dtype=np.float64)
    if space_of(parametrization) is not None:
        return value
    if not value.any():
        return default_origin(steps)
    total = exact_sum(value)
    if not abs(total - 1) <= _SUM_TOLERANCE:  # true of NaN, too
        raise StudySpecError(
            f"expected an array of coefficients whose initial values sum to one, or all zero, got a sum of {total:.6g}"
        )
    return close_sum(value)


def ask_with(parameter: ng.p.Parameter, candidate: Candidate) -> None:
    """Say how a parameter that is about to be asked is to be evaluated: as this candidate, but for its coefficients."""
    parameter._meta[_ASKED_WITH] = candidate


def candidate_of(parameter: ng.p.Parameter) -> Candidate:
    """What an optimizer asked, for an objective: ``objective.evaluate(candidate_of(optimizer.ask()))``.

    Nevergrad's own optimizers say nothing but coefficients, and get plain evaluations.
    """
    plain = Candidate(np.asarray(parameter.value, dtype=np.float64))
    asked: Candidate = parameter._meta.get(_ASKED_WITH, plain)
    return dataclasses.replace(asked, coefficients=plain.coefficients)


def attach_evaluation(parameter: ng.p.Parameter, evaluation: Evaluation | None) -> None:
    """Hand the whole evaluation to the optimizer that is told its loss next; ``None`` if it failed."""
    parameter._meta[_EVALUATION] = evaluation


def evaluation_of(parameter: ng.p.Parameter) -> Evaluation | None:
    """A candidate's evaluation; ``None`` if it failed, or if plain Nevergrad told only a loss."""
    evaluation: Evaluation | None = parameter._meta.get(_EVALUATION)
    return evaluation


def failed(parameter: ng.p.Parameter) -> bool:
    """Whether its evaluation failed; never with plain Nevergrad, which attaches no evaluation."""
    return _EVALUATION in parameter._meta and evaluation_of(parameter) is None
