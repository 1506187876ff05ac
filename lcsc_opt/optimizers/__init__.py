"""Optimizers: a free vector in, the next free vector out. Importing this registers ours with Nevergrad."""

from lcsc_opt.optimizers.evolution import LCSC
from lcsc_opt.optimizers.gradient import LCSCGradient
from lcsc_opt.optimizers.grids import EMAGrid, Landscape, PowerEMAGrid
from lcsc_opt.optimizers.parametrization import DEFAULT_STEP_SIZE, CoefficientLayer, coefficient_array, space_of
from lcsc_opt.optimizers.quadratic import LCSCQuadratic
from lcsc_opt.optimizers.registry import (
    OURS,
    asks_one_at_a_time,
    build_optimizer,
    cannot_ask_ahead,
    configure,
    grid_size,
    needs_gradient,
    register,
    starts_by_itself,
)
from lcsc_opt.optimizers.requests import (
    Request,
    attach_evaluation,
    attach_request,
    candidate_of,
    evaluation_of,
    request_of,
)

__all__ = [
    "DEFAULT_STEP_SIZE",
    "LCSC",
    "OURS",
    "CoefficientLayer",
    "EMAGrid",
    "LCSCGradient",
    "LCSCQuadratic",
    "Landscape",
    "PowerEMAGrid",
    "Request",
    "asks_one_at_a_time",
    "attach_evaluation",
    "attach_request",
    "build_optimizer",
    "candidate_of",
    "cannot_ask_ahead",
    "coefficient_array",
    "configure",
    "evaluation_of",
    "grid_size",
    "needs_gradient",
    "register",
    "request_of",
    "space_of",
    "starts_by_itself",
]

register()
