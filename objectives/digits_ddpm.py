"""A denoising diffusion model of 8×8 digits, trained here, sampled by DPM-Solver++, scored by FID.

Data, features and the U-Net are those of ``digits.py``; here the U-Net predicts noise. The first use trains it, in half
a minute; afterwards it comes from the cache. With four times the steps and twice the images in each step, the best EMA
would be so close to the digits themselves that a search has nothing left to find.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from lcsc_opt.base.paths import cache_directory
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.settings import SelectionSettings
from lcsc_opt.sampling import DiffusersSampler, ImageNoise
from lcsc_opt.sampling.schedulers import build_scheduler
from lcsc_opt.training.diffusion import DiffusionTraining, train_diffusion
from lcsc_opt.training.images import digits_images, second_digits_view, train_digits_network
from lcsc_opt.training.networks import small_unet
from lcsc_opt.training.scoring import ScoredImages

IMAGE_SHAPE = (1, 8, 8)
NETWORK = "UNet2DModel 16-32"


class Settings(ScoredImages):
    """An evaluation samples ``images`` images in ``nfe`` steps; ``training_*`` are the length and seed of the training.

    ``select`` says which of its checkpoints are combined.
    """

    images: Annotated[int, Field(ge=65)] = 1000  # with 64 or fewer, the covariance of 64 features has no full rank
    batch_size: Annotated[int, Field(ge=1)] = 500
    nfe: Annotated[int, Field(ge=2, le=100)] = 10
    noise_seed: Annotated[int, Field(ge=0)] = 0
    training_steps: Annotated[int, Field(ge=2)] = 1000
    checkpoint_every: Annotated[int, Field(ge=1)] = 5
    training_seed: Annotated[int, Field(ge=0)] = 0
    select: SelectionSettings = SelectionSettings()

    def check(self) -> None:
        """Refuse metrics that cannot be computed, and a selection of too few checkpoints, before any training."""
        super().check()
        every = self.checkpoint_every
        self.select.check(range(every, self.training_steps + 1, every))


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Build the objective; the trajectory and the feature network come from the cache, or are trained first."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    checked.check()
    training = DiffusionTraining(
        steps=checked.training_steps,
        checkpoint_every=checked.checkpoint_every,
        batch_size=64,
        learning_rate=2e-3,
        seed=checked.training_seed,
    )
    cache = cache_directory()
    extractor = train_digits_network(seed=0, cache=cache)
    trajectory = train_diffusion(
        network,
        checked.seen(digits_images()),
        training=training,
        path=cache / f"digits-ddpm-{checked.key(training.key(NETWORK))}.trajectory",
        description="training a diffusion model of digits",
    )
    sampler = DiffusersSampler(
        network(),
        build_scheduler("dpm-solver++", training.schedule()),
        steps=checked.nfe,
        image_shape=IMAGE_SHAPE,
        noise=ImageNoise(checked.noise_seed),
    )
    cross_check = functools.partial(second_digits_view, cache)
    scores = checked.scores(extractor, digits_images(), cross_check)
    combined = checked.select.of(trajectory)
    return MergeSampleScore(combined, sampler, scores, images=checked.images, batch_size=checked.batch_size)


def network() -> nn.Module:
    """A U-Net of 159,697 parameters on 8×8 grey images."""
    return small_unet(IMAGE_SHAPE, (16, 32))
