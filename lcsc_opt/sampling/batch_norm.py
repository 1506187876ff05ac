"""Running statistics of batch normalization, estimated again with the merged weights.

The statistics are averages over what a network saw in training. A merge with negative coefficients may make variances
negative, and then the network gives NaN. So they are estimated from forward passes of the merged network, as in torch's
``swa_utils.update_bn``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcsc_opt.base.records import Noise
from lcsc_opt.sampling.base import Sampler

IMAGES, BATCH = 256, 16  # fixed, so that the same candidate has the same statistics in every evaluation
NOISE = Noise("batch-norm")  # no evaluation samples from this group


def merged_statistics(network: nn.Module, varying: Collection[str]) -> list[str]:
    """The names of the running statistics that differ between checkpoints, in the network's state dict."""
    names = _buffers(network)
    return [name for name in names if name in varying and name.endswith(("running_mean", "running_var"))]


class BatchNormStatistics:
    """Estimates the statistics of a sampler's network, each time after new weights.

    Args:
        sampler: samples with the network.
        network: the one that the merged weights are loaded into.
    """

    def __init__(self, sampler: Sampler, network: nn.Module) -> None:
        self._sampler, self._network = sampler, network

    @torch.no_grad()
    def estimate(self) -> None:
        """Sample :data:`IMAGES` images; plain averages over these become the statistics of each normalization."""
        modules = [module for _, module in _normalizations(self._network)]
        momenta = [module.momentum for module in modules]
        try:
            for module in modules:
                module.reset_running_stats()
                module.momentum = None  # the plain average over all calls
                module.train()
            for first in range(0, IMAGES, BATCH):
                self._sampler.sample(NOISE, first, first + BATCH)
        finally:
            for module, momentum in zip(modules, momenta, strict=True):
                module.momentum = momentum
                module.eval()

    def values(self) -> Mapping[str, Tensor]:
        """The statistics as they are now, on the CPU, by their names in the state dict."""
        state = self._network.state_dict()
        return {name: state[name].detach().cpu().clone() for name in sorted(_buffers(self._network))}

    def describe(self) -> dict[str, object]:
        """What decides the statistics, besides the weights and the sampler."""
        return {"images": IMAGES, "batch": BATCH}


def _normalizations(network: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for path, module in network.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            yield path, module


def _buffers(network: nn.Module) -> list[str]:
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in _normalizations(network)
        for name, _ in module.named_buffers(recurse=False)
    ]
