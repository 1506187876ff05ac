"""The gradient in the merged weights, from that in the images or the score that were computed with them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.layer_groups import Rule

HEADROOM = 4  # the largest gradient in a pixel is scaled below 2**-4, so that sums in half types do not overflow

ONE: Coefficients = np.ones(1)
ONE.setflags(write=False)


class OneModel:
    """The weights of a single model in place of a trajectory: K is 1, and a merge gives the weights themselves.

    Args:
        weights: name → tensor, on the device of the sampler; they may change between evaluations.
        varying: the names of the tensors to differentiate in.

    Attributes:
        gradients: name → gradient from the last evaluation with one, of the tensor's shape. Tensors that no image
            depends on are missing.
    """

    steps = (0,)
    sha256 = ""
    touched = False
    layer_groups = None

    def __init__(self, weights: Mapping[str, Tensor], varying: frozenset[str]) -> None:
        self.weights = weights
        self.varying = varying
        self.gradients: Mapping[str, Tensor] = {}

    def in_rows(self, rule: Rule | None) -> OneModel:  # noqa: ARG002 - there is nothing to combine
        """Itself."""
        return self

    def verify(self) -> None:
        """Does nothing: there are no files that could be damaged."""

    def merge(self, coefficients: npt.ArrayLike | Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - there is only one
        """The weights themselves, not copies."""
        return dict(self.weights)

    def gram(self) -> npt.NDArray[np.float64]:
        """``[1, 1]``: one checkpoint is its own mean."""
        return np.zeros((1, 1))

    def project(self, gradients: Mapping[str, Tensor]) -> Coefficients:
        """Keep the gradient in the weights. Returns its length, ``[1]``, which is finite if the whole gradient is."""
        self.gradients = dict(gradients)
        if not self.gradients:
            return np.zeros(1)
        lengths = [torch.linalg.vector_norm(gradient).float() for gradient in self.gradients.values()]
        return np.array([float(torch.stack(lengths).norm())])


class WeightGradient:
    """The gradient of one candidate's images in each weight that they depend on, summed over batches.

    Nothing is written to the weights' ``.grad``. The gradient in the images is first scaled by a power of two, so that
    half types do not round small numbers to zero. In wider types that changes no bit.

    Args:
        differentiable: makes the weights require gradients until it is closed, and returns them: name → leaf.

    Attributes:
        sums: name → gradient, of the leaf's shape. Leaves that no image depends on are missing.
    """

    def __init__(self, differentiable: contextlib.AbstractContextManager[Mapping[str, Tensor]]) -> None:
        self._open = contextlib.ExitStack()
        self._leaves = dict(self._open.enter_context(differentiable))
        self.sums: dict[str, Tensor] = {}

    def close(self) -> None:
        """Make the weights ordinary tensors again."""
        self._open.close()

    def add(self, images: Tensor, gradient: Tensor) -> None:
        """Go back through the graph of ``images`` ``[B, C, H, W]`` once, from ``gradient``, of the same shape.

        Raises:
            ObjectiveError: the images have no graph.
        """
        if not self._leaves:
            return
        if not images.requires_grad:
            raise ObjectiveError(
                "the sampler's images have no graph back to the weights; let it sample without no_grad, "
                "inference_mode, detach and numpy, or search without gradients"
            )
        exponent = math.frexp(float(gradient.abs().max()))[1] + HEADROOM
        scaled = gradient.to(images.dtype) * 2.0**-exponent
        leaves = tuple(self._leaves.values())
        gradients = cast("Sequence[Tensor | None]", torch.autograd.grad(images, leaves, scaled, allow_unused=True))
        for name, part in zip(self._leaves, gradients, strict=True):
            if part is None:  # no image depends on this leaf
                continue
            if name in self.sums:
                self.sums[name].add_(part, alpha=2.0**exponent)
            else:
                wide = torch.promote_types(part.dtype, torch.float32)
                self.sums[name] = part.to(wide) * 2.0**exponent
