"""The gradient in the merged weights, from that in the images or the score that were computed with them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.trajectory import Trajectory

HEADROOM = 4  # the largest gradient in a pixel is scaled below 2**-4, so that sums in half types do not overflow


def in_coefficients(
    weight_gradients: Mapping[str, Tensor], trajectory: Trajectory, coefficients: Coefficients
) -> Coefficients:
    """The gradient ``[K]`` or ``[S, K]`` in the coefficients, of their shape, from that in the merged weights.

    Raises:
        TrajectoryError: the gradients do not fit the trajectory.
    """
    product = trajectory.project(weight_gradients)
    if product.ndim > coefficients.ndim:
        product = product.sum(axis=0)  # a trajectory in rows, and coefficients that all rows share
    return product


class WeightGradient:
    """The gradient of one candidate's loss in each weight that it depends on, summed over batches.

    Nothing is written to the weights' ``.grad``. The gradient in the outputs is first scaled by a power of two, so that
    networks in half types do not round small numbers to zero. In wider types that changes no bit.

    Args:
        differentiable: makes the weights require gradients until it is closed, and returns them: name → leaf.

    Attributes:
        sums: name → gradient, of the leaf's shape. Leaves that no output depends on are missing.
    """

    def __init__(self, differentiable: contextlib.AbstractContextManager[Mapping[str, Tensor]]) -> None:
        self._open = contextlib.ExitStack()
        self._leaves = dict(self._open.enter_context(differentiable))
        self.sums: dict[str, Tensor] = {}

    def close(self) -> None:
        """Make the weights ordinary tensors again."""
        self._open.close()

    def add(self, outputs: Tensor, gradient: Tensor, *, lifts: Sequence[int] = (0,)) -> None:
        """Go back once through the graph of ``outputs``, and add to :attr:`sums`.

        Args:
            outputs: a batch of images ``[B, C, H, W]``, a score, or scores ``[n]``.
            gradient: of the loss in ``outputs``, of their shape and dtype.
            lifts: powers of two by which the gradient is scaled up further, the largest first: the first is taken with
                which no gradient overflows. A mean over many numbers inside of the network has gradients that half
                types would round to zero.

        Raises:
            ObjectiveError: the images have no graph.
        """
        if not self._leaves:  # no weight that has a gradient differs between checkpoints
            return
        if not outputs.requires_grad:
            raise ObjectiveError(
                "the sampler's images have no graph back to the weights; let it sample without no_grad, "
                "inference_mode, detach and numpy, or search without gradients"
            )
        exponent = math.frexp(float(gradient.abs().max()))[1] + HEADROOM  # of the largest gradient; frexp(0) has 0
        leaves = tuple(self._leaves.values())
        for lift in lifts:
            is_last = lift == lifts[-1]
            scaled = gradient * 2.0 ** (lift - exponent)
            gradients = cast(
                "Sequence[Tensor | None]",
                torch.autograd.grad(outputs, leaves, scaled, allow_unused=True, retain_graph=not is_last),
            )
            if is_last or all(part is None or bool(torch.isfinite(part).all()) for part in gradients):
                break
        scale = 2.0 ** (exponent - lift)
        for name, part in zip(self._leaves, gradients, strict=True):
            if part is None:  # no output depends on this leaf
                continue
            if name in self.sums:
                self.sums[name].add_(part, alpha=scale)
            else:
                # a half type could neither hold the sum of many batches nor the scale of a small gradient
                wide = torch.promote_types(part.dtype, torch.float32)
                self.sums[name] = part.to(wide) * scale
