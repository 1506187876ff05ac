"""In which range a sampler's images are: told by the quantiles of their values, and of those of real images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOOKED_AT = 64  # images, which say enough
_FEWEST_IMAGES = 4  # whose values are compared with those of real ones
_BYTES_ABOVE = 50.0  # images that reach this are assumed to be bytes
_NEAR = 0.2  # of 2, between black and white: images of a fair model, if they are in the range of the real ones
_MOST_NEGATIVE = 0.1  # of the brightest value: what a model that was trained in [0, 1] gives below it
_LEVELS = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, device="cpu")
_MOST_VALUES = 2**18


class ValueRange(NamedTuple):
    """What the values of some images tell.

    Attributes:
        is_known: whether further images would tell nothing else.
        problem: what is wrong with their range, as the end of a sentence; ``None`` if nothing is, as far as is known.
    """

    is_known: bool
    problem: str | None


def value_range(images: Tensor, real: Tensor | None) -> ValueRange:
    """Whether images are in [-1, 1], or in [0, 1] or [0, 255], whatever single values lie outside.

    Real images tell, as soon as a model is good enough for its own to be near them in one of the ranges. Without them
    the first images do: hardly a value is below zero.

    Args:
        images: ``[n, C, H, W]`` of any model, as it gives them.
        real: ``[M, C, H, W]`` real ones in [-1, 1]; ``None`` if there are none.
    """
    quantiles = _quantiles(images)
    low, high = float(quantiles[0]), float(quantiles[-1])
    in_bytes = high >= _BYTES_ABOVE
    conversion = "images / 127.5 - 1" if in_bytes else "2 * images - 1"
    if real is None or len(images) < _FEWEST_IMAGES:
        is_other = high > 0 and low > -_MOST_NEGATIVE * high and low < high
        is_known = real is None or is_other  # further images may tell more
        reason = "have hardly a value below 0"
    else:
        expected = _quantiles(real)
        converted = quantiles / 127.5 - 1 if in_bytes else 2 * quantiles - 1
        distance = float((quantiles - expected).abs().mean())
        distance_converted = float((converted - expected).abs().mean())
        is_other = distance_converted < min(distance / 2, _NEAR)
        is_known = is_other or distance < _NEAR
        reason = f"differ by {distance:.2g} from real ones in their values, converted by only {distance_converted:.2g}"
    if not is_other:
        return ValueRange(is_known, None)
    return ValueRange(is_known, f"{reason}; expected images in [-1, 1]: let it return {conversion}")


def _quantiles(images: Tensor) -> Tensor:
    """``[99]`` float64 on the CPU: the percentiles of the values of all channels."""
    values = images[:LOOKED_AT].detach().flatten()
    values = values[:: max(len(values) // _MOST_VALUES, 1)]
    ordered = values.cpu().double().sort().values
    return ordered[(_LEVELS * (len(ordered) - 1)).round().long()]
