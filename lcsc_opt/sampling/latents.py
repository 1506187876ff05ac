"""From latents to images, for diffusion models that work in the latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.imports import prepare_torchvision
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.sampling.differentiation import recomputed


class LatentDecoder(nn.Module):
    """Undoes the scaling of latents, channel by channel, and decodes them.

    Args:
        autoencoder: such as ``AutoencoderKL`` of diffusers; its ``decode(latents).sample`` are images.
        mean: ``[C]`` of the autoencoder's latents; the model's have mean zero.
        scale: ``[C]``, by which the model's latents are multiplied.
        low: what black is in the decoded images; white is 1.
        batch_size: latents decoded at once.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        autoencoder: nn.Module,
        *,
        mean: Sequence[float],
        scale: Sequence[float],
        low: float = -1.0,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(requires_grad=False)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("scale", torch.tensor(scale)[:, None, None])
        self.low, self.batch_size = low, batch_size

    def forward(self, latents: Tensor) -> Tensor:
        """``[N, C, H, W]`` latents → ``[N, 3, 8 H, 8 W]`` images, black at −1 and white at 1."""
        raw = latents * self.scale + self.mean
        parts = torch.split(raw, self.batch_size)
        images = torch.cat([recomputed(self._decode, part) if len(parts) > 1 else self._decode(part) for part in parts])
        return (images - self.low) * (2 / (1 - self.low)) - 1

    def _decode(self, latents: Tensor) -> Tensor:
        images: Tensor = cast("Any", self.autoencoder).decode(latents).sample
        return images

    def describe(self) -> dict[str, object]:
        """What changes the images."""
        return {
            "mean": self.mean.flatten().tolist(),
            "scale": self.scale.flatten().tolist(),
            "low": self.low,
            "autoencoder": weights_sha256(self.autoencoder.state_dict()),
        }


def load_autoencoder(folder: Path) -> nn.Module:
    """An ``AutoencoderKL`` from a folder that diffusers' ``save_pretrained`` wrote, with safetensors weights.

    Raises:
        ObjectiveError: no such folder, or not one of an autoencoder.
    """
    prepare_torchvision()
    from diffusers import AutoencoderKL

    if not (folder / "config.json").is_file():
        raise ObjectiveError(f"decoder: {folder} holds no config.json; expected the folder of an AutoencoderKL")
    try:
        network: nn.Module = cast("Any", AutoencoderKL).from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ObjectiveError(f"decoder: {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return network
