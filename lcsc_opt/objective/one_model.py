"""A single model in place of a trajectory: what refining evaluates, whose weights change instead of coefficients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lcsc_opt.base.records import Coefficients
from lcsc_opt.coefficients.layer_groups import Rule

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
