"""Minibatch optimal transport: which noise belongs to which image (Pooladian et al. 2023; Tong et al. 2023, Alg. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrainingError


def optimal_coupling(noise: Tensor, images: Tensor) -> Tensor:
    """The noise in another order, so that the sum of the squared distances to its images is the smallest.

    With as many of one as of the other, all of equal mass, the optimal plan is a permutation.

    Args:
        noise: ``[N, ...]``.
        images: ``[N, ...]``.

    Returns:
        ``[N, ...]``: row i belongs to image i.

    Raises:
        TrainingError: POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise TrainingError(f"POT cannot be imported ({error}): pip install POT") from error
    cost = torch.cdist(images.flatten(1).double().cpu(), noise.flatten(1).double().cpu()) ** 2
    plan = ot.emd([], [], cost.numpy())  # empty weights: uniform ones
    return noise[torch.from_numpy(plan).argmax(1).to(noise.device)]
