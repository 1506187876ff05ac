"""How the weights of convolutions lie in memory. Their outputs lie alike, so a network computes faster or slower.

No layout is the faster one for every network and every machine: :mod:`lcsc_opt.evaluation.layouts` measures. Results
differ in their last bits.
"""

from __future__ import annotations

import torch
from torch import nn

from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS

FORMATS = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}


def layouts_of(module: nn.Module) -> tuple[str, ...]:
    """The layouts that a network may be given; empty where there is nothing to choose.

    A compiled network chooses by itself, and for one whose weights are not contiguous its author has chosen.
    """
    weights = [tensor for tensor in module.parameters() if tensor.ndim == 4]
    is_compiled = any(part._compiled_call_impl is not None for part in module.modules())
    if is_compiled or not weights or not all(weight.is_contiguous() for weight in weights):
        return ()
    return tuple(FORMATS)


@torch.inference_mode(mode=False)  # tensors of inference mode could not be used in a graph
@torch.no_grad()
def lay_out(module: nn.Module, layout: str) -> None:
    """Give the weights of a network a layout. They stay the same tensors."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=FORMATS[layout])
