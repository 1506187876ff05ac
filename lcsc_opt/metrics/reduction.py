"""Features, batch by batch → count, mean and scatter, in float64 where the features are; no features are kept.

The sums are of deviations from the mean of the first batch, so that features far from the origin lose no digits, and
one correction at the end leads to the mean of all (the shifted data of Chan, Golub & LeVeque 1983)::

    Σ (x − mean)(x − mean)ᵀ = Σ (x − c)(x − c)ᵀ − s sᵀ / N,   s = Σ (x − c),   mean = c + s / N
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lcsc_opt.metrics.statistics import FeatureStatistics

BLOCK = 256  # rows of the scatter at once: above the diagonal is half of the work


class Reduction:
    """Takes features in batches of any size; holds ``[D, D]`` float64 on their device."""

    def __init__(self) -> None:
        self._count = 0
        self._origin, self._sum, self._scatter = (torch.empty(0) for _ in range(3))

    @torch.inference_mode(mode=False)  # its tensors could not be added to outside of it
    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """Take ``[B, D]`` of any floating-point type, all batches on one device. Waits for no device."""
        if not len(features):
            return
        here = features.to(double_device(features.device))
        if self._count == 0:
            self._origin = here.mean(dim=0, dtype=torch.float64)
            self._sum = torch.zeros_like(self._origin)
            self._scatter = self._origin.new_zeros(here.shape[1], here.shape[1])
        deviations = here - self._origin  # float64, since one of the two is
        self._sum += deviations.sum(dim=0)
        for start in range(0, here.shape[1], BLOCK):
            rows = deviations[:, start : start + BLOCK]
            self._scatter[start : start + BLOCK, start:].addmm_(rows.T, deviations[:, start:])
        self._count += len(features)

    def statistics(self) -> FeatureStatistics:
        """Count, mean and scatter of all features so far, of which there must be some; more can be added after."""
        scatter = torch.addr(_mirrored(self._scatter), self._sum, self._sum, alpha=-1 / self._count)
        mean = self._origin + self._sum / self._count
        return FeatureStatistics(self._count, mean.cpu().numpy(), scatter.cpu().numpy())


@functools.cache
def double_device(device: torch.device) -> torch.device:
    """``device`` where it computes in float64, and else the CPU: Apple's GPUs do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def _mirrored(upper: Tensor) -> Tensor:
    """``upper`` [D, D], of which only blocks from the diagonal on were written, with the others filled in."""
    for start in range(0, len(upper), BLOCK):
        stop = start + BLOCK
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper
