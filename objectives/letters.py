"""The model of ``make demo``: a flow of drawn 16×16 letters, sampled in two steps, scored by FID.

Its checkpoints, and the two networks whose features score images, come with lcsc_opt, so that a search begins at once.
``objectives/weights/train.py`` trained them. Pillow draws the letters with its own font, shifted, turned and shaded. A
third of them trained all of the networks, searches compare with another third, and the last is for reports and decides
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
from lcsc_opt.sampling import DiffusersSampler, ImageNoise, build_scheduler
from lcsc_opt.training.networks import PatchedUNet
from lcsc_opt.training.recipes.diffusion import Flow
from lcsc_opt.trajectory import Trajectory

CHECKPOINTS = BUNDLED_WEIGHTS / "letters.trajectory"
IMAGE_SHAPE = (1, 16, 16)
RECIPE = Flow(batch_size=64, learning_rate=2e-3)
TRAINED_ON, SEARCHED, HELD_OUT = slice(0, None, 3), slice(1, None, 3), slice(2, None, 3)


class Settings(SmallSettings):
    """The settings of all models of bundled images, and the number of steps of sampling.

    Attributes:
        nfe: model calls per image; ``also: {nfe: 8}`` is what only reports use.
    """

    nfe: Annotated[int, Field(ge=2, le=100)] = 2

    def check(self) -> None:
        """Refuse metrics that cannot be computed. Raises MetricError."""
        self.check_metrics()


def network() -> nn.Module:
    """The network, whose weights are the checkpoints'."""
    return PatchedUNet(IMAGE_SHAPE, (16, 16), patch=2)


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Build the objective."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    checked.check()
    module = network()

    def sampler(settings: Settings) -> DiffusersSampler:
        return DiffusersSampler(
            module,
            build_scheduler(None, RECIPE.scheduler()),
            steps=settings.nfe,
            image_shape=IMAGE_SHAPE,
            noise=ImageNoise(checked.noise_seed),
        )

    second = second_of(checked)
    return checked.objective(
        "characters",
        Trajectory.open(CHECKPOINTS),
        sampler(checked),
        searched=SEARCHED,
        held_out=HELD_OUT,
        also=None if second is None else sampler(second),
    )
