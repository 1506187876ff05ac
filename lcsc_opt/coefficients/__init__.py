"""The coefficients of a linear combination: profiles, spaces to search in, planes to draw."""

from lcsc_opt.coefficients.layer_groups import LayerGroups
from lcsc_opt.coefficients.profiles import (
    check_coefficients,
    check_steps,
    close_sum,
    default_origin,
    effective_count,
    ema_coefficients,
    normalize,
    power_ema_coefficients,
    sum_abs,
    window_ema_rates,
)
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace, ConvexSpace, PrincipalSpace

__all__ = [
    "AffineSpace",
    "CoefficientSpace",
    "ConvexSpace",
    "LayerGroups",
    "PrincipalSpace",
    "check_coefficients",
    "check_steps",
    "close_sum",
    "default_origin",
    "effective_count",
    "ema_coefficients",
    "normalize",
    "power_ema_coefficients",
    "sum_abs",
    "window_ema_rates",
]
