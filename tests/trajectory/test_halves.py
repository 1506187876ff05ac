"""Coefficients as sums of numbers of a half type."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcsc_opt.trajectory import halves


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_terms_hold_a_coefficient_to_22_bits_also_a_small_one(dtype: torch.dtype) -> None:
    sizes = 10.0 ** np.random.default_rng(0).uniform(-6, 2, (3, 400))
    coefficients = torch.from_numpy(sizes * np.random.default_rng(1).choice([-1.0, 1.0], sizes.shape))
    divided = halves.divided(coefficients, dtype)
    assert divided.dtype == dtype
    assert divided.shape == (halves.terms(dtype), 3, 400)
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    total = sum(term.double() * unit**number for number, term in enumerate(divided))
    assert bool(((total - coefficients).abs() <= 2.0**-22 * coefficients.abs() + 2.0**-36).all())
