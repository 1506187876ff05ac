"""The demo: a consistency model of 8×8 digits, trained here, sampled in one step, scored by FID.

Data, network and features need no download: the digits are scikit-learn's own (UCI, 1,797 images), the U-Net is
diffusers', and the features are those of a small classifier of the same digits. The first use trains both, in
about three minutes on two cores; afterwards they come from the cache.
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
from lcsc_opt.sampling import ConsistencyFunction, ConsistencySampler, ImageNoise
from lcsc_opt.training.consistency import ConsistencyTraining, train_consistency
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
    nfe: Annotated[int, Field(ge=1, le=4)] = 1
    noise_seed: Annotated[int, Field(ge=0)] = 0
    training_steps: Annotated[int, Field(ge=2)] = 4000
    checkpoint_every: Annotated[int, Field(ge=1)] = 20
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
    training = ConsistencyTraining(
        steps=checked.training_steps, checkpoint_every=checked.checkpoint_every, seed=checked.training_seed
    )
    cache = cache_directory()
    extractor = train_digits_network(seed=0, cache=cache)
    trajectory = train_consistency(
        network,
        checked.seen(digits_images()),
        training=training,
        path=cache / f"digits-{checked.key(training.key(NETWORK))}.trajectory",
        description="training a consistency model of digits",
    )
    function = ConsistencyFunction(network(), sigma_data=training.sigma_data, sigma_min=training.sigma_min)
    sigmas = [training.sigma_max * 0.2**step for step in range(checked.nfe)]
    sampler = ConsistencySampler(function, image_shape=IMAGE_SHAPE, sigmas=sigmas, noise=ImageNoise(checked.noise_seed))
    cross_check = functools.partial(second_digits_view, cache)
    scores = checked.scores(extractor, digits_images(), cross_check)
    combined = checked.select.of(trajectory)
    return MergeSampleScore(combined, sampler, scores, images=checked.images, batch_size=checked.batch_size)


def network() -> nn.Module:
    """A U-Net of 159,697 parameters on 8×8 grey images."""
    return small_unet(IMAGE_SHAPE, (16, 32))
