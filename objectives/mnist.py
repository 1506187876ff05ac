"""The model of ``make demo``: a DDPM of MNIST's digits at 16×16, sampled in eight steps, scored by FID.

Its checkpoints, the average that its trainer kept, the digits, and the two networks whose features score images come
with lcsc_opt, so that a search begins at once. ``objectives/weights/train.py`` made them. Half of the 5,000 digits
trained the model and the networks, and searches compare with a quarter. The last quarter is for reports, and decides
when a gradient's search ends.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from lcsc_opt.base.paths import BUNDLED_WEIGHTS
from lcsc_opt.base.settings import parse_settings, second_of
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.small_images import SmallSettings
from lcsc_opt.sampling import DiffusersSampler, ImageNoise, SchedulerSettings, build_scheduler
from lcsc_opt.training.networks import PatchedUNet
from lcsc_opt.training.recipes.diffusion import Ddpm
from lcsc_opt.trajectory import Trajectory

CHECKPOINTS = BUNDLED_WEIGHTS / "mnist.trajectory"
IMAGE_SHAPE = (1, 16, 16)
RECIPE = Ddpm(batch_size=64, learning_rate=2e-3)
SEARCHED = slice(2_500, 3_750)
HELD_OUT = slice(3_750, 5_000)


class Settings(SmallSettings):
    """The settings of all models of bundled images, and the number of steps of sampling.

    Attributes:
        nfe: model calls per image; ``also: {nfe: 20}`` is what only reports use.
    """

    nfe: Annotated[int, Field(ge=2, le=100)] = 8


def network() -> nn.Module:
    """The network, whose weights are the checkpoints'."""
    return PatchedUNet(IMAGE_SHAPE, (16, 32), patch=2)


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Build the objective. Raises MetricError for metrics that cannot be computed."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    checked.check_metrics()
    module = network()

    def sampler(settings: Settings) -> DiffusersSampler:
        return DiffusersSampler(
            module,
            build_scheduler(None, RECIPE.scheduler()),
            SchedulerSettings(steps=settings.nfe),
            noise=ImageNoise(checked.noise_seed, IMAGE_SHAPE),
        )

    second = second_of(checked)
    return checked.objective(
        "mnist",
        Trajectory.open(CHECKPOINTS),
        sampler(checked),
        searched=SEARCHED,
        held_out=HELD_OUT,
        also=None if second is None else sampler(second),
    )
