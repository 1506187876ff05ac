"""A denoising diffusion model of 8×8 digits, trained here, sampled by DPM-Solver++, scored by FID.

Data, features and the U-Net are those of ``digits.py``; here the U-Net predicts noise. The first use trains it, in half
a minute; afterwards it comes from the cache. With four times the steps and twice the images in each step, the best EMA
would be so close to the digits themselves that a search could hardly improve it.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any

from pydantic import Field

from lcsc_opt.base.settings import parse_settings
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.small_images import SmallModel, TrainedSettings
from lcsc_opt.training.networks import small_unet
from lcsc_opt.training.recipes.diffusion import Ddpm

MODEL = SmallModel(
    name="digits-ddpm",
    dataset="digits",
    recipe=Ddpm(batch_size=64, learning_rate=2e-3),
    image_shape=(1, 8, 8),
    architecture="UNet2DModel 16-32",
    network=functools.partial(small_unet, (1, 8, 8), (16, 32)),
)


class Settings(TrainedSettings):
    """The settings of all models that are trained here, with other defaults."""

    nfe: Annotated[int, Field(ge=2, le=100)] = 10


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Build the objective; the trajectory comes from the cache, or is trained first."""
    return MODEL.build(parse_settings(Settings, settings, source="objective.settings"))
