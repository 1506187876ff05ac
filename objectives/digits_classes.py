"""Class-conditional models of 8×8 digits, trained here, sampled with classifier-free guidance, scored by FID.

A denoising diffusion model (``recipe: ddpm``) or flow matching (``recipe: flow``), told the digit that it draws, and in
a tenth of the training none. Data, features and the U-Net are those of ``digits_ddpm.py``. Coefficients are the best
for one scale of guidance: ``vary: {objective.settings.guidance: [1, 1.5, 2]}`` searches them for each. With ``weak:
ema:0.99``, or the step of a checkpoint, guidance leads away from that model (autoguidance) and not from the one that is
told no digit.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lcsc_opt.base.settings import parse_settings
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.small_images import Guidance, SmallModel, TrainedSettings
from lcsc_opt.objective.weak import WeakSetting
from lcsc_opt.training.networks import small_unet
from lcsc_opt.training.recipes.diffusion import Ddpm, Flow

CLASSES = 10
Share = Annotated[float, Field(ge=0, le=1)]

_network = functools.partial(small_unet, (1, 8, 8), (16, 32), num_class_embeds=CLASSES + 1)

MODELS = {
    "ddpm": SmallModel(
        name="digits-classes-ddpm",
        dataset="digits",
        recipe=Ddpm(batch_size=64, learning_rate=2e-3),
        image_shape=(1, 8, 8),
        architecture="UNet2DModel 16-32, 11 classes",
        network=_network,
        classes=CLASSES,
        threads=1,
    ),
    "flow": SmallModel(
        name="digits-classes-flow",
        dataset="digits",
        recipe=Flow(batch_size=64, learning_rate=2e-3, coupling="independent"),
        image_shape=(1, 8, 8),
        architecture="UNet2DModel 16-32, 11 classes",
        network=_network,
        classes=CLASSES,
        threads=1,
    ),
}


class Settings(TrainedSettings):
    """The settings of all models that are trained here, with other defaults.

    Attributes:
        recipe: which model.
        guidance: scale of classifier-free guidance; 1 is none.
        guidance_low, guidance_high: classifier-free guidance acts between these shares of the training's timesteps.
        weak: a checkpoint's step or ``ema:RATE``: autoguidance by that model.
    """

    recipe: Literal["ddpm", "flow"] = "ddpm"
    nfe: Annotated[int, Field(ge=2, le=100)] = 10
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    guidance_low: Share = 0.0
    guidance_high: Share = 1.0
    weak: WeakSetting | None = None

    @model_validator(mode="after")
    def _is_an_interval(self) -> Settings:
        if self.guidance_low >= self.guidance_high:
            raise ValueError("expected guidance_low < guidance_high")
        if self.weak is not None and not {"guidance_low", "guidance_high"}.isdisjoint(self.model_fields_set):
            raise ValueError("the interval is that of classifier-free guidance; leave it out with weak")
        return self


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Build the objective; the trajectory comes from the cache, or is trained first."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    guidance = Guidance(checked.guidance, checked.guidance_low, checked.guidance_high, checked.weak)
    return MODELS[checked.recipe].build(checked, guidance)
