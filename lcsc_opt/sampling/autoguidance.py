"""Autoguidance (Karras et al. 2024, *Guiding a Diffusion Model with a Bad Version of Itself*).

The weak version has the weights of an earlier checkpoint, or of another average, and needs no training of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.sampling.network import network_output


class Autoguidance(nn.Module):
    """Weak output + guidance (output − weak output), called as the network.

    Args:
        network: gets the merged weights.
        weak: the weaker version, whose weights do not change.
        guidance: the scale; 1 is the network alone.
    """

    calls = 2  # networks that are called for one output

    def __init__(self, network: nn.Module, weak: nn.Module, *, guidance: float) -> None:
        super().__init__()
        self.network = network
        self.weak = weak
        self.guidance = guidance
        self.config: dict[str, object] = {
            **getattr(network, "config", {}),
            "weak": weights_sha256(weak.state_dict()),
            "guidance": guidance,
        }

    def forward(self, x: Tensor, times: Tensor, **labels: Tensor) -> Tensor:
        """``[N, C, H, W]`` and what the network is told → its output; a learned variance is not guided."""
        output = network_output(self.network, x, times, **labels)
        weak_output = network_output(self.weak, x, times, **labels)
        channels = x.shape[1]
        difference = output[:, :channels] - weak_output[:, :channels]
        guided = weak_output[:, :channels] + self.guidance * difference
        return torch.cat([guided, output[:, channels:]], dim=1)
