"""A consistency model of 32×32 crops of two colour photographs, trained here, sampled in one step, scored by FID.

Nothing is downloaded: the photographs are bundled with scikit-learn, and the U-Net is diffusers'. The features are
those of a small network that is trained to tell the photograph and the part of it that a crop comes from. The first use
trains both networks, in a few minutes on two cores; afterwards they come from the cache.
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
from lcsc_opt.training.images import photographs_crops, second_photographs_view, train_photographs_network
from lcsc_opt.training.networks import PatchedUNet
from lcsc_opt.training.scoring import ScoredImages

IMAGE_SHAPE = (3, 32, 32)
NETWORK = "PatchedUNet 4, 32-64"


class Settings(ScoredImages):
    """An evaluation samples ``images`` images in ``nfe`` steps; ``training_*`` are the length and seed of the training.

    ``select`` says which of its checkpoints are combined.
    """

    images: Annotated[int, Field(ge=65)] = 1000  # with 64 or fewer, the covariance of 64 features has no full rank
    batch_size: Annotated[int, Field(ge=1)] = 250
    nfe: Annotated[int, Field(ge=1, le=4)] = 1
    noise_seed: Annotated[int, Field(ge=0)] = 0
    training_steps: Annotated[int, Field(ge=2)] = 3000
    checkpoint_every: Annotated[int, Field(ge=1)] = 15
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
        steps=checked.training_steps,
        checkpoint_every=checked.checkpoint_every,
        batch_size=32,
        learning_rate=3e-3,
        seed=checked.training_seed,
        sigma_max=80.0,
        last_discretization=20,  # few noise levels, and more of the high ones, so that training takes minutes
        noise_mean=0.5,
    )
    cache = cache_directory()
    crops = photographs_crops()
    extractor = train_photographs_network(seed=0, cache=cache)
    trajectory = train_consistency(
        network,
        checked.seen(crops),
        training=training,
        path=cache / f"photographs-{checked.key(training.key(NETWORK))}.trajectory",
        description="training a consistency model of photographs",
    )
    function = ConsistencyFunction(network(), sigma_data=training.sigma_data, sigma_min=training.sigma_min)
    sigmas = [training.sigma_max * 0.1**step for step in range(checked.nfe)]
    sampler = ConsistencySampler(function, image_shape=IMAGE_SHAPE, sigmas=sigmas, noise=ImageNoise(checked.noise_seed))
    cross_check = functools.partial(second_photographs_view, cache)
    scores = checked.scores(extractor, crops, cross_check)
    combined = checked.select.of(trajectory)
    return MergeSampleScore(combined, sampler, scores, images=checked.images, batch_size=checked.batch_size)


def network() -> nn.Module:
    """A U-Net of 661,392 parameters on 32×32 colour images, in patches of 4×4 pixels."""
    return PatchedUNet(IMAGE_SHAPE, (32, 64), patch=4)
