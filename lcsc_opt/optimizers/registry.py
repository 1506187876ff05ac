"""Optimizers by name: ours, and everything in Nevergrad's registry."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import nevergrad as ng
import pydantic
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer

from lcsc_opt.base.errors import StudySpecError, one_line
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.base.settings import FrozenModel, Positive, check_options, excerpt, near_miss, parse_settings
from lcsc_opt.base.study_spec import OptimizerSpec
from lcsc_opt.coefficients.spaces import CoefficientSpace
from lcsc_opt.optimizers.evolution import LCSC
from lcsc_opt.optimizers.gradient import LCSCGradient
from lcsc_opt.optimizers.grids import PlaneGrid, ProfileGrid
from lcsc_opt.optimizers.parametrization import DEFAULT_STEP_SIZE, coefficient_array
from lcsc_opt.optimizers.quadratic import LCSCQuadratic

OURS: dict[str, Callable[..., ConfiguredOptimizer]] = {
    "LCSC": LCSC,
    "LCSCGradient": LCSCGradient,
    "LCSCQuadratic": LCSCQuadratic,
    "EMAGrid": functools.partial(ProfileGrid, "ema"),
    "Grid": ProfileGrid,
    "Landscape": PlaneGrid,
}

_STEP_SIZE = "step_size"  # an option that we add to every optimizer of Nevergrad's
_StepSize = pydantic.create_model("_StepSize", __base__=FrozenModel, step_size=(Positive, DEFAULT_STEP_SIZE))


with warnings.catch_warnings():  # pycma warns where matplotlib is missing; Nevergrad would import it later
    warnings.simplefilter("ignore", UserWarning)
    importlib.import_module("cma")
for _name, _factory in OURS.items():  # importing this module again replaces them
    ng.optimizers.registry[_name] = _factory().set_name(_name)


def build_optimizer(
    spec: OptimizerSpec, space: CoefficientSpace, *, budget: int | None, workers: int, seed: int
) -> Optimizer:
    """A fresh optimizer over the coefficients of ``space``.

    Some of Nevergrad's optimizers plan by the ``budget``, in evaluations; ``None`` if their number is not known.
    ``workers`` candidates may be evaluated at once. Random numbers are derived from the study's ``seed``.

    Raises:
        StudySpecError: an unknown optimizer or option, which the message names; several workers for an optimizer of
            Nevergrad's that searches with one only; or a budget or space that does not suit it.
    """
    configured = configure(spec)
    if workers > 1 and configured.refuses_concurrent_asks:
        raise StudySpecError(
            f"{spec.name}: asks one candidate at a time and cannot use {workers} workers; set workers: 1"
        )
    seed = derive_seed(seed, "optimizer", spec.name, bits=32)
    array = coefficient_array(space, step_size=configured.step_size, seed=seed)
    try:
        return configured.build(array, budget=budget, num_workers=workers)
    except (ValueError, TypeError, AssertionError) as error:  # so Nevergrad refuses a budget or a space
        raise StudySpecError(f"{spec.name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Configured:
    """An optimizer with its options.

    Attributes:
        build: makes the optimizer, from a parametrization.
        step_size: an option of Nevergrad's optimizers; others have the default.
        needs_gradient: it can search only objectives that give gradients.
        refuses_concurrent_asks: it can be asked only once before it is told, as Nevergrad's sequential ones, and cannot
            be built for several workers.
        prefers_sequential_asks: its next candidate is of little use before the last loss was told. More workers are
            then better used by spreading each candidate's images over them.
        points: of a grid: steps ``[K]`` → its candidates.
    """

    build: Any
    step_size: float
    needs_gradient: bool
    refuses_concurrent_asks: bool
    prefers_sequential_asks: bool
    points: Callable[[Sequence[int]], Sequence[Any]] | None

    def steps_of_check(self, check_images: int) -> tuple[float, int]:
        """How many steps along the gradient come before a check of so many images, in the mean, and the images of each.

        An optimizer that does not say it checks after each step.
        """
        says = getattr(self.build, "steps_of_check", None)
        if says is None:
            return 1.0, check_images
        steps: tuple[float, int] = says(check_images)
        return steps

    @property
    def round_steps(self) -> int | None:
        """How many steps its first round has, if the budget allows so many; ``None`` of optimizers without rounds."""
        return getattr(self.build, "round_steps", None)


def configure(spec: OptimizerSpec) -> Configured:
    """The optimizer of a specification, with its options.

    Raises:
        StudySpecError: an unknown optimizer, or an option that is unknown or does not work; the message names it.
    """
    # a mapping is no key of a cache; a name may be registered again
    return _configured(spec.name, json.dumps(spec.options), id(ng.optimizers.registry.get(spec.name)))


@functools.cache
def _configured(name: str, options_json: str, _: int) -> Configured:
    """The optimizer of this name in the registry with these options; the identity of its entry is only a cache key."""
    options: dict[str, Any] = json.loads(options_json)
    build, step_size = _with_options(name, options)
    layers = [*_layers(build)]

    def has_flag(attribute: str) -> bool:
        return any(getattr(layer, attribute, False) for layer in layers)

    refuses_concurrent_asks = has_flag("no_parallelization")
    return Configured(
        build,
        step_size,
        needs_gradient=has_flag("needs_gradient"),
        refuses_concurrent_asks=refuses_concurrent_asks,
        prefers_sequential_asks=refuses_concurrent_asks or has_flag("asks_one_at_a_time"),
        points=getattr(build, "points", None),
    )


def _with_options(name: str, given: Mapping[str, Any]) -> tuple[Any, float]:
    """What makes the optimizer, and its step size: the default for ours, whose own options say how far they go."""
    if name in OURS:
        check_options(OURS[name], given, source=f"optimizers.{name}")  # against the annotations of its constructor
        return OURS[name](**given), DEFAULT_STEP_SIZE
    step_size_option = {option: value for option, value in given.items() if option == _STEP_SIZE}
    options = {option: value for option, value in given.items() if option != _STEP_SIZE}
    settings: Any = parse_settings(_StepSize, step_size_option, source=f"optimizers.{name}")
    return _configure_nevergrads(name, options), float(settings.step_size)


def _configure_nevergrads(name: str, options: Mapping[str, Any]) -> Any:
    """An optimizer of Nevergrad's registry, with options in place of those it is registered with."""
    registry = ng.optimizers.registry
    if name not in registry:
        raise StudySpecError(
            f"optimizers.{name}: no such optimizer{near_miss(name, registry)}; "
            f"ours are {', '.join(OURS)}, and any name of Nevergrad's registry will do"
        )
    family, defaults = _family_of(name)
    parameters: Mapping[str, Any] = {} if family is None else inspect.signature(family).parameters
    option_names = [*parameters, _STEP_SIZE]  # which _with_options() has taken out; here for the message
    for option in options:
        if option not in option_names:
            hint = near_miss(option, option_names)
            raise StudySpecError(f"optimizers.{name}.{option}: no such option{hint}; it has {', '.join(option_names)}")
    if family is None or not options:
        return registry[name]
    # against the annotations of those that are given: others may be other optimizers, which no file holds
    with contextlib.suppress(pydantic.PydanticUserError):
        check_options(family, options, source=f"optimizers.{name}", positional=parameters.keys() - options.keys())
    try:
        return family(**{**defaults, **options})
    except Exception as error:  # whatever the code of an optimizer runs into
        raise StudySpecError(f"optimizers.{name}: {excerpt(options)} does not work: {one_line(error)}") from error


def _family_of(name: str) -> tuple[Callable[..., Any] | None, dict[str, Any]]:
    """The class that configures a registered optimizer, if there is one, and the options it is registered with."""
    registered = ng.optimizers.registry[name]
    if name == "CMA":  # registered as a class without settings; its family has them
        return ng.families.ParametrizedCMA, {}
    if isinstance(registered, ConfiguredOptimizer):
        return type(registered), registered.config()
    return None, {}


def _layers(configured: Any) -> Iterator[Any]:
    """A configured optimizer, and the optimizer classes that it wraps."""
    layer = configured
    while layer is not None:
        yield layer
        layer = getattr(layer, "_OptimizerClass", None)
