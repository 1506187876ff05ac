"""Running statistics of normalizations, estimated again with the merged weights.

The statistics are averages over what a network saw in training, and a merge with negative coefficients may be far from
what the merged network sees. So they are estimated from forward passes of the merged network, as in torch's
``swa_utils.update_bn``; but the variance is that of all passes together. A batch of a sampler has one time, and a batch
of a training all of them, so the variance between times is a part of what the network has seen.

Which tensors they are is told by their names, and by what reads them: an operator of torch that has an argument
``running_mean``. So a network may be of any class, also TorchScript. Statistics that are the same in all checkpoints
belong to a part that was frozen, and stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lcsc_opt.base.accelerator import has_float64
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import Noise
from lcsc_opt.checkpoints.weights import varying_statistics
from lcsc_opt.sampling.base import DifferentiableSampler, compiled_as_eager

# fixed, so that the same candidate has the same statistics in every evaluation
IMAGES = 256
BATCH = 16
NOISE = Noise("batch-norm")  # no evaluation samples from this group


class _Moments:
    """The mean and the variance of everything that a normalization has seen, by channel."""

    def __init__(self) -> None:
        self._of_calls: list[tuple[Tensor, int]] = []  # variance and mean, [2, C], and over how many numbers

    @property
    def calls(self) -> int:
        """How many calls were added."""
        return len(self._of_calls)

    def add(self, inputs: Tensor) -> None:
        """Add what one call sees, ``[N, C, ...]``."""
        by_channel = inputs.transpose(0, 1).flatten(1)
        wide = by_channel.to(torch.promote_types(by_channel.dtype, torch.float32))
        self._of_calls.append((torch.stack(torch.var_mean(wide, dim=1, correction=0)), by_channel.shape[1]))

    def write(self, mean: Tensor, variance: Tensor, calls: Tensor | None) -> None:
        """Write them into buffers; there was at least one call."""
        total = 0
        mean_of_all: Tensor | float = 0.0
        square_of_all: Tensor | float = 0.0
        for moments, count in self._of_calls:
            wide = moments if has_float64(moments.device) else moments.cpu()
            variance_of_call, mean_of_call = wide.double()
            total += count
            share = count / total  # of this call in the new averages
            mean_of_all = mean_of_all + share * (mean_of_call - mean_of_all)
            square_of_all = square_of_all + share * (variance_of_call + mean_of_call**2 - square_of_all)
        mean.copy_(torch.as_tensor(mean_of_all))
        # unbiased, as the running variance of torch is
        variance.copy_(torch.as_tensor((square_of_all - mean_of_all**2) * total / max(total - 1, 1)))
        if calls is not None:
            calls.fill_(self.calls)


class _Arguments(NamedTuple):
    """Where a normalizing operator of torch has its running mean, behind which is the variance, and its mode."""

    running_mean: int
    training: int


@functools.cache
def _arguments_of(operator: Any) -> _Arguments | None:
    """The places of the arguments; ``None`` of an operator that does not normalize."""
    names = [argument.name for argument in operator._schema.arguments]
    for training in ("training", "train"):
        if "running_mean" in names and training in names:
            return _Arguments(names.index("running_mean"), names.index(training))
    return None


class _StatisticsOfBatches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is open, normalizations normalize by the statistics of each batch, and what they see is added up.

    Args:
        moments: address of a running mean → what its normalizations see; all others are left as they are.
    """

    def __init__(self, moments: Mapping[int, _Moments]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._moments = moments

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        places = _arguments_of(func)
        if places is not None and isinstance(args[places.running_mean], Tensor):
            moments = self._moments.get(args[places.running_mean].data_ptr())
            if moments is not None:
                moments.add(args[0])
                changed = list(args)
                changed[places.running_mean : places.running_mean + 2] = [None, None]
                changed[places.training] = True
                args = tuple(changed)
        return func(*args, **(kwargs or {}))


class BatchNormStatistics:
    """Estimates the statistics of a network that vary between checkpoints, each time after new weights.

    Args:
        network: merged weights are loaded into it.
        passes: sends data through the network; mean and variance of all its calls become the statistics.
        varying: the names of the tensors that are not the same in all checkpoints.

    Attributes:
        statistics: which are estimated, in the order of the network's state dict.
    """

    def __init__(self, network: nn.Module, passes: Callable[[], object], varying: Collection[str]) -> None:
        self._network = network
        self._passes = passes
        self.statistics = varying_statistics(network.state_dict(), varying)

    @classmethod
    def of_samples(cls, sampler: DifferentiableSampler, varying: Collection[str]) -> BatchNormStatistics:
        """Estimates them, each time anew, from :data:`IMAGES` images that the network samples with its new weights."""

        def passes() -> None:
            for first in range(0, IMAGES, BATCH):
                sampler.sample(NOISE, first, first + BATCH)  # only what passes the network counts, not the images

        return cls(sampler.weights.trained, passes, varying)

    @torch.no_grad()
    def estimate(self) -> None:
        """Send the data through the network, whose normalizations use the statistics of each batch meanwhile."""
        state = self._network.state_dict()
        moments = {state[names.mean].data_ptr(): _Moments() for names in self.statistics}
        with compiled_as_eager(), _StatisticsOfBatches(moments):
            self._passes()
        for names in self.statistics:
            seen = moments[state[names.mean].data_ptr()]
            if seen.calls:
                seen.write(state[names.mean], state[names.variance], state.get(names.calls))
            else:
                notice(f"{names.mean}: no normalization of torch has read it, so it is combined like a weight")

    def values(self) -> Mapping[str, Tensor]:
        """The statistics as they are now, on the CPU, by their names in the state dict."""
        state = self._network.state_dict()
        names = sorted(name for names in self.statistics for name in names if name in state)
        return {name: state[name].detach().cpu().clone() for name in names}
