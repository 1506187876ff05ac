"""The contract of recipes: settings, the loss of one step, and the sampler of the trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lcsc_opt.base.settings import FrozenModel
from lcsc_opt.sampling.consistency import EDM_NOISE, SONG_NOISE, ConsistencyFunction

Kind = Literal["ddpm", "edm", "flow", "consistency"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(x [N, C, H, W], sigma [N]) -> D(x; sigma)``, the mean of the images that may have become the noisy x."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arguments of the loss of one step.

    Attributes:
        images: ``[N, C, H, W]`` in [-1, 1], or latents.
        step: how many steps came before.
        steps: of the whole training.
        network: what is trained.
        target: the network's moving average where the recipe keeps one, else the network itself. No gradient goes
            through it.
        generator: of this step's random numbers, on the device of the images.
        noise_scale: the network is told ``noise_scale * ln(sigma)``.
        teacher: of a distillation.
    """

    images: Tensor
    step: int
    steps: int
    network: nn.Module
    target: nn.Module
    generator: torch.Generator
    noise_scale: float = SONG_NOISE
    teacher: Denoiser | None = None

    def normal(self) -> Tensor:
        """Standard normal noise of the images' shape."""
        return torch.randn(self.images.shape, generator=self.generator, device=self.images.device)

    def normal_each(self) -> Tensor:
        """One standard normal number an image: ``[N]``."""
        return torch.randn(len(self.images), generator=self.generator, device=self.images.device)


class Recipe(FrozenModel):
    """Settings that every recipe has; its own are those of its paper, in the paper's words where these are words.

    Attributes:
        batch_size: images a step, on each device.
        learning_rate: constant, since averaging takes the part of a decay.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    begins_from: ClassVar[tuple[Kind, ...]]  # whose weights it can go on from
    optimizer: ClassVar[Literal["Adam", "RAdam"]] = "Adam"
    noise_scale: ClassVar[float] = SONG_NOISE
    curriculum: ClassVar[bool] = False  # whether a step depends on how many there will be
    needs: ClassVar[Literal["teacher", "from"] | None] = None
    latent: ClassVar[bool] = False

    batch_size: Count = 128
    learning_rate: Positive = 1e-3

    def loss(self, batch: Batch) -> Tensor:
        """What one step minimizes: a scalar."""
        raise NotImplementedError

    def target_rate(self, step: int, steps: int) -> float | None:  # noqa: ARG002
        """The rate of the target's moving average after a step; ``None`` where there is none."""
        return None

    def scheduler(self) -> dict[str, Any]:
        """The scheduler of diffusers that samples the model: its ``scheduler_config.json``."""
        raise NotImplementedError

    def prepare(self, network: nn.Module) -> None:
        """What of the network is fixed, before its first step."""

    @property
    def sampler(self) -> dict[str, Any]:
        """``sampler`` of a study of the model: the scheduler of its folder."""
        return {"steps": 10}

    @property
    def network_options(self) -> dict[str, Any]:
        """Options of a small U-Net that differ from the usual ones."""
        return {}


class ConsistencyRecipe(Recipe):
    """One whose model gives an image from any noise level in one step, with the boundary at the lowest level.

    Attributes:
        sigma_min: epsilon, the lowest noise level.
        sigma_max: T, the highest one; the papers have 80, for 32×32 images.
        sigma_data: the data's standard deviation.
    """

    kind: ClassVar[Kind] = "consistency"
    begins_from: ClassVar[tuple[Kind, ...]] = ("consistency", "edm")
    optimizer: ClassVar[Literal["Adam", "RAdam"]] = "RAdam"

    sigma_min: Positive = 0.002
    sigma_max: Positive = 20.0
    sigma_data: Positive = 0.5

    def function(self, batch: Batch, *, target: bool = False) -> ConsistencyFunction:
        """F of the student or of its target (Song et al. 2023, Eq. 5)."""
        return ConsistencyFunction(
            batch.target if target else batch.network,
            sigma_data=self.sigma_data,
            sigma_min=self.sigma_min,
            noise_scale=batch.noise_scale,
        )

    def scheduler(self) -> dict[str, Any]:
        """Multistep consistency sampling."""
        return consistency_scheduler(sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma_data=self.sigma_data)

    @property
    def sampler(self) -> dict[str, Any]:
        """One step."""
        return {"steps": 1}


def consistency_scheduler(*, sigma_min: float, sigma_max: float, sigma_data: float) -> dict[str, Any]:
    """Of a consistency model: multistep sampling, Song et al. 2023, Alg. 1."""
    return {
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": 40,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "sigma_data": sigma_data,
        "rho": 7.0,
        "clip_denoised": True,
    }


def timestep_scale(kind: Kind, noise_scale: float) -> float:
    """What diffusers' scheduler of such a model multiplies ln(sigma) with, and what the network is used to."""
    usual = {"edm": EDM_NOISE, "consistency": SONG_NOISE}.get(kind)
    return 1.0 if usual is None else noise_scale / usual


def column(values: Tensor) -> Tensor:
    """``[N]`` → ``[N, 1, 1, 1]``."""
    return values[:, None, None, None]
