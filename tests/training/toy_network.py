"""A network and images that train in no time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ToyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.level = nn.Linear(1, 8)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        level = self.level(c_noise[:, None].float() / 1000)
        hidden = self.norm(self.first(x)) + level[:, :, None, None]
        output: Tensor = self.last(nn.functional.silu(hidden))
        return output


SIGNS = torch.randint(2, (64, 1, 1, 1), generator=torch.Generator().manual_seed(5)) * 2.0 - 1
IMAGES = SIGNS * torch.full((64, 1, 4, 4), 0.5)  # bright or dark squares
