"""A plain loop that trains a small network in this process."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.base.progress import progress


def descend(
    loss: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    description: str,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Minimize a loss in this process; an interrupted descent begins again.

    Args:
        loss: index of a step → its scalar.
        optimizer: the optimizer of the parameters.
        steps: how many.
        description: what the progress bar says.
        schedule: the schedule of the learning rate; stepped with the optimizer.
        after: called after each step with how many are done, for example to save the parameters.

    Raises:
        TrainingError: a loss is not finite.
    """
    # the caller may compute without gradients
    with progress(description, steps) as advance, torch.enable_grad():
        for step in range(steps):
            value = loss(step)
            number = float(value.detach())
            if not math.isfinite(number):
                raise TrainingError(f"{description}: the loss of step {step + 1} is {number}; lower the learning rate")
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if after is not None:
                after(step + 1)
            advance(note=f"loss {number:.4g}")


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread while this is open: gradients are sums over threads, so it decides last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
