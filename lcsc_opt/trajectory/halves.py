"""Products of coefficients with columns of a half type, as exact as in float32, on devices that need no wider columns.

Reading is what a merge's time goes into, so columns that were widened first would take five times as long. Accelerators
multiply half types and sum in float32. Only the coefficients would be rounded, so each becomes a sum of two or three
numbers of the half type: with the bits of the type, u = 2^-bits, it is t0 + u t1 + u² t2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lcsc_opt.trajectory.tiles import Tile

_BITS = 22  # of a coefficient that are kept, at least: two terms of float16 have so many


def _unit(dtype: torch.dtype) -> float:
    """How much smaller each term is than the one before it: the largest error of rounding 1 to the dtype."""
    return torch.finfo(dtype).eps / 2


def terms(dtype: torch.dtype) -> int:
    """How many numbers of a half type a coefficient consists of: two of float16 (11 bits), three of bfloat16 (8)."""
    return math.ceil(_BITS / -math.log2(_unit(dtype)))


def divided(coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Coefficients ``[S, K]`` float64 as T terms ``[T, S, K]`` in the dtype, term t in units of u^t.

    Without these units later terms would be subnormal numbers of float16, which have fewer bits.
    """
    parts: list[Tensor] = []
    rest = coefficients
    for _ in range(terms(dtype)):
        part = rest.to(dtype)
        rest = (rest - part.double()) / _unit(dtype)
        parts.append(part)
    return torch.stack(parts)


def multiply(weights: Tensor, runs: Sequence[slice], tile: Tile, out: Tensor) -> None:
    """Write the product of one row of ``weights`` ``[T, S, slots]`` with a tile into ``out`` ``[n]``."""
    products: Tensor | None = None  # [T, n] float32
    for run in runs:
        of_run = torch.mm(weights[:, tile.rows[0], run], tile.columns[run], out_dtype=torch.float32)
        products = of_run if products is None else products.add_(of_run)
    assert products is not None
    total, *smaller = products
    for number, product in enumerate(smaller, start=1):
        is_last = number == len(smaller)  # only this sum is rounded to the dtype of ``out``
        torch.add(total, product, alpha=_unit(weights.dtype) ** number, out=out if is_last else total)
