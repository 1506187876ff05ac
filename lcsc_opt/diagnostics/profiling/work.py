"""Counts the floating-point operations of each part of an evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from lcsc_opt.base.records import Candidate, Coefficients
from lcsc_opt.base.spans import listening
from lcsc_opt.objective.contract import Objective

COUNTED_IMAGES = 16  # the work grows with images, and counting is slow


def operations_per_image(objective: Objective, coefficients: Coefficients, *, gradient: bool) -> Mapping[str, float]:
    """Name of a span → operations of matrix products, convolutions and attention for one image, backward ones too.

    Torch counts them in one small evaluation, without a compiler, which would change how the work is done but not its
    amount. A part without counted operations is left out.
    """
    images = min(COUNTED_IMAGES, objective.images_per_evaluation)
    candidate = Candidate(coefficients, images=images)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = cast("Any", _NoModules())
    sums: dict[str, float] = {}

    @contextlib.contextmanager
    def count(name: str) -> Iterator[None]:
        before = counter.get_total_flops()
        yield
        sums[name] = sums.get(name, 0.0) + counter.get_total_flops() - before

    with counter, torch.compiler.set_stance("force_eager"), listening(count):
        if gradient:
            objective.evaluate(candidate, gradient=True)
        else:
            objective.evaluate(candidate)
    return {name: operations / images for name, operations in sums.items() if operations}


class _NoModules(contextlib.AbstractContextManager["_NoModules"]):
    """Takes the place of torch's tracker of modules, whose hooks fail with gradients of chosen tensors."""

    parents = frozenset({"Global"})

    def __exit__(self, *_error: object) -> None:
        """Nothing was hooked."""
