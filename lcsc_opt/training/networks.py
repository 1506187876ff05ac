"""Small networks: U-Nets of diffusers, and the weights that they begin with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcsc_opt.base.errors import TrainingError
from lcsc_opt.base.imports import import_extra


def small_unet(image_shape: Sequence[int], widths: Sequence[int] | None = None) -> nn.Module:
    """A ``UNet2DModel`` without attention, one layer a block: ``(x [N, C, H, W], t [N]) -> .sample [N, C, H, W]``.

    Args:
        image_shape: ``[C, H, W]``, square; the sides can be halved once for each width after the first.
        widths: channels at each resolution, multiples of four; each width after the first halves the resolution.
            ``None`` halves the sides once, and again while they stay whole and at least eight pixels.

    Raises:
        TrainingError: without widths, the images are not square, or cannot be halved once.
    """
    channels, height, width = image_shape
    if widths is None:
        if height != width or height % 2:
            raise TrainingError(
                f"--network: the small U-Net is for square images of an even side, got {height}x{width}"
            )
        widths = _default_widths(height)
    settings: dict[str, Any] = {  # with lists, since a study's fingerprint is JSON
        "sample_size": height,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": list(widths),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D"] * len(widths),
        "up_block_types": ["UpBlock2D"] * len(widths),
        "add_attention": False,
    }
    model: nn.Module = import_extra("diffusers").UNet2DModel(**settings)
    return model


def _default_widths(side: int) -> list[int]:
    """The channels at each resolution of images of ``side`` pixels: doubled where they are halved, up to four times."""
    halvings = 1
    while side % 2 ** (halvings + 1) == 0 and side // 2 ** (halvings + 1) >= 8:
        halvings += 1
    first = 16 if side <= 8 else 32
    return [first * min(2**level, 4) for level in range(halvings + 1)]


class PatchedUNet(nn.Module):
    """A :func:`small_unet` whose pixels are patches of the image, which saves most of its work at full resolution.

    Args:
        image_shape: ``[C, H, W]``.
        widths: the channels of each level of the U-Net; its images are ``[C patch², H / patch, W / patch]``.
        patch: side of a patch in pixels.
    """

    def __init__(self, image_shape: Sequence[int], widths: Sequence[int], *, patch: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.patch = patch
        self.unet = small_unet((channels * patch**2, height // patch, width // patch), widths)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``[N, C, H, W]`` at times ``[N]`` → ``[N, C, H, W]``."""
        patches = self.unet(F.pixel_unshuffle(x, self.patch), t).sample
        return F.pixel_shuffle(patches, self.patch)


@torch.no_grad()
def initialize(network: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight of linear, convolution and normalization layers from ``generator``.

    Weights with two axes or more, and the biases of their layers, are uniform within ± 1 / sqrt(fan-in), as PyTorch
    draws them. Vectors of normalization layers are one and zero. Other layers, such as attention with one matrix for
    query, key and value, would not begin as they should.
    """
    for module in network.modules():
        weight = getattr(module, "weight", None)
        bound = None  # normalization layers have none
        if isinstance(weight, Tensor) and weight.ndim >= 2:  # [out, in, …]
            bound = 1 / math.sqrt(weight[0].numel())
        for name, parameter in module.named_parameters(recurse=False):
            if bound is not None:
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.fill_(1.0 if name == "weight" else 0.0)
