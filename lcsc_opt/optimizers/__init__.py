"""Optimizers: a free vector in, the next free vector out. Importing this registers ours with Nevergrad."""

from lcsc_opt.base.machine import collector_resting
from lcsc_opt.base.reproducibility import seeded_generators

with collector_resting(), seeded_generators(0, "import"):  # nevergrad draws from them while it is imported
    import nevergrad  # noqa: F401

from lcsc_opt.optimizers.evolution import LCSC
from lcsc_opt.optimizers.gradient import LCSCGradient
from lcsc_opt.optimizers.grids import ProfileGrid
from lcsc_opt.optimizers.parametrization import (
    ask_with,
    attach_evaluation,
    candidate_of,
    coefficient_array,
    evaluation_of,
)
from lcsc_opt.optimizers.quadratic import LCSCQuadratic
from lcsc_opt.optimizers.registry import build_optimizer

__all__ = [
    "LCSC",
    "LCSCGradient",
    "LCSCQuadratic",
    "ProfileGrid",
    "ask_with",
    "attach_evaluation",
    "build_optimizer",
    "candidate_of",
    "coefficient_array",
    "evaluation_of",
]
