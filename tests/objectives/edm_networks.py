"""A network with the interface of EDM's, which NVlabs' training pickles with its source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.checkpoints.nvlabs_examples import Persistent


class TinyPrecond(Persistent):
    """D(x; sigma) with the preconditioning of Karras et al. 2022, Table 1, around one convolution."""

    attack = "raise RuntimeError('a snapshot ran its code')"

    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False, width: int = 4
    ) -> None:
        sizes = {"img_resolution": img_resolution, "img_channels": img_channels}
        super().__init__(**sizes, label_dim=label_dim, width=width)
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_data = use_fp16, 0.5
        self.register_buffer("filter", torch.ones(2))
        self.layers = nn.Sequential(
            nn.Conv2d(img_channels + 1, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, img_channels, 1)
        )
        self.classes = nn.Linear(label_dim, img_channels) if label_dim else None

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1)
        norm = (s**2 + self.sigma_data**2).sqrt()
        c_noise = (s.log() / 4).expand(len(x), 1, *x.shape[2:])
        inputs = torch.cat([x / norm, c_noise], 1)
        if self.use_fp16:
            inputs = inputs.half().float()
        output = self.layers(inputs)
        if self.classes is not None and class_labels is not None:
            output = output + self.classes(class_labels)[:, :, None, None]
        return self.sigma_data**2 / norm**2 * x + s * self.sigma_data / norm * output


class BoundedPrecond(TinyPrecond):
    """One that knows the noise levels 0.01 to 50."""

    sigma_min, sigma_max = 0.01, 50.0


def tiny(seed: int, **options: Any) -> TinyPrecond:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyPrecond(8, 1, **options).eval().requires_grad_(requires_grad=False)
