"""Coefficients as a Nevergrad parameter, whose free vector optimizers move; requests; and checks of options.

Nevergrad's ask and tell carry a candidate and a number. An optimizer that wants other noise, fewer images or a gradient
attaches a :class:`Request` to the candidate that it asks, and finds the whole evaluation there when it is told.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import nevergrad as ng
import numpy as np
import numpy.typing as npt
from nevergrad.parametrization._datalayers import ForwardableOperation

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.records import SEARCH, Candidate, Coefficients, Evaluation, Noise
from lcsc_opt.coefficients.spaces import CoefficientSpace

DEFAULT_STEP_SIZE = 0.02
"""First spread of a coefficient. Nevergrad's own default, 1, leaves the region in which merged models can sample."""

_REQUEST, _EVALUATION = "lcsc_request", "lcsc_evaluation"  # in a candidate's metadata, where optimizers keep theirs


class _CoefficientLayer(ForwardableOperation):  # type: ignore[misc]
    """Shows a free vector ``[d]`` as the coefficients ``[K]`` of a space (``[S, K]``, if it has rows), and back.

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
    """A Nevergrad array whose value is ``[K]`` or ``[S, K]`` coefficients, for any optimizer of Nevergrad's registry.

    Args:
        space: which coefficients it reaches; the array starts at the space's origin.
        step_size: what every optimizer takes for one standard deviation of a coefficient.
        seed: of ``parametrization.random_state``, from which all of an optimizer's randomness comes.

    Raises:
        StudySpecError: ``step_size`` is not a finite number above 0.
    """
    check_number("step_size", step_size, above=0)
    array = ng.p.Array(shape=space.shape)
    array.set_mutation(sigma=float(step_size))
    array.add_layer(_CoefficientLayer(space))
    if seed is not None:
        array.random_state = np.random.RandomState(seed)
    return array


def space_of(parametrization: ng.p.Parameter) -> CoefficientSpace | None:
    """The space behind a parameter made by :func:`coefficient_array`; ``None`` for a plain array."""
    layers = _CoefficientLayer.filter_from(parametrization)
    return layers[0].space if layers else None


def steps_of(parametrization: ng.p.Parameter, steps: Sequence[int] | None) -> tuple[int, ...]:
    """The checkpoints' training steps: as given, else of the space, else 1 to K for a plain array ``[K]``.

    Raises:
        StudySpecError: the parameter is not a vector, or does not have as many coefficients as steps.
    """
    value = parametrization.value
    space = space_of(parametrization)
    if not isinstance(value, np.ndarray) or (space is None and value.ndim != 1):
        raise StudySpecError("expected a parametrization that is one vector of coefficients, ng.p.Array(shape=(K,))")
    count = value.shape[-1]
    if steps is None:
        steps = tuple(range(1, count + 1)) if space is None else space.steps
    if len(steps) != count:
        raise StudySpecError(f"steps: expected {count}, one per coefficient, got {len(steps)}")
    return tuple(steps)


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Check that an option is a finite number, or a whole one, between limits of which some may be ``None``.

    Raises:
        StudySpecError: it is none; ``True`` is no number.
    """
    valid = _is_number(value) and (not whole or isinstance(value, int))
    valid = valid and (least is None or value >= least) and (above is None or value > above)
    valid = valid and (most is None or value <= most) and (below is None or value < below)
    if not valid:
        low = f" from {least}" if above is None else f" above {above}"
        joint = " and at most" if least is None else " to"
        high = f"{joint} {most}" if most is not None else "" if below is None else f" and below {below}"
        raise StudySpecError(f"{name}: expected a {'whole ' * whole}number{low}{high}, got {value!r}")


def check_numbers(name: str, values: Any) -> None:
    """Check that an option is a list of finite numbers, or ``None`` for the default.

    Raises:
        StudySpecError: it is neither.
    """
    listed = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if values is not None and not (listed and all(map(_is_number, values))):
        raise StudySpecError(f"{name}: expected a list of numbers, got {values!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Request:
    """How a candidate is to be evaluated.

    Attributes:
        images: how many; ``None`` leaves it to the objective's settings.
        noise: which group of noise.
        gradient: whether the gradient of the loss in the coefficients is wanted, too.
        keep_weight: the weight of the kept metric in that gradient; ``None`` uses the penalty of the loss.
    """

    images: int | None = None
    noise: Noise = SEARCH
    gradient: bool = False
    keep_weight: float | None = None

    def compares(self, images: int | None = None) -> bool:
        """Whether its loss compares with others: on the search's noise, with as many images as plain evaluations have.

        Args:
            images: of a plain evaluation, where known: a request for exactly that many compares, too.
        """
        return self.images in (None, images) and self.noise == SEARCH


def attach_request(parameter: ng.p.Parameter, request: Request) -> None:
    """Say how a candidate is to be evaluated, before it is asked."""
    parameter._meta[_REQUEST] = request


def request_of(parameter: ng.p.Parameter) -> Request:
    """How a candidate is to be evaluated; plainly if its optimizer said nothing."""
    request: Request = parameter._meta.get(_REQUEST, Request())
    return request


def candidate_of(parameter: ng.p.Parameter) -> Candidate:
    """What an optimizer asked, for an objective: ``objective.evaluate(candidate_of(optimizer.ask()))``."""
    request = request_of(parameter)
    coefficients = np.asarray(parameter.value, dtype=np.float64)
    return Candidate(coefficients, request.images, request.noise, request.keep_weight)


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
