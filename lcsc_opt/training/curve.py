"""What a training shows while it runs: its learning curve, and sheets of samples."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcsc_opt.base.contact_sheet import contact_sheet
from lcsc_opt.base.errors import TrainingError
from lcsc_opt.base.files import write_atomically
from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.sampling import DiffusersSampler, ImageNoise, LatentDecoder, NetworkSettings, build_scheduler
from lcsc_opt.training.recipes.base import Recipe, timestep_scale

IMAGES = 32  # of a sheet


class LearningCurve:
    """``{"step", "loss", "seconds"}`` in each line; the loss is the mean since the line before.

    Args:
        path: of the file.
        write: whether this process writes.

    Attributes:
        begun: the losses of the line that is not written yet.
    """

    def __init__(self, path: Path, *, write: bool = True) -> None:
        self._path, self._write = path, write
        self.begun: list[float] = []

    def add(self, losses: list[float]) -> None:
        """Remember the losses of further steps."""
        self.begun.extend(losses)

    def write(self, step: int, seconds: float) -> None:
        """Write a line for the losses that were added since the last line."""
        mean = math.fsum(self.begun) / len(self.begun)
        self.begun = []
        if self._write:
            line = {"step": step, "loss": mean, "seconds": round(seconds, 3)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines after a step, and an unfinished line."""
        if not self._write or not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(f"{line}\n")
        write_atomically(self._path, "".join(kept).encode(), error=TrainingError)


class SampleSheets:
    """``stepN.png`` in a folder, every so many steps, each with :data:`IMAGES` images from the same noise.

    A copy of the network samples, so the training's modes, graphs and random numbers do not change.

    Args:
        folder: of the files; made with the first sheet.
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
        recipe: Recipe,
        network: nn.Module,
        image_shape: tuple[int, ...],
        noise_scale: float,
        decoder: LatentDecoder | None,
        device: torch.device,
    ) -> None:
        self._folder = folder
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

    @torch.no_grad()
    def write(self, step: int, network: Any) -> None:
        """Sample with the weights after a step, and write the sheet.

        Raises:
            TrainingError: the disk refuses.
        """
        self._sampler.load(network.state_dict())
        images = self._sampler.sample(HELD_OUT, 0, IMAGES).float().nan_to_num().cpu().numpy()
        write_atomically(self._folder / f"step{step:08d}.png", contact_sheet(images), error=TrainingError)
