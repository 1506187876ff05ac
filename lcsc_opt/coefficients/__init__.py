"""The coefficients of a linear combination: profiles, spaces to search in, planes to draw."""

from lcsc_opt.coefficients.profiles import (
    default_origin,
    ema_coefficients,
    normalize,
    power_ema_coefficients,
    window_ema_rates,
)
from lcsc_opt.coefficients.spaces import AffineSpace, CoefficientSpace, ConvexSpace

__all__ = [
    "AffineSpace",
    "CoefficientSpace",
    "ConvexSpace",
    "default_origin",
    "ema_coefficients",
    "normalize",
    "power_ema_coefficients",
    "window_ema_rates",
]
