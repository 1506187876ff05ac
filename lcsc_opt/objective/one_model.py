"""One model where an objective expects checkpoints: evaluated as candidates are, with the gradient in its weights."""

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
    """Weights in a trajectory's place: the only coefficient is one, and a merge gives the weights themselves.

    Args:
        weights: name → tensor, on the device of the sampler; they may change between evaluations.
        varying: the names of those that a gradient is taken in.

    Attributes:
        gradients: name → gradient of the last evaluation that had one, of the tensor's shape; a tensor that no image
            depends on has none.
    """

    steps, sha256, touched = (0,), "", False

    def __init__(self, weights: Mapping[str, Tensor], varying: frozenset[str]) -> None:
        self.weights, self.varying = weights, varying
        self.gradients: Mapping[str, Tensor] = {}

    def verify(self) -> None:
        """Nothing is stored that could be damaged."""

    def merge(self, coefficients: npt.ArrayLike | Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - there is only one
        """The weights, no copies."""
        return dict(self.weights)

    def gram(self) -> npt.NDArray[np.float64]:
        """``[1, 1]``: one checkpoint is its own mean."""
        return np.zeros((1, 1))

    def project(self, gradients: Mapping[str, Tensor]) -> Coefficients:
        """Keep the gradient in the weights; gives its length, ``[1]``, which is finite where all of it is."""
        self.gradients = dict(gradients)
        lengths = [torch.linalg.vector_norm(part).float() for part in self.gradients.values()]
        return np.array([float(torch.stack(lengths).norm()) if lengths else 0.0])
