"""From latents to images, for diffusion models that work in the latents of an autoencoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from lcsc_opt.base import accelerator
from lcsc_opt.base.batches import Batches
from lcsc_opt.base.errors import ObjectiveError, text_of
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.settings import Count, FrozenModel
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.sampling.base import recomputed

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
_LATENTS = 8  # decoded at once, where the memory of a device does not say how many


class DecoderSettings(FrozenModel):
    """How latents were scaled; the defaults are those of EDM2 with Stability's autoencoder ``sd-vae-ft-mse``.

    Attributes:
        autoencoder: the folder of an autoencoder of diffusers.
        raw_mean: mean of its latents, for each channel.
        raw_std: standard deviation of its latents, for each channel.
        final_std: standard deviation of the latents that the model makes; their mean is 0.
        low: the value of black in the decoded images; white is 1.
        batch_size: latents decoded at once; by default 8, on a device without a graph as many as its memory holds.
    """

    autoencoder: str
    raw_mean: list[float] = Field(default=[5.81, 3.25, 0.12, -2.15])
    raw_std: list[float] = Field(default=[4.17, 4.62, 3.71, 3.28])
    final_std: float = 0.5
    low: float = 0.0
    batch_size: Count | None = None

    def build(self, channels: int, context: BuildContext) -> LatentDecoder:
        """The decoder of latents with ``channels`` channels; ``context`` finds the autoencoder's folder.

        Raises:
            ObjectiveError: the settings have another number of channels, or there is no autoencoder.
        """
        if not len(self.raw_mean) == len(self.raw_std) == channels:
            raise ObjectiveError(f"decoder: raw_mean and raw_std need {channels} values each, one for each channel")
        return LatentDecoder(load_autoencoder(context.path(self.autoencoder)), self)


class LatentDecoder(nn.Module):
    """Undoes the scaling of latents, channel by channel, and decodes them.

    Args:
        autoencoder: such as ``AutoencoderKL`` of diffusers; its ``decode(latents).sample`` are images.
        settings: how the latents were scaled.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, autoencoder: nn.Module, settings: DecoderSettings) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(requires_grad=False)
        self.register_buffer("mean", torch.tensor(settings.raw_mean)[:, None, None])
        scale = [std / settings.final_std for std in settings.raw_std]
        self.register_buffer("scale", torch.tensor(scale)[:, None, None])
        self.low = settings.low
        self._size_is_given = settings.batch_size is not None
        self._fixed = Batches(settings.batch_size or _LATENTS)
        self._growing: Batches | None = None  # used without a graph, on a device that measures its memory

    def forward(self, latents: Tensor) -> Tensor:
        """``[N, C, H, W]`` latents → ``[N, C', H', W']`` images, black at −1 and white at 1."""
        raw = latents * self.scale + self.mean
        batches = self._batches(raw.device)
        if len(raw) <= batches.size:  # recomputing one batch saves no memory: the way back begins with it
            images = self._decode(raw)
        else:
            ranges = batches.ranges(0, len(raw))
            images = torch.cat([recomputed(self._decode, raw[first:last]) for first, last in ranges])
        return (images - self.low) * (2 / (1 - self.low)) - 1

    def _batches(self, device: torch.device) -> Batches:
        """How many latents are decoded at once: what settings say, or as many as the device's memory holds.

        With a graph the memory's peak comes in the backward pass, where it cannot be measured here.
        """
        is_fixed = self._size_is_given or torch.is_grad_enabled()
        if is_fixed or not accelerator.measures_memory(device):
            return self._fixed
        if self._growing is None:
            self._growing = Batches(_LATENTS, grows_on=device, inside=True)  # of a sampler's batch
        return self._growing

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
    """An autoencoder from a folder that diffusers' ``save_pretrained`` wrote, with safetensors weights.

    Raises:
        ObjectiveError: no such folder, or not one of an ``AutoencoderKL`` or an ``AutoencoderTiny``.
    """
    diffusers = import_extra("diffusers")
    expected = f"expected the folder of an {' or an '.join(AUTOENCODERS)}"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config.get("_class_name", AUTOENCODERS[0])
        if name not in AUTOENCODERS:
            raise ObjectiveError(f"decoder: {folder} is a {name}; {expected}")
        autoencoder_class = getattr(diffusers, name)
        autoencoder: nn.Module = autoencoder_class.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise ObjectiveError(f"decoder: {folder} cannot be loaded: {text_of(error)[:300]}; {expected}") from error
    return autoencoder
