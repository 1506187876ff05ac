"""How the weights of convolutions lie in memory. Their outputs lie alike, so a network computes faster or slower.

No layout is the faster one for every network, every processor, and with and without gradients, so it is measured
before the first search of an experiment. Results differ in their last bits, so the experiment keeps it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lcsc_opt.base.accelerator import CPU
from lcsc_opt.base.progress import notice
from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS, SEARCH
from lcsc_opt.sampling.base import DifferentiableSampler, Sampler, network_output, networks_to_lay_out

_FORMATS = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}
SECONDS_TO_SHORTEN = 0.3  # of a trial: another layout of a shorter one is worth no measurement
_SECONDS_OF_A_TURN = 0.1  # a turn calls the networks in one layout, for as many images as take about so long
_MOST_IMAGES = 32  # of a turn
_ROUNDS = 10  # of a turn in each layout, after a first round that does not count
_MOST_SECONDS = 1.5  # no new round begins after that
_WORTH = 0.95  # of the time; what gains less stays contiguous
_SAME_OUTPUTS = 0.01  # of their size: in another layout they differ in their last bits


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

    One image is sampled. One call of each network is then repeated for some images in all layouts, in turns: that tells
    as much as all steps of a sampler. Noise adds time: the shortest turn of each counts. A layout in which outputs are
    others, beyond rounding, is not chosen.

    Args:
        sampler: with any weights; it is left contiguous.
        trial_images: of a trial: if that is short, the layout stays contiguous.
        gradient: whether trials lead a gradient back through the network.
    """
    calls = _calls(sampler)
    if not calls:
        return CONTIGUOUS, 1.0
    _turn(sampler, calls, gradient)  # not counted: the first pass back takes longer
    _, seconds = _turn(sampler, calls, gradient)
    if seconds * trial_images < SECONDS_TO_SHORTEN:
        return CONTIGUOUS, 1.0
    seconds_of_a_call = seconds / sum(call.times for call in calls)
    count = max(1, min(int(_SECONDS_OF_A_TURN / seconds_of_a_call), _MOST_IMAGES, trial_images))
    if next(networks_to_lay_out(sampler)[0].parameters()).device != CPU:  # which needs no longer for a few than for one
        count = min(_MOST_IMAGES, trial_images)
    calls = [call.for_images(count) for call in calls]
    layouts = [*_FORMATS]
    fewest_turns = 2 * len(layouts)  # two rounds
    if fewest_turns * len(calls) * count * seconds_of_a_call > _MOST_SECONDS:
        notice("timing in which layout the network's weights are faster")
    shortest = dict.fromkeys(layouts, math.inf)
    outputs: dict[str, Tensor] = {}
    begin = time.perf_counter()
    try:
        for number in range(1 + _ROUNDS):
            if number > 1 and time.perf_counter() - begin > _MOST_SECONDS:
                break
            for layout in layouts:
                lay_out([sampler], layout)
                outputs[layout], seconds = _turn(sampler, calls, gradient)
                if number > 0:  # the first turn in a layout takes longer
                    shortest[layout] = min(shortest[layout], seconds)
            layouts.reverse()  # so that none is always the first
    finally:
        lay_out([sampler], CONTIGUOUS)
    fastest = min(shortest, key=shortest.__getitem__)
    relative = shortest[fastest] / shortest[CONTIGUOUS]
    differs = float((outputs[fastest] - outputs[CONTIGUOUS]).norm())
    # "not <=" also where outputs are NaN
    if relative >= _WORTH or not differs <= _SAME_OUTPUTS * float(outputs[CONTIGUOUS].norm()):
        return CONTIGUOUS, 1.0
    return fastest, relative


@dataclasses.dataclass(frozen=True)
class _NetworkCall:
    """The last call of a network while an image is sampled.

    Attributes:
        network: that is called.
        arguments: with which it is, by position and by keyword.
        dtype: in which it computes under autocast; ``None`` without.
        times: how often it is called for an image.
    """

    network: nn.Module
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    dtype: torch.dtype | None
    times: int

    def for_images(self, count: int) -> _NetworkCall:
        """The same call for so many images, all of them copies of the one."""
        rows = next(len(value) for value in tree_leaves(self.arguments) if isinstance(value, Tensor) and value.ndim)

        def repeated(value: Any) -> Any:
            is_of_images = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
            return value.repeat_interleave(count, dim=0) if is_of_images else value

        return dataclasses.replace(self, arguments=tree_map(repeated, self.arguments))

    def __call__(self) -> tuple[Tensor, list[Tensor]]:
        """What it gives, and its inputs; in grad mode with a graph to them, as that of the calls before."""
        inputs: list[Tensor] = []

        def as_input(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            inputs.append(value.detach().requires_grad_(torch.is_grad_enabled()))
            return inputs[-1]

        by_position, by_keyword = tree_map(as_input, self.arguments)
        device = next(self.network.parameters()).device.type
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype is not None):
            return network_output(self.network, *by_position, **by_keyword).float(), inputs


def _calls(sampler: Sampler) -> list[_NetworkCall]:
    """The networks with a choice that a sampler calls to make its first image, without a graph."""
    networks = networks_to_lay_out(sampler)
    calls: dict[nn.Module, _NetworkCall] = {}

    def note(network: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        device = next(network.parameters()).device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        times = calls[network].times + 1 if network in calls else 1
        calls[network] = _NetworkCall(network, (arguments, keywords), dtype, times)

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for network in networks:
            hooks.callback(network.register_forward_pre_hook(note, with_kwargs=True).remove)
        if networks:
            sampler.sample(SEARCH, 0, 1)
    return list(calls.values())


def _turn(sampler: Sampler, calls: Sequence[_NetworkCall], gradient: bool) -> tuple[Tensor, float]:
    """What the networks give, in one row on the CPU; and the seconds that all calls for these images would take.

    Each call is made once, and counts as often as a sampler makes it. With ``gradient``, the way back is timed, too.
    """
    outputs = []
    seconds = 0.0
    for call in calls:
        start = time.perf_counter()
        if not gradient:
            with torch.no_grad():
                output, _ = call()
        else:
            assert isinstance(sampler, DifferentiableSampler)  # else no optimizer follows a gradient
            weights = sampler.weights
            with torch.inference_mode(mode=False), torch.enable_grad(), weights.differentiable(weights.state) as leaves:
                output, inputs = call()
                torch.autograd.grad(output.square().mean(), [*leaves.values(), *inputs], allow_unused=True)
        outputs.append(output.detach().cpu().flatten())  # which waits for a device
        seconds += call.times * (time.perf_counter() - start)
    return torch.cat(outputs), seconds
