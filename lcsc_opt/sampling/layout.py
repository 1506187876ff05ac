"""How the weights of convolutions lie in memory. Their outputs lie alike, so a network computes faster or slower.

No layout is the faster one for every network and every machine: :mod:`lcsc_opt.evaluation.layouts` measures. Results
differ in their last bits.
"""

from __future__ import annotations

import torch
from torch import nn

from lcsc_opt.base.records import CHANNELS_LAST, CONTIGUOUS

FORMATS = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}


def has_layouts(module: nn.Module) -> bool:
    """Whether there is a layout to choose for a network.

    A compiled network chooses by itself, and for one whose weights are not contiguous its author has chosen.
    """
    weights = [tensor for tensor in module.parameters() if tensor.ndim == 4]
    is_compiled = any(part._compiled_call_impl is not None for part in module.modules())
    return bool(weights) and not is_compiled and all(weight.is_contiguous() for weight in weights)


@torch.inference_mode(mode=False)  # tensors of inference mode could not be used in a graph
@torch.no_grad()
def lay_out(module: nn.Module, layout: str) -> None:
    """Give the weights of a network a layout. They stay the same tensors."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=FORMATS[layout])
