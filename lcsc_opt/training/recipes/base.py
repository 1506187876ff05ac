"""The contract of recipes: settings, the loss of one step, and the sampler of the trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lcsc_opt.base.settings import Count, FrozenModel, Positive
from lcsc_opt.sampling.consistency import EDM_NOISE, SONG_NOISE, ConsistencyFunction

Kind = Literal["ddpm", "edm", "flow", "consistency"]
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(x [N, C, H, W], sigma [N]) -> D(x; sigma)``, the mean of the images that may have become the noisy x."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arguments of the loss of one step.

    Attributes:
        images: ``[N, C, H, W]`` in [-1, 1].
        step: how many steps came before.
        steps: the number of steps of the whole training.
        network: the one that is trained.
        target: the network's moving average where the recipe keeps one, else the network itself. No gradient goes
            through it.
        generator: the generator of this step's random numbers, on the device of the images.
        noise_scale: the network's noise input is ``noise_scale * ln(sigma)``.
        teacher: the teacher of a distillation.
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

    def function(self, sigma_data: float, sigma_min: float = 0.0, *, target: bool = False) -> ConsistencyFunction:
        """The consistency function of the network, or of its target, with the boundary at ``sigma_min``.

        At 0 it is the denoiser D(x; sigma) of Karras et al. 2022, Eq. 7 with the coefficients of Table 1.
        """
        network = self.target if target else self.network
        return ConsistencyFunction(network, sigma_data=sigma_data, sigma_min=sigma_min, noise_scale=self.noise_scale)


class TrainingRecipe(FrozenModel):
    """The settings of every recipe. Each adds those of its paper, by the paper's names where it has some.

    Attributes:
        batch_size: images a step, on each device.
        learning_rate: constant, since averaging checkpoints replaces its decay.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    begins_from: ClassVar[tuple[Kind, ...]]  # kinds of models whose weights it can begin with
    optimizer: ClassVar[Literal["Adam", "RAdam"]] = "Adam"
    noise_scale: ClassVar[float] = SONG_NOISE  # the factor of ln(sigma) in the noise input of a new network
    curriculum: ClassVar[bool] = False  # whether a step depends on how many there will be
    needs_teacher: ClassVar[bool] = False
    sampler: ClassVar[dict[str, Any]] = {"steps": 10}  # the setting of a study of the model

    batch_size: Count = 128
    learning_rate: Positive = 1e-3

    def loss(self, batch: Batch) -> Tensor:
        """The scalar that one step minimizes."""
        raise NotImplementedError

    def target_rate(self, step: int, steps: int) -> float | None:  # noqa: ARG002
        """The rate of the target's moving average after a step; ``None`` if there is no average."""
        return None

    def scheduler(self) -> dict[str, Any]:
        """The scheduler of diffusers that samples the model: its ``scheduler_config.json``."""
        raise NotImplementedError

    @classmethod
    def timestep_scale(cls, noise_scale: float) -> float:
        """The network's factor of ln(sigma), divided by that of diffusers' scheduler for such a model.

        1 for the kinds whose networks are told a time and no noise level.
        """
        if cls.kind == "edm":
            return noise_scale / EDM_NOISE
        if cls.kind == "consistency":
            return noise_scale / SONG_NOISE
        return 1.0


def column(values: Tensor) -> Tensor:
    """``[N]`` → ``[N, 1, 1, 1]``, which multiplies images ``[N, C, H, W]``."""
    return values[:, None, None, None]
