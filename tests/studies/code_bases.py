"""Stand-ins for the code bases that the study files of full scale name: their interfaces, and next to no weights."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Small(nn.Module):
    """One convolution that is told the noise level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 3, padding=1)
        self.level = nn.Linear(1, channels)

    def answer(self, x: Tensor, level: Tensor) -> Tensor:
        assert level.shape == (len(x),)
        return self.layer(x) + 0.01 * self.level(level[:, None].float() / 1000)[:, :, None, None]


class SongUNet(Small):
    """Of NVlabs' training.networks."""

    def __init__(self, img_resolution: int, in_channels: int, out_channels: int, **options: Any) -> None:
        assert (img_resolution, out_channels, options["encoder_type"]) == (32, 3, "residual")
        super().__init__(in_channels)

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Any, augment_labels: Any = None) -> Tensor:
        assert class_labels is None
        assert x.shape[1:] == (3, 32, 32)
        return self.answer(x, noise_labels)


class Adm(Small):
    """Of cm.unet, whose attention is flash-attn's."""

    def __init__(self, image_size: int, in_channels: int, num_classes: int, **options: Any) -> None:
        super().__init__(in_channels)
        assert (image_size, num_classes, options["num_head_channels"]) == (64, 1000, 64)
        self.classes = nn.Embedding(num_classes, in_channels)
        self.attention = sys.modules["cm.unet"].QKVFlashAttention(in_channels, 1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        x = x + self.attention(x.flatten(2)[:, :, :4].repeat(1, 3, 1)).mean() + self.classes(y)[:, :, None, None]
        return self.answer(x, timesteps)


class Ddim(Small):
    """Of ddim's models.diffusion."""

    def __init__(self, config: Any) -> None:
        assert (config.model.ch, config.data.image_size, config.diffusion.num_diffusion_timesteps) == (128, 32, 1000)
        super().__init__(config.model.in_channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert float(t.max()) < 1000
        return self.answer(x, t)


class Iddpm(Small):
    """Of improved_diffusion.unet."""

    def __init__(self, in_channels: int, model_channels: int, out_channels: int, **options: Any) -> None:
        assert (model_channels, out_channels, options["num_heads"]) == (128, 3, 4)
        super().__init__(in_channels)

    def forward(self, x: Tensor, timesteps: Tensor, y: Any = None) -> Tensor:
        assert float(timesteps.max()) < 1000  # a quarter of 4,000
        return self.answer(x, timesteps)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put them where they are imported from, until the test ends."""
    classes = {
        "training.networks": ("SongUNet", SongUNet),
        "cm.unet": ("UNetModel", Adm),
        "models.diffusion": ("Model", Ddim),
        "improved_diffusion.unet": ("UNetModel", Iddpm),
    }
    for name, (attribute, kind) in classes.items():
        package, module = types.ModuleType(name.partition(".")[0]), types.ModuleType(name)
        setattr(module, attribute, kind)
        monkeypatch.setitem(sys.modules, package.__name__, package)
        monkeypatch.setitem(sys.modules, name, module)


def weights(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Small random ones."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in network.state_dict().items()}


def write_openai(folder: Path, steps: tuple[int, ...], build: Callable[[], nn.Module]) -> None:
    """``model000100.pt``, and what training leaves next to it."""
    folder.mkdir()
    for step in steps:
        for i, name in enumerate(("model", "ema_0.9999_", "target_model")):
            torch.save(weights(build(), step + i), folder / f"{name}{step:06d}.pt")
        torch.save({"state": {}, "param_groups": []}, folder / f"opt{step:06d}.pt")


def write_ddim(folder: Path, steps: tuple[int, ...], build: Callable[[], nn.Module]) -> None:
    """``ckpt_100.pth``: a list of model, optimizer, epoch, step, average."""
    folder.mkdir()
    for step in steps:
        model = {f"module.{name}": tensor for name, tensor in weights(build(), step).items()}
        content = [model, {"state": {}, "param_groups": []}, 3, step, weights(build(), step + 1)]
        torch.save(content, folder / f"ckpt_{step}.pth")
