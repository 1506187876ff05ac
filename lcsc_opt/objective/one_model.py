"""A single model in place of checkpoints: evaluated like a candidate, with the gradient in its weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.records import Coefficients

ONE: Coefficients = np.ones(1)
ONE.setflags(write=False)


class OneModel:
    """Weights in place of a trajectory: K is 1, and a merge gives the weights themselves.

    Args:
        weights: name → tensor, on the device of the sampler; they may change between evaluations.
        varying: the names of the tensors to take gradients in.

    Attributes:
        gradients: name → gradient from the last evaluation with one, of the tensor's shape. Tensors that no image
            depends on are missing.
    """

    steps, sha256, touched = (0,), "", False

    def __init__(self, weights: Mapping[str, Tensor], varying: frozenset[str]) -> None:
        self.weights, self.varying = weights, varying
        self.gradients: Mapping[str, Tensor] = {}

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
        lengths = [torch.linalg.vector_norm(part).float() for part in self.gradients.values()]
        return np.array([float(torch.stack(lengths).norm()) if lengths else 0.0])
