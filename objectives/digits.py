"""The demo: a consistency model of 8×8 digits, trained here, sampled in one step, scored by FID.

Data, network and features need no download: the digits are scikit-learn's own (UCI, 1,797 images), the U-Net is
diffusers', and the features are those of a small classifier of the same digits, which ships. The first use
trains the model, in about three minutes on two cores; afterwards it comes from the cache.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any

from pydantic import Field

from lcsc_opt.base.settings import parse_settings
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.small_images import SmallModel, TrainedSettings
from lcsc_opt.training.networks import small_unet
from lcsc_opt.training.recipes.consistency import Ict

MODEL = SmallModel(
    name="digits",
    dataset="digits",
    recipe=Ict(),
    image_shape=(1, 8, 8),
    architecture="UNet2DModel 16-32",
    network=functools.partial(small_unet, (1, 8, 8), (16, 32)),
)


class Settings(TrainedSettings):
    """The settings of all models that are trained here, with other defaults."""

    nfe: Annotated[int, Field(ge=1, le=4)] = 1
    training_steps: Annotated[int, Field(ge=2)] = 4000
    checkpoint_every: Annotated[int, Field(ge=1)] = 20


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Build the objective; the trajectory comes from the cache, or is trained first."""
    return MODEL.build(parse_settings(Settings, settings, source="objective.settings"))
