"""The model of ``make demo``: a flow of drawn 16×16 letters, trained here, sampled in four steps, scored by FID.

Nothing is downloaded: Pillow draws the letters with its own font, shifted, turned and shaded, and the U-Net is
diffusers'. A third of the letters trains the model and the network whose features score it. Searches compare with
another third. The last is for reports, and decides when a gradient's search ends. The network ships, and the first
use trains the model; afterwards it comes from the cache.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import Field

from lcsc_opt.base.settings import parse_settings
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.small_images import SmallModel, TrainedSettings
from lcsc_opt.training.networks import PatchedUNet
from lcsc_opt.training.recipes.diffusion import Flow

MODEL = SmallModel(
    name="characters",
    dataset="characters",
    recipe=Flow(batch_size=64, learning_rate=2e-3, coupling="independent"),
    image_shape=(1, 16, 16),
    architecture="PatchedUNet 2, 16-32",
    network=functools.partial(PatchedUNet, (1, 16, 16), (16, 32), patch=2),
    threads=1,
)


class Settings(TrainedSettings):
    """The settings of all models that are trained here, with other defaults."""

    data: Literal["all", "half", "thirds"] = "thirds"
    nfe: Annotated[int, Field(ge=2, le=100)] = 4
    training_steps: Annotated[int, Field(ge=2)] = 600
    checkpoint_every: Annotated[int, Field(ge=1)] = 6


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Build the objective; the trajectory comes from the cache, or is trained first."""
    return MODEL.build(parse_settings(Settings, settings, source="objective.settings"))
