"""Names to optimizers: ours, and everything in Nevergrad's registry as it is."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nevergrad as ng
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.base.settings import near_miss
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.plane import LANDSCAPE
from lcsc_opt.coefficients.spaces import CoefficientSpace
from lcsc_opt.optimizers.evolution import LCSC
from lcsc_opt.optimizers.gradient import LCSCGradient
from lcsc_opt.optimizers.grids import EMAGrid, Landscape, PowerEMAGrid
from lcsc_opt.optimizers.parametrization import DEFAULT_STEP_SIZE, check_positive, coefficient_array
from lcsc_opt.optimizers.quadratic import LCSCQuadratic

OURS: dict[str, Callable[..., ConfiguredOptimizer]] = {
    "LCSC": LCSC,
    "LCSCGradient": LCSCGradient,
    "LCSCQuadratic": LCSCQuadratic,
    "EMAGrid": EMAGrid,
    "PowerEMAGrid": PowerEMAGrid,
    LANDSCAPE: Landscape,
}

# Nevergrad registers some optimizers without their settings; these have them
_CONFIGURABLE: dict[str, Callable[..., ConfiguredOptimizer]] = {"CMA": ng.families.ParametrizedCMA}

_STEP_SIZE = "step_size"  # the one option that every optimizer of Nevergrad's has here


def register() -> None:
    """Put ours, with their defaults, into Nevergrad's registry under their names."""
    with warnings.catch_warnings():  # pycma's, without matplotlib; Nevergrad imports it later
        warnings.simplefilter("ignore", UserWarning)
        importlib.import_module("cma")
    for name, configure in OURS.items():
        if name not in ng.optimizers.registry:
            configure().set_name(name, register=True)


def starts_by_itself(name: str) -> bool:
    """Whether an optimizer begins at the origin of its space, or needs no beginning, as grids do."""
    return name in OURS and name != "LCSC"


def build_optimizer(
    spec: OptimizerSpec, space: CoefficientSpace, *, budget: int | None, workers: int, seed: int
) -> Optimizer:
    """A fresh optimizer over the coefficients of ``space``.

    Args:
        spec: its name in Nevergrad's registry and its options.
        space: what it searches.
        budget: evaluations; some of Nevergrad's optimizers plan by it.
        workers: how many candidates may be evaluated at once.
        seed: of the study; the optimizer's random numbers are derived from it.

    Raises:
        StudySpecError: an unknown optimizer or option, which the message names; or several workers for an optimizer of
            Nevergrad's that searches with one only.
    """
    if workers > 1 and cannot_ask_ahead(spec):
        raise StudySpecError(
            f"{spec.name}: asks one candidate at a time, got {workers} workers; give it workers: 1, or, where the "
            "objective makes images, spread: images"
        )
    configured, step_size = configure(spec)
    array = coefficient_array(space, step_size=step_size, seed=derive_seed(seed, "optimizer", spec.name, bits=32))
    try:
        return configured(array, budget=budget, num_workers=workers)
    except (ValueError, TypeError, AssertionError) as error:
        raise StudySpecError(f"{spec.name}: {error}") from error


def configure(spec: OptimizerSpec) -> tuple[Any, float]:
    """The optimizer with its options, to be called with a parametrization, and its step size.

    Raises:
        StudySpecError: an unknown optimizer or option; the message names it.
    """
    options = dict(spec.options)
    if spec.name in OURS:
        return _configure(spec.name, OURS[spec.name], options), DEFAULT_STEP_SIZE
    step_size: Any = options.pop(_STEP_SIZE, DEFAULT_STEP_SIZE)
    check_positive(f"optimizers.{spec.name}.{_STEP_SIZE}", step_size)
    return _from_nevergrad(spec.name, options), float(step_size)


def grid_size(spec: OptimizerSpec, steps: Sequence[int]) -> int | None:
    """How many candidates a grid has over checkpoints of these ``[K]`` steps; ``None`` of an optimizer that is no grid.

    Raises:
        StudySpecError: an unknown optimizer or option; the message names it.
    """
    profiles = getattr(configure(spec)[0], "profiles", None)
    return None if profiles is None else len(profiles(tuple(steps)))


def needs_gradient(spec: OptimizerSpec) -> bool:
    """Whether an optimizer can search only objectives that give gradients."""
    return _says(spec, "needs_gradient")


def asks_one_at_a_time(spec: OptimizerSpec) -> bool:
    """Whether an optimizer's next candidate is of little use before the last loss was told.

    More workers are then better used by spreading each candidate's images over them. Nevergrad's sequential optimizers
    say so themselves, and cannot be built for several workers.
    """
    return cannot_ask_ahead(spec) or _says(spec, "asks_one_at_a_time")


def cannot_ask_ahead(spec: OptimizerSpec) -> bool:
    """Whether an optimizer of Nevergrad refuses to be asked again before it is told."""
    return _says(spec, "no_parallelization")


def _says(spec: OptimizerSpec, attribute: str) -> bool:
    """Whether an optimizer, or whatever it configures, has this attribute set."""
    layer, _ = configure(spec)
    while not getattr(layer, attribute, False):
        if (inner := getattr(layer, "_OptimizerClass", None)) is None:
            return False
        layer = inner
    return True


def _from_nevergrad(name: str, options: dict[str, Any]) -> Any:
    known = ng.optimizers.registry
    if name not in known:
        raise StudySpecError(
            f"optimizers.{name}: no such optimizer{near_miss(name, list(known))}; "
            f"ours are {', '.join(OURS)}, and any name of Nevergrad's registry will do"
        )
    entry = known[name]
    if not options:
        return entry
    if name in _CONFIGURABLE:
        return _configure(name, _CONFIGURABLE[name], options)
    if not isinstance(entry, ConfiguredOptimizer):
        raise _no_such_option(name, next(iter(options)), [_STEP_SIZE])
    return _configure(name, type(entry), options, defaults=entry.config())


def _configure(
    name: str,
    factory: Callable[..., ConfiguredOptimizer],
    options: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
) -> ConfiguredOptimizer:
    allowed = [parameter for parameter in inspect.signature(factory).parameters if parameter != "steps"]
    listed = allowed if name in OURS else [*allowed, _STEP_SIZE]
    for option in options:
        if option not in allowed:
            raise _no_such_option(name, option, listed)
    try:
        return factory(**{**(defaults or {}), **options})
    except StudySpecError as error:
        raise StudySpecError(f"optimizers.{name}.{error}") from error
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        reason = str(error) or "it does not take these options"
        raise StudySpecError(f"optimizers.{name}: {reason}") from error


def _no_such_option(name: str, option: str, known: Sequence[str]) -> StudySpecError:
    guess = near_miss(option, known)
    return StudySpecError(f"optimizers.{name}.{option}: no such option{guess}; it has {', '.join(known)}")
