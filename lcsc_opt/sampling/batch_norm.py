"""Running statistics of batch normalization, estimated again with the merged weights.

The statistics are averages over what a network saw in training, and a merge with negative coefficients may be far from
what the merged network sees. So they are estimated from forward passes of the merged network, as in torch's
``swa_utils.update_bn``; but the variance is that of all passes together. A batch of a sampler has one time, and a batch
of a training all of them, so the variance between times is a part of what the network has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcsc_opt.base.accelerator import has_float64
from lcsc_opt.base.records import Noise
from lcsc_opt.sampling.base import DifferentiableSampler

# fixed, so that the same candidate has the same statistics in every evaluation
IMAGES = 256
BATCH = 16
NOISE = Noise("batch-norm")  # no evaluation samples from this group


class _Moments:
    """The mean and the variance of everything that a normalization has seen, by channel."""

    def __init__(self) -> None:
        self._calls = 0
        self._count = 0
        self._mean: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def add(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add what one call sees, ``inputs[0]`` ``[N, C, ...]``; a forward pre-hook, as torch calls it."""
        by_channel = inputs[0].transpose(0, 1).flatten(1)
        wide = by_channel.to(torch.promote_types(by_channel.dtype, torch.float32))
        moments = torch.stack(torch.var_mean(wide, dim=1, correction=0))
        if not has_float64(moments.device):
            moments = moments.cpu()
        variance, mean = moments.double()
        count = by_channel.shape[1]
        share = count / (self._count + count)  # of this call in the new averages
        self._mean = self._mean + share * (mean - self._mean)
        self._square = self._square + share * (variance + mean**2 - self._square)
        self._count += count
        self._calls += 1

    def write(self, module: _BatchNorm) -> None:
        """Make them the statistics of the normalization, unless it was not called."""
        if not isinstance(self._mean, Tensor):  # not called: it keeps what was merged
            return
        # unbiased, as the running variance of torch is
        variance = (self._square - self._mean**2) * self._count / max(self._count - 1, 1)
        for buffer, value in ((module.running_mean, self._mean), (module.running_var, variance)):
            assert buffer is not None  # since only modules that track statistics are here
            buffer.copy_(value)
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(self._calls)


class BatchNormStatistics:
    """Estimates the statistics of a network, each time after new weights.

    Args:
        network: merged weights are loaded into it.
        passes: sends data through the network; mean and variance of all its calls become the statistics.
    """

    def __init__(self, network: nn.Module, passes: Callable[[], object]) -> None:
        self._network = network
        self._passes = passes
        self._modules: list[_BatchNorm] = []
        self._names: list[str] = []
        for path, module in network.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                self._modules.append(module)
                for name, _ in module.named_buffers(recurse=False):
                    self._names.append(f"{path}.{name}".lstrip("."))

    @classmethod
    def of_samples(cls, sampler: DifferentiableSampler) -> BatchNormStatistics:
        """Estimates them, each time anew, from :data:`IMAGES` images that the network samples with its new weights."""

        def passes() -> None:
            for first in range(0, IMAGES, BATCH):
                sampler.sample(NOISE, first, first + BATCH)  # hooks see what passes; the images are not used

        return cls(sampler.weights.trained, passes)

    def merged(self, varying: Collection[str]) -> list[str]:
        """Those of the names ``varying`` that are running statistics, in the order of the network's state dict."""
        statistics = ("running_mean", "running_var")
        return [name for name in self._names if name in varying and name.endswith(statistics)]

    @torch.no_grad()
    def estimate(self) -> None:
        """Send the data through the network, whose normalizations use the statistics of each batch meanwhile."""
        moments = {module: _Moments() for module in self._modules}
        hooks = [module.register_forward_pre_hook(seen.add) for module, seen in moments.items()]
        try:
            for module in self._modules:  # and not the whole network, whose dropout stays off
                module.train()
            self._passes()
        finally:
            for hook in hooks:
                hook.remove()
            for module in self._modules:
                module.eval()
        for module, seen in moments.items():
            seen.write(module)

    def values(self) -> Mapping[str, Tensor]:
        """The statistics as they are now, on the CPU, by their names in the state dict."""
        state = self._network.state_dict()
        return {name: state[name].detach().cpu().clone() for name in sorted(self._names)}
