"""How the weights of convolutions lie in memory. Their outputs lie alike, so a network computes faster or slower.

No layout is the faster one for every network, every processor, and with and without gradients, so it is measured
before the first search of an experiment. Results differ in their last bits, so the experiment keeps it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lcsc_opt.base.accelerator import CPU
from lcsc_opt.base.machine import free_memory
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS, SEARCH
from lcsc_opt.sampling.base import DifferentiableSampler, Sampler, networks_to_lay_out

_FORMATS = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}
SECONDS_TO_SHORTEN = 0.3  # of a trial: another layout of a shorter one is worth no measurement
_SECONDS_OF_A_TURN = 0.2
_MOST_IMAGES = 32  # of a turn on the CPU
_MOST_ON_DEVICE = 256
_ROUNDS = 3
_MOST_SECONDS = 2.0  # no new round begins after that
_WORTH = 0.95  # of the time; what gains less stays contiguous
_SAME_IMAGES = 0.01  # of their size: in another layout they differ in their last bits


def has_layouts(module: nn.Module) -> bool:
    """Whether there is a layout to choose for a network.

    A compiled network chooses by itself, and for one whose weights are not contiguous its author has chosen.
    """
    weights = [tensor for tensor in module.parameters() if tensor.ndim == 4]
    is_compiled = any(part._compiled_call_impl is not None for part in module.modules())
    return bool(weights) and not is_compiled and all(weight.is_contiguous() for weight in weights)


@torch.inference_mode(mode=False)  # tensors of inference mode could not be used in a graph
@torch.no_grad()
def lay_out(samplers: Sequence[Sampler], layout: str) -> None:
    """Give the weights of samplers' networks a layout. They stay the same tensors."""
    for sampler in samplers:
        for module in networks_to_lay_out(sampler):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.ndim == 4:
                    tensor.data = tensor.data.contiguous(memory_format=_FORMATS[layout])


def fastest_layout(sampler: Sampler, *, trial_images: int, gradient: bool) -> tuple[str, float]:
    """The layout in which a sampler is the fastest, and its time relative to that in the contiguous one.

    A few images are sampled in all layouts in turns; on a device a batch, since it takes as long for one image as for
    a few. Noise adds time: the shortest turn of each counts. A layout in which images are others, beyond rounding, is
    not chosen.

    Args:
        sampler: with any weights; it is left contiguous.
        trial_images: of a trial: if that is short, the layout stays contiguous.
        gradient: whether trials lead a gradient back through the network.
    """
    if not networks_to_lay_out(sampler):
        return CONTIGUOUS, 1.0
    _turn(sampler, 1, gradient)  # the first call takes longer
    _, seconds = _turn(sampler, 1, gradient)
    if seconds * trial_images < SECONDS_TO_SHORTEN:
        return CONTIGUOUS, 1.0
    count = max(1, min(int(_SECONDS_OF_A_TURN / seconds), _MOST_IMAGES))
    if next(networks_to_lay_out(sampler)[0].parameters()).device != CPU:
        count = _images_on_device(sampler, seconds, min(trial_images, _MOST_ON_DEVICE), gradient)
    layouts = [*_FORMATS]
    fewest_turns = 2 * len(layouts)
    if fewest_turns * count * seconds > _MOST_SECONDS:
        notice("timing in which layout the network's weights are faster")
    shortest = dict.fromkeys(layouts, math.inf)
    images: dict[str, Tensor] = {}
    begin = time.perf_counter()
    try:
        for number in range(1 + _ROUNDS):
            if number > 1 and time.perf_counter() - begin > _MOST_SECONDS:
                break
            for layout in layouts:
                lay_out([sampler], layout)
                images[layout], seconds = _turn(sampler, count, gradient)
                if number > 0:  # the first turn in a layout takes longer
                    shortest[layout] = min(shortest[layout], seconds)
            layouts.reverse()
    finally:
        lay_out([sampler], CONTIGUOUS)
    fastest = min(shortest, key=shortest.__getitem__)
    relative = shortest[fastest] / shortest[CONTIGUOUS]
    differs = float((images[fastest] - images[CONTIGUOUS]).norm())
    if relative >= _WORTH or not differs <= _SAME_IMAGES * float(images[CONTIGUOUS].norm()):
        return CONTIGUOUS, 1.0
    return fastest, relative


def _images_on_device(sampler: Sampler, seconds: float, most: int, gradient: bool) -> int:
    """The first power of two of images that take long enough to be timed, where one takes ``seconds``."""
    count = 1
    while 2 * count <= most and seconds < _SECONDS_OF_A_TURN / 2:
        try:
            _, seconds = _turn(sampler, 2 * count, gradient)
        except torch.OutOfMemoryError:
            break
        count *= 2
    free_memory()
    return count


def _turn(sampler: Sampler, count: int, gradient: bool) -> tuple[Tensor, float]:
    """The first images of the search's noise, on the CPU, and the seconds that they take, with their gradient."""
    start = time.perf_counter()
    if not gradient:
        with torch.no_grad():
            images = sampler.sample(SEARCH, 0, count)
    else:
        with _graph(sampler) as leaves:
            images = sampler.sample(SEARCH, 0, count)
            torch.autograd.grad(images.square().mean(), leaves, allow_unused=True)
    return images.detach().float().cpu(), time.perf_counter() - start


@contextlib.contextmanager
def _graph(sampler: Sampler) -> Iterator[list[Tensor]]:
    """While this is open, images have a graph back to the weights that it yields."""
    assert isinstance(sampler, DifferentiableSampler)  # else no optimizer follows a gradient
    weights = sampler.weights
    with torch.inference_mode(mode=False), torch.enable_grad(), weights.differentiable(weights.state) as leaves:
        yield list(leaves.values())
