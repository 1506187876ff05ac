"""Samples of a model in training: every so many steps a sheet of images, always from the same noise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcsc_opt.base.contact_sheet import contact_sheet
from lcsc_opt.base.errors import TrainingError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.sampling import DiffusersSampler, ImageNoise, NetworkSettings, build_scheduler
from lcsc_opt.sampling.latents import LatentDecoder
from lcsc_opt.training.recipes.base import Recipe, timestep_scale

IMAGES = 32


class SampleSheets:
    """``stepN.png`` in a folder, each with :data:`IMAGES` images of the weights after that step.

    A copy of the network samples, so the training's modes, graphs and random numbers do not change.

    Args:
        folder: of the files; made with the first sheet.
        every: steps between two sheets.
        recipe: its scheduler samples.
        network: the trained network.
        image_shape: ``[C, H, W]`` of the network's output.
        noise_scale: factor of ln(sigma) in the network's noise input.
        decoder: latents → images.
        device: where it samples.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        recipe: Recipe,
        network: nn.Module,
        image_shape: tuple[int, ...],
        noise_scale: float,
        decoder: LatentDecoder | None,
        device: torch.device,
    ) -> None:
        self.folder, self.every = folder, every
        self._sampler = DiffusersSampler(
            copy.deepcopy(network).requires_grad_(requires_grad=False),
            build_scheduler(None, recipe.scheduler()),
            **recipe.sampler,
            image_shape=image_shape,
            noise=ImageNoise(0),
            decoder=decoder,
            timestep_scale=timestep_scale(recipe.kind, noise_scale),
            settings=NetworkSettings(str(device)),
        )

    def due(self, step: int) -> bool:
        """Whether a sheet is written after this step."""
        return step % self.every == 0

    @torch.no_grad()
    def write(self, step: int, network: Any) -> None:
        """Sample, and write the sheet of a step.

        Raises:
            TrainingError: the disk refuses.
        """
        self._sampler.load(network.state_dict())
        images = self._sampler.sample(HELD_OUT, 0, IMAGES).float().nan_to_num().cpu().numpy()
        write_atomically(self.folder / f"step{step:08d}.png", contact_sheet(images), error=TrainingError)
