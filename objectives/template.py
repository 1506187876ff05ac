"""Your own model: copy this file next to your study file, and change the two functions at its end.

    objective:
      file: my_model.py                   # the copy
      settings:
        checkpoints: runs/3/model*.pt     # a packed trajectory; or files, globs, a folder of checkpoints
        reference: real_images            # a folder of images, an .npz with mu and sigma, ...
        width: 8                          # a setting of your own

``lcsc run`` merges the checkpoints as an optimizer asks, loads the merged weights into ``network``, calls ``sample``
on noise that belongs to each image's index, and reports FID, or what ``loss`` names. All other settings (``key``,
``images``, ``batch_size``, ``device``, ``dtype``, ``metrics``, ...) work as they do for every objective over images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.settings import ImageObjectiveSettings
from lcsc_opt.sampling import FunctionSampler


class Settings(ImageObjectiveSettings):
    """Settings of your own, with their types and defaults. A study file with any other setting is refused."""

    width: int = 8


def build(settings: dict[str, Any], context: BuildContext) -> Objective:
    """``lcsc`` calls this function: settings in, objective out.

    ``context.path`` finds a file that the settings name, next to the study file or in the working directory.
    ``context`` may be left out by an objective that names no files.
    """
    checked = parse_settings(Settings, settings, source="objective.settings")
    sampler = FunctionSampler(
        network(checked.width),
        sample,
        nfe=1,  # model calls per image
        noise=checked.noise((1, 8, 8)),  # the shape of the noise of one image
        settings=checked,
    )
    return checked.objective(sampler, checked.trajectory(context), context)


def network(width: int) -> nn.Module:
    """Your network, with any weights; its state dict has the names and shapes of the checkpoints'."""
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))


def sample(model: nn.Module, noise: Tensor) -> Tensor:
    """Standard normal noise ``[N, 1, 8, 8]`` → images ``[N, C, H, W]`` in [-1, 1]; here by a one-step generator."""
    return torch.tanh(model(noise))
