"""Optimizers by name: ours, and everything in Nevergrad's registry."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import nevergrad as ng
import numpy as np
import pydantic
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.base.settings import FrozenModel, check_options, excerpt, near_miss, parse_settings
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.plane import LANDSCAPE
from lcsc_opt.coefficients.spaces import CoefficientSpace
from lcsc_opt.optimizers.evolution import LCSC
from lcsc_opt.optimizers.gradient import LCSCGradient
from lcsc_opt.optimizers.grids import PlaneGrid, ProfileGrid
from lcsc_opt.optimizers.parametrization import DEFAULT_STEP_SIZE, Positive, coefficient_array
from lcsc_opt.optimizers.quadratic import LCSCQuadratic

OURS: dict[str, Callable[..., ConfiguredOptimizer]] = {
    "LCSC": LCSC,
    "LCSCGradient": LCSCGradient,
    "LCSCQuadratic": LCSCQuadratic,
    "EMAGrid": functools.partial(ProfileGrid, "ema"),
    "Grid": ProfileGrid,
    LANDSCAPE: PlaneGrid,
}

_STEP_SIZE = "step_size"  # an option that we add to every optimizer of Nevergrad's
_StepSize = pydantic.create_model("_StepSize", __base__=FrozenModel, step_size=(Positive, DEFAULT_STEP_SIZE))

# Options are checked by a short search. Fifty candidates are more than one generation of most
# optimizers (CMA 12, DE 30, PSO 40): some options are used only when the second one is made.
_CHECK_DIMENSION = 20
_CHECK_ASKS = 50


with warnings.catch_warnings():  # pycma warns where matplotlib is missing; Nevergrad would import it later
    warnings.simplefilter("ignore", UserWarning)
    importlib.import_module("cma")
for _name, _factory in OURS.items():  # importing this module again replaces them
    ng.optimizers.registry[_name] = _factory().set_name(_name)


def build_optimizer(
    spec: OptimizerSpec, space: CoefficientSpace, *, budget: int | None, workers: int, seed: int
) -> Optimizer:
    """A fresh optimizer over the coefficients of ``space``.

    Some of Nevergrad's optimizers plan by the ``budget``, in evaluations. ``workers`` candidates may be evaluated at
    once. Random numbers are derived from the study's ``seed``.

    Raises:
        StudySpecError: an unknown optimizer or option, which the message names; several workers for an optimizer of
            Nevergrad's that searches with one only; or a budget or space that does not suit it.
    """
    if workers > 1 and refuses_concurrent_asks(spec):
        raise StudySpecError(
            f"{spec.name}: asks one candidate at a time and cannot use {workers} workers; set workers: 1"
        )
    configured, step_size = configure(spec)
    array = coefficient_array(space, step_size=step_size, seed=derive_seed(seed, "optimizer", spec.name, bits=32))
    try:  # the options alone have been checked; together with these arguments they may be refused
        return configured(array, budget=budget, num_workers=workers)
    except (ValueError, TypeError, AssertionError) as error:
        raise StudySpecError(f"{spec.name}: {error}") from error


def configure(spec: OptimizerSpec) -> tuple[Any, float]:
    """The optimizer with its options, to be called with a parametrization, and its step size.

    The step size is an option of Nevergrad's optimizers; others have the default.

    Raises:
        StudySpecError: an unknown optimizer, or an option that is unknown or does not work; the message names it.
    """
    if spec.name in OURS:
        return _configured(OURS[spec.name], spec), DEFAULT_STEP_SIZE
    options = dict(spec.options)
    step_size_option = {}
    if _STEP_SIZE in options:
        step_size_option[_STEP_SIZE] = options.pop(_STEP_SIZE)
    settings: Any = parse_settings(_StepSize, step_size_option, source=f"optimizers.{spec.name}")
    return _configure_nevergrads(spec.name, options), float(settings.step_size)


def _configured(factory: Callable[..., ConfiguredOptimizer], spec: OptimizerSpec) -> ConfiguredOptimizer:
    """An optimizer with its options, which are checked against the annotations of its constructor."""
    check_options(factory, spec.options, source=f"optimizers.{spec.name}")
    return factory(**spec.options)


def _configure_nevergrads(name: str, options: Mapping[str, Any]) -> Any:
    """An optimizer of Nevergrad's registry, with options in place of those it is registered with."""
    registry = ng.optimizers.registry
    if name not in registry:
        raise StudySpecError(
            f"optimizers.{name}: no such optimizer{near_miss(name, registry)}; "
            f"ours are {', '.join(OURS)}, and any name of Nevergrad's registry will do"
        )
    family, defaults = _family_of(name)
    option_names = [_STEP_SIZE]  # which configure() has taken out of the options; here for the message
    if family is not None:
        option_names = [*inspect.signature(family).parameters, _STEP_SIZE]
    for option in options:
        if option not in option_names:
            hint = near_miss(option, option_names)
            raise StudySpecError(f"optimizers.{name}.{option}: no such option{hint}; it has {', '.join(option_names)}")
    if family is None or not options:
        return registry[name]
    options_json = json.dumps(options)  # hashable, for the cache of _check_options
    _check_options(name, options_json)
    merged_options = {**defaults, **json.loads(options_json)}  # what was checked: tuples are lists now
    return family(**merged_options)


