"""Optimizers: a free vector in, the next free vector out. Importing this registers ours with Nevergrad."""

from lcsc_opt.optimizers.evolution import LCSC
from lcsc_opt.optimizers.gradient import LCSCGradient
from lcsc_opt.optimizers.grids import (
    DecayGrid,
    EachCheckpoint,
    EMAGrid,
    GreedySoup,
    PlaneGrid,
    PowerEMAGrid,
    UniformGrid,
)
from lcsc_opt.optimizers.parametrization import (
    DEFAULT_STEP_SIZE,
    Request,
    attach_evaluation,
    attach_request,
    candidate_of,
    coefficient_array,
    evaluation_of,
    request_of,
    space_of,
)
from lcsc_opt.optimizers.quadratic import LCSCQuadratic
from lcsc_opt.optimizers.registry import OURS, asks_one_at_a_time, build_optimizer, configure, grid_size, needs_gradient

__all__ = [
    "DEFAULT_STEP_SIZE",
    "LCSC",
    "OURS",
    "DecayGrid",
    "EMAGrid",
    "EachCheckpoint",
    "GreedySoup",
    "LCSCGradient",
    "LCSCQuadratic",
    "PlaneGrid",
    "PowerEMAGrid",
    "Request",
    "UniformGrid",
    "asks_one_at_a_time",
    "attach_evaluation",
    "attach_request",
    "build_optimizer",
    "candidate_of",
    "coefficient_array",
    "configure",
    "evaluation_of",
    "grid_size",
    "needs_gradient",
    "request_of",
    "space_of",
]
