"""The plain loop that trains small networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lcsc_opt.base.descent import descend
from lcsc_opt.base.errors import TrainingError


def test_a_plain_loop_descends_counts_and_stops_at_a_loss_that_is_not_finite() -> None:
    x, done = nn.Parameter(torch.tensor(3.0)), []
    optimizer = torch.optim.SGD([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=1)  # 0.05, then 0.1
    with torch.no_grad():
        descend(lambda _: x**2, optimizer, steps=3, description="test", schedule=schedule, after=done.append)
    assert float(x.detach()) == pytest.approx(3 * 0.9 * 0.8 * 0.8)
    assert done == [1, 2, 3]
    with pytest.raises(TrainingError, match="the loss of step 3 is nan"):
        descend(lambda step: x * (math.nan if step == 2 else 1), optimizer, steps=9, description="test")