def _family_of(name: str) -> tuple[Callable[..., Any] | None, dict[str, Any]]:
    """The class that configures a registered optimizer, if there is one, and the options it is registered with."""
    registered = ng.optimizers.registry[name]
    if name == "CMA":  # registered as a class without settings
        return ng.families.ParametrizedCMA, {}
    if isinstance(registered, ConfiguredOptimizer):
        return type(registered), registered.config()
    return None, {}


@functools.cache
def _check_options(name: str, options_json: str) -> None:
    """Refuse options with which a short search fails. Most of Nevergrad's optimizers use them unchecked.

    A study configures its optimizer a dozen times, and this costs 10 to 30 ms: it is cached, so the options are text.

    Raises:
        StudySpecError: with the option that alone makes the search fail, or else with the optimizer's name.
    """
    family, defaults = _family_of(name)
    assert family is not None  # others have no options
    options: dict[str, Any] = json.loads(options_json)
    joint_reason = _why_not(family, {**defaults, **options})
    if joint_reason is None:
        return
    for option, value in options.items():
        reason = _why_not(family, {**defaults, option: value})
        if reason is not None:
            if _expects_number(family, option) and not isinstance(value, (int, float)):
                raise StudySpecError(f"optimizers.{name}.{option}: expected a number, got {excerpt(value)}")
            raise StudySpecError(f"optimizers.{name}.{option}: {excerpt(value)} does not work ({reason})")
    raise StudySpecError(f"optimizers.{name}: these options do not work together ({joint_reason})")


def _expects_number(family: Callable[..., Any], option: str) -> bool:
    """Whether an option of Nevergrad's is annotated as a number."""
    return inspect.signature(family).parameters[option].annotation in (int, float, "int", "float")


def _why_not(family: Callable[..., Any], options: Mapping[str, Any]) -> str | None:
    """The error, on one line, that ends a short search with these options; ``None`` if there is none."""
    array = ng.p.Array(shape=(_CHECK_DIMENSION,))
    array.random_state = np.random.RandomState(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = family(**options)(array, budget=2 * _CHECK_ASKS, num_workers=1)
            for loss in range(_CHECK_ASKS):
                optimizer.tell(optimizer.ask(), float(loss))
    except Exception as error:  # whatever the code of an optimizer runs into
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def needs_gradient(spec: OptimizerSpec) -> bool:
    """Whether an optimizer can search only objectives that give gradients."""
    return _has_flag(spec, "needs_gradient")


def refuses_concurrent_asks(spec: OptimizerSpec) -> bool:
    """Whether an optimizer can be asked only once before it is told: Nevergrad's sequential ones.

    They cannot be built for several workers.
    """
    return _has_flag(spec, "no_parallelization")


def prefers_sequential_asks(spec: OptimizerSpec) -> bool:
    """Whether an optimizer's next candidate is of little use before the last loss was told.

    More workers are then better used by spreading each candidate's images over them.
    """
    return refuses_concurrent_asks(spec) or _has_flag(spec, "asks_one_at_a_time")


def _has_flag(spec: OptimizerSpec, attribute: str) -> bool:
    """Whether an optimizer has this attribute set, or any optimizer class that it wraps."""
    configured, _ = configure(spec)
    return any(getattr(layer, attribute, False) for layer in _layers(configured))


def _layers(configured: Any) -> Iterator[Any]:
    """A configured optimizer, and the optimizer classes that it wraps."""
    layer = configured
    while layer is not None:
        yield layer
        layer = getattr(layer, "_OptimizerClass", None)
