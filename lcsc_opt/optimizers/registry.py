"""Names to optimizers: ours, and everything in Nevergrad's registry as it is."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import nevergrad as ng
import pydantic
from nevergrad.optimization.base import ConfiguredOptimizer, Optimizer

from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.base.settings import FrozenModel, near_miss, parse_settings
from lcsc_opt.base.study_file import OptimizerSpec
from lcsc_opt.coefficients.plane import LANDSCAPE
from lcsc_opt.coefficients.spaces import CoefficientSpace
from lcsc_opt.optimizers import grids
from lcsc_opt.optimizers.evolution import LCSC
from lcsc_opt.optimizers.gradient import LCSCGradient
from lcsc_opt.optimizers.parametrization import DEFAULT_STEP_SIZE, Positive, coefficient_array
from lcsc_opt.optimizers.quadratic import LCSCQuadratic

OURS: dict[str, Callable[..., ConfiguredOptimizer]] = {
    "LCSC": LCSC,
    "LCSCGradient": LCSCGradient,
    "LCSCQuadratic": LCSCQuadratic,
    "EMAGrid": grids.EMAGrid,
    "PowerEMAGrid": grids.PowerEMAGrid,
    "UniformGrid": grids.UniformGrid,
    "DecayGrid": grids.DecayGrid,
    "EachCheckpoint": grids.EachCheckpoint,
    "GreedySoup": grids.GreedySoup,
    LANDSCAPE: grids.PlaneGrid,
}

_STEP_SIZE = "step_size"  # the one option that every optimizer of Nevergrad's has here
_StepSize = pydantic.create_model("_StepSize", __base__=FrozenModel, step_size=(Positive, DEFAULT_STEP_SIZE))


with warnings.catch_warnings():  # pycma's, without matplotlib; Nevergrad imports it later
    warnings.simplefilter("ignore", UserWarning)
    importlib.import_module("cma")
for _name, _configured in OURS.items():  # with their defaults; a second import replaces those of the first
    ng.optimizers.registry[_name] = _configured().set_name(_name)


def build_optimizer(
    spec: OptimizerSpec, space: CoefficientSpace, *, budget: int | None, workers: int, seed: int
) -> Optimizer:
    """A fresh optimizer over the coefficients of ``space``.

    Some of Nevergrad's optimizers plan by the ``budget``, in evaluations. ``workers`` candidates may be evaluated at
    once. Random numbers are derived from the study's ``seed``.

    Raises:
        StudySpecError: an unknown optimizer or option, which the message names; or several workers for an optimizer of
            Nevergrad's that searches with one only.
    """
    if workers > 1 and asks_one_at_a_time(spec, strictly=True):
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
        signature = inspect.signature(OURS[spec.name], eval_str=True).parameters.values()
        allowed: dict[str, Any] = {one.name: (one.annotation, one.default) for one in signature}
        model = pydantic.create_model(spec.name, __base__=FrozenModel, **allowed)
        parse_settings(model, options, source=f"optimizers.{spec.name}")
        return OURS[spec.name](**options), DEFAULT_STEP_SIZE
    given = {_STEP_SIZE: options.pop(_STEP_SIZE)} if _STEP_SIZE in options else {}
    step_size: Any = dict(parse_settings(_StepSize, given, source=f"optimizers.{spec.name}"))[_STEP_SIZE]
    known = ng.optimizers.registry
    if spec.name not in known:
        raise StudySpecError(
            f"optimizers.{spec.name}: no such optimizer{near_miss(spec.name, list(known))}; "
            f"ours are {', '.join(OURS)}, and any name of Nevergrad's registry will do"
        )
    entry, factory = known[spec.name], None
    if spec.name == "CMA":  # which Nevergrad registers without its settings
        factory = ng.families.ParametrizedCMA
    elif isinstance(entry, ConfiguredOptimizer):
        factory, options = type(entry), {**entry.config(), **options} if options else options
    names = [*(inspect.signature(factory).parameters if factory else ()), _STEP_SIZE]
    for option in options:
        if option not in names:
            no_such = f"no such option{near_miss(option, names)}; it has {', '.join(names)}"
            raise StudySpecError(f"optimizers.{spec.name}.{option}: {no_such}")
    if factory is not None and options:
        try:
            entry = factory(**options)
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            reason = str(error) or "it does not take these options"
            raise StudySpecError(f"optimizers.{spec.name}: {reason}") from error
    return entry, float(step_size)


def needs_gradient(spec: OptimizerSpec) -> bool:
    """Whether an optimizer can search only objectives that give gradients."""
    return _says(spec, "needs_gradient")


def asks_one_at_a_time(spec: OptimizerSpec, *, strictly: bool = False) -> bool:
    """Whether an optimizer's next candidate is of little use before the last loss was told.

    More workers are then better used by spreading each candidate's images over them. Nevergrad's sequential optimizers
    refuse to be asked again before they are told, and cannot be built for several workers; ``strictly`` is only these.
    """
    return _says(spec, "no_parallelization") or (not strictly and _says(spec, "asks_one_at_a_time"))


def _says(spec: OptimizerSpec, attribute: str) -> bool:
    """Whether an optimizer, or whatever it configures, has this attribute set."""
    layer, _ = configure(spec)
    while not getattr(layer, attribute, False):
        if (inner := getattr(layer, "_OptimizerClass", None)) is None:
            return False
        layer = inner
    return True
