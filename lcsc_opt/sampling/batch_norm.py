"""Running statistics of batch normalization, estimated again with the merged weights.

The statistics are averages over what a network saw in training, and a merge with negative coefficients may be far from
what the merged network sees. So they are estimated from forward passes of the merged network, as in torch's
``swa_utils.update_bn``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcsc_opt.base.records import Noise
from lcsc_opt.sampling.base import DifferentiableSampler

# fixed, so that the same candidate has the same statistics in every evaluation
IMAGES = 256
BATCH = 16
NOISE = Noise("batch-norm")  # no evaluation samples from this group


class BatchNormStatistics:
    """Estimates the statistics of a network, each time after new weights.

    Args:
        network: merged weights are loaded into it.
        passes: sends data through the network; plain averages over all its calls become the statistics.
    """

    def __init__(self, network: nn.Module, passes: Callable[[], object]) -> None:
        self._network = network
        self._passes = passes
        self._modules: dict[str, _BatchNorm] = {}
        self._names: list[str] = []
        for path, module in network.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                self._modules[path] = module
                for name, _ in module.named_buffers(recurse=False):
                    self._names.append(f"{path}.{name}".lstrip("."))

    @classmethod
    def of_samples(cls, sampler: DifferentiableSampler) -> BatchNormStatistics:
        """From :data:`IMAGES` images that the network samples."""

        def passes() -> None:
            for first in range(0, IMAGES, BATCH):
                sampler.sample(NOISE, first, first + BATCH)

        return cls(sampler.weights.trained, passes)

    def merged(self, varying: Collection[str]) -> list[str]:
        """Those of the names ``varying`` that are running statistics, in the order of the network's state dict."""
        statistics = ("running_mean", "running_var")
        return [name for name in self._names if name in varying and name.endswith(statistics)]

    @torch.no_grad()
    def estimate(self) -> None:
        """Send the data through the network, whose normalizations use the statistics of each batch meanwhile."""
        momenta = {path: module.momentum for path, module in self._modules.items()}
        try:
            for module in self._modules.values():
                module.reset_running_stats()
                module.momentum = None  # the plain average over all calls
                module.train()
            self._passes()
        finally:
            for path, module in self._modules.items():
                module.momentum = momenta[path]
                module.eval()

    def values(self) -> Mapping[str, Tensor]:
        """The statistics as they are now, on the CPU, by their names in the state dict."""
        state = self._network.state_dict()
        return {name: state[name].detach().cpu().clone() for name in sorted(self._names)}
