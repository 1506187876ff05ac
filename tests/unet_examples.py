"""Tiny U-Nets of diffusers, with weights drawn here."""

from __future__ import annotations

from typing import Any

import torch


def unet(seed: int = 0, *, channels: int = 1, **options: Any) -> Any:
    """A ``UNet2DModel`` on 8×8 images. Its random outputs are small, so samplers stay away from the clipping bounds."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {"out_channels": channels, **options}
        return UNet2DModel(
            sample_size=8,
            in_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
            **settings,
        ).eval()
