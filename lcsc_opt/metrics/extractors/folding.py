"""Batch normalization folded into convolutions: the same features in fewer operations.

In evaluation mode, batch normalization is linear. Where all that it normalizes is a convolution's output, it becomes
a part of that convolution's weights. Which layers follow each other is seen in a run, whatever code calls them.
"""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lcsc_opt.metrics.extractors.base import FeatureExtractor

ROUNDING = 1e-4
"""Of features, relative to their norm: a fold changes them by about 1e-6, a wrong one by far more."""
ROUNDING_ON_DEVICE = 1e-2  # an accelerator may round the factors of a convolution to ten bits
CHECKED_IMAGES = 2

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


def folded(extractor: FeatureExtractor, modules_of: Callable[[Any], list[nn.Module]], images: Tensor) -> Any:
    """A folded copy of a user's extractor if that gives the same features, else the extractor itself.

    Args:
        extractor: it stays as it is.
        modules_of: the networks in an extractor.
        images: ``[B, C, H, W]``, some of those that it will see. Only their shape, dtype and device matter, so that
            every process decides alike.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in _all(modules_of(extractor))):
        return extractor
    # copied tensors of inference mode could not be used in a graph
    with torch.inference_mode(mode=False), torch.no_grad():
        noise = torch.rand((CHECKED_IMAGES, *images.shape[1:]), generator=torch.Generator().manual_seed(0))
        noise = (2 * noise - 1).to(images)
        try:
            expected = extractor(noise).double()
            faster = copy.deepcopy(extractor)
            if not fold(modules_of(faster), lambda: faster(noise)):
                return extractor
            difference = faster(noise).double() - expected
        except torch.OutOfMemoryError:
            raise  # says nothing about the extractor
        except Exception:  # the user's code need not bear to be copied, or to run without the normalization
            return extractor
        rounding = ROUNDING if expected.device.type == "cpu" else ROUNDING_ON_DEVICE
        if difference.norm() <= rounding * expected.norm():
            return faster
    return extractor


@torch.no_grad()
def fold(modules: Iterable[nn.Module], run: Callable[[], object]) -> bool:
    """Fold the batch normalization in these networks, in place. Gives whether there was any to fold.

    Args:
        modules: the networks.
        run: calls them once, as they will be called.
    """
    modules = list(modules)
    pairs = _pairs(modules, run)
    for convolution, normalization in pairs:
        folded_convolution = fuse_conv_bn_eval(convolution, normalization)
        _replace(modules, convolution, folded_convolution)
        _replace(modules, normalization, nn.Identity())
    # measured on CPUs: such networks take .6 to .8 of the time in this layout
    if pairs and pairs[0][0].weight.device.type == "cpu":
        for module in modules:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    return bool(pairs)


def _replace(modules: Iterable[nn.Module], before: nn.Module, after: nn.Module) -> None:
    for parent in _all(modules):
        for name, child in parent.named_children():
            if child is before:
                setattr(parent, name, after)


def _pairs(modules: list[nn.Module], run: Callable[[], object]) -> list[Pair]:
    """The convolutions all of whose outputs one batch normalization takes, which takes nothing else."""
    last_output: dict[int, nn.Conv2d] = {}  # by the identity of the tensor
    alive: list[Tensor] = []  # so that no other tensor gets the identity of one
    calls: collections.Counter[nn.Module] = collections.Counter()
    calls_of_pairs: collections.Counter[Pair] = collections.Counter()

    def after_convolution(convolution: Any, _: Any, output: Tensor) -> None:
        calls[convolution] += 1
        last_output[id(output)] = convolution
        alive.append(output)

    def before_normalization(normalization: Any, inputs: tuple[Tensor, ...]) -> None:
        calls[normalization] += 1
        convolution = last_output.get(id(inputs[0]))
        if convolution is not None:
            calls_of_pairs[convolution, normalization] += 1

    with contextlib.ExitStack() as hooks:
        for module in _all(modules):
            if isinstance(module, nn.Conv2d):
                hooks.callback(module.register_forward_hook(after_convolution).remove)
            elif isinstance(module, nn.BatchNorm2d):
                hooks.callback(module.register_forward_pre_hook(before_normalization).remove)
        run()
    return [
        (convolution, normalization)
        for (convolution, normalization), count in calls_of_pairs.items()
        if calls[convolution] == calls[normalization] == count and _can_fold(convolution, normalization)
    ]


def _can_fold(convolution: nn.Conv2d, normalization: nn.BatchNorm2d) -> bool:
    in_evaluation = not convolution.training and not normalization.training
    has_statistics = normalization.running_mean is not None and normalization.running_var is not None
    is_exact = convolution.weight.dtype in (torch.float32, torch.float64)
    return in_evaluation and has_statistics and is_exact


def _all(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """These modules and all inside them, each once."""
    yield from nn.ModuleList(modules).modules()
