"""A consistency model of 32×32 crops of two colour photographs, trained here, sampled in one step, scored by FID.

Nothing is downloaded: the photographs are bundled with scikit-learn, and the U-Net is diffusers'. The features are
those of a small network that is trained to tell the photograph and the part of it that a crop comes from. The first use
trains the model, in a few minutes on two cores; afterwards it comes from the cache.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any

from pydantic import Field

from lcsc_opt.base.settings import parse_settings
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.small_images import SmallModel, TrainedSettings
from lcsc_opt.training.networks import PatchedUNet
from lcsc_opt.training.recipes.consistency import Ict

MODEL = SmallModel(
    name="photographs",
    dataset="photographs",
    # few noise levels, and more of the high ones, so that training takes minutes
    recipe=Ict(batch_size=32, learning_rate=1e-3, sigma_max=80.0, last_discretization=20, noise_mean=0.5),
    image_shape=(3, 32, 32),
    architecture="PatchedUNet 4, 32-64",
    network=functools.partial(PatchedUNet, (3, 32, 32), (32, 64), patch=4),
    spacing=0.1,
    threads=1,
)


class Settings(TrainedSettings):
    """The settings of all models that are trained here, with other defaults."""

    batch_size: Annotated[int, Field(ge=1)] = 250
    nfe: Annotated[int, Field(ge=1, le=4)] = 1
    training_steps: Annotated[int, Field(ge=2)] = 3000
    checkpoint_every: Annotated[int, Field(ge=1)] = 15


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Build the objective; the trajectory comes from the cache, or is trained first."""
    return MODEL.build(parse_settings(Settings, settings, source="objective.settings"))
