"""Recipes of consistency models, which give an image from any noise level in one step."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lcsc_opt.base.settings import Count, Finite, Positive
from lcsc_opt.sampling.consistency import ConsistencyFunction, noise_levels
from lcsc_opt.training.recipes.base import Batch, TrainingRecipe, column

_HUBER = 0.00054  # c / sqrt(CHW) of Song & Dhariwal 2023, Sec. 3.3


class ConsistencyRecipe(TrainingRecipe):
    """A recipe of consistency functions whose boundary is at the lowest noise level.

    Attributes:
        sigma_min: epsilon, the lowest noise level.
        sigma_max: T, the highest one; the papers have 80, for 32×32 images.
        sigma_data: the data's standard deviation.
    """

    kind = "consistency"
    begins_from = ("edm", "consistency")
    optimizer = "RAdam"
    sampler: ClassVar[dict[str, Any]] = {"steps": 1}

    sigma_min: Positive = 0.002
    sigma_max: Positive = 20.0
    sigma_data: Positive = 0.5

    @model_validator(mode="after")
    def _check_noise_levels(self) -> ConsistencyRecipe:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_max: expected more than sigma_min, {self.sigma_min:g}, got {self.sigma_max:g}")
        return self

    def scheduler(self) -> dict[str, Any]:
        """Multistep consistency sampling (Song et al. 2023, Alg. 1)."""
        return {
            "_class_name": "CMStochasticIterativeScheduler",
            "num_train_timesteps": 40,  # diffusers' default
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "sigma_data": self.sigma_data,
            "rho": 7.0,
            "clip_denoised": True,
        }

    def _function(self, batch: Batch, *, target: bool = False) -> ConsistencyFunction:
        """The function f of the student, or of its moving average, the target (Song et al. 2023, Eq. 5)."""
        return batch.function(self.sigma_data, self.sigma_min, target=target)

    def _uniform_interval(self, count: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """``[N]`` lower and ``[N]`` upper ends of the images' intervals, drawn uniformly.

        Each interval lies between neighbours of ``count`` noise levels.
        """
        device = batch.images.device
        levels = noise_levels(count, sigma_min=self.sigma_min, sigma_max=self.sigma_max).float().to(device)
        size = (len(batch.images),)
        lower = torch.randint(len(levels) - 1, size, generator=batch.generator, device=device)
        return levels[lower], levels[lower + 1]


class Ct(ConsistencyRecipe):
    """Consistency training (Song et al. 2023, Alg. 3).

    The student at the upper of two noise levels, its moving average at the lower one, with the same noise. The paper's
    150 for ``last_levels`` and 0.9 for ``first_rate`` are for 800,000 steps: an average of the last 700 of them at the
    end, which in a training of a few hundred steps is the network that it began with.

    Attributes:
        first_levels: s0, noise levels at the start.
        last_levels: s1, noise levels at the end.
        first_rate: mu_0, rate of the target's moving average at the start.
    """

    name = "ct"
    curriculum = True

    first_levels: Annotated[int, Field(ge=2)] = 2
    last_levels: Count = 20
    first_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05

    def loss(self, batch: Batch) -> Tensor:
        """E |f(x + t_{n+1} z, t_{n+1}) - f^-(x + t_n z, t_n)|^2 with n uniform, lambda = 1 and the squared l2 norm."""
        low, high = self._uniform_interval(self.level_count(batch.step, batch.steps), batch)
        z = batch.normal()
        with torch.no_grad():
            target = self._function(batch, target=True)(batch.images + column(low) * z, low)
        student = self._function(batch)(batch.images + column(high) * z, high)
        return _squared_l2(student - target)

    def level_count(self, step: int, steps: int) -> int:
        """N(k) of Appendix C, noise levels at step k of K: ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1."""
        s0 = self.first_levels
        s1 = self.last_levels
        return math.ceil(math.sqrt(step / steps * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1

    def target_rate(self, step: int, steps: int) -> float:
        """mu(k) of Appendix C, which grows with the number of levels: exp(s0 ln(mu_0) / N(k))."""
        return math.exp(self.first_levels * math.log(self.first_rate) / self.level_count(step, steps))


class Cd(ConsistencyRecipe):
    """Consistency distillation (Song et al. 2023, Alg. 2).

    The student at the upper of two noise levels is compared with its moving average at the lower one, at the point to
    which the teacher's probability flow leads.

    Attributes:
        levels: N, noise levels; 18 on CIFAR-10, 40 on ImageNet.
        rate: mu, of the target's moving average.
    """

    name = "cd"
    needs_teacher = True

    levels: Annotated[int, Field(ge=2)] = 18
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.95

    def loss(self, batch: Batch) -> Tensor:
        """E |f(x_{t_{n+1}}, t_{n+1}) - f^-(x^phi_{t_n}, t_n)|^2 with n uniform, lambda = 1 and the squared l2 norm.

        x^phi is one step of Heun's method on dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, Alg. 1).
        """
        assert batch.teacher is not None  # `needs_teacher`: `run` refuses to train without one
        low, high = self._uniform_interval(self.levels, batch)
        noisy = batch.images + column(high) * batch.normal()
        with torch.no_grad():
            slope_at_high = (noisy - batch.teacher(noisy, high)) / column(high)
            euler = noisy + column(low - high) * slope_at_high
            slope_at_low = (euler - batch.teacher(euler, low)) / column(low)
            heun = noisy + column(low - high) * (slope_at_high + slope_at_low) / 2
            target = self._function(batch, target=True)(heun, low)
        student = self._function(batch)(noisy, high)
        return _squared_l2(student - target)

    def target_rate(self, step: int, steps: int) -> float:  # noqa: ARG002
        """The constant mu."""
        return self.rate


class Ict(ConsistencyRecipe):
    """Improved consistency training (Song & Dhariwal 2023, Eq. 7 and Table 1).

    Student and teacher are one network, compared by the pseudo-Huber loss. The paper's 80 for ``sigma_max`` and 1280
    for ``last_discretization`` are for 32×32 images and 400,000 steps.

    Attributes:
        first_discretization: s0, intervals between noise levels at the start.
        last_discretization: s1, those at the end.
        noise_mean: P_mean, of the logarithm of the noise levels.
        noise_std: P_std of it.
    """

    name = "ict"
    curriculum = True

    first_discretization: Count = 10
    last_discretization: Count = 160
    noise_mean: Finite = -1.1
    noise_std: Positive = 2.0

    @model_validator(mode="after")
    def _check_schedule(self) -> Ict:
        """Refuse settings by which no interval could be drawn; one step tells, as later ones divide the same range."""
        first = self.first_discretization
        if first > self.last_discretization:
            raise ValueError(f"last_discretization: expected at least first_discretization, {first}")
        if not self.levels(0, 1)[1].sum() > 0:
            raise ValueError("noise_mean: with noise_std, it leaves no noise between sigma_min and sigma_max")
        return self

    def loss(self, batch: Batch) -> Tensor:
        """Eq. 7: E d(f(x + sigma_{i+1} z, sigma_{i+1}), f(x + sigma_i z, sigma_i)) / (sigma_{i+1} - sigma_i)."""
        low, high = self._draw_interval(batch)
        z = batch.normal()
        function = self._function(batch)
        with torch.no_grad():
            target = function(batch.images + column(low) * z, low)
        student = function(batch.images + column(high) * z, high)
        return (_pseudo_huber(student - target) / (high - low)).mean()

    def discretization(self, step: int, steps: int) -> int:
        """N(k) - 1 of Table 1, the number of intervals between noise levels at step k of K.

        It doubles every floor(K / (log2(floor(s1 / s0)) + 1)) steps, up to s1.
        """
        s0 = self.first_discretization
        s1 = self.last_discretization
        steps_between_doublings = max(int(steps / (math.log2(s1 // s0) + 1)), 1)
        return int(min(s0 * 2 ** (step // steps_between_doublings), s1))

    def levels(self, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Noise levels ``[n + 1]``, increasing, and the weights ``[n]`` of the intervals between them at a step.

        The weights are the probabilities of the intervals in a lognormal distribution. They sum to less than one, since
        levels below the first and above the last are left out.
        """
        count = self.discretization(step, steps)
        levels = noise_levels(count + 1, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        erf = torch.erf((levels.log() - self.noise_mean) / (math.sqrt(2) * self.noise_std))
        return levels, erf.diff() / 2  # a normal distribution has the probability (1 + erf) / 2 below a level

    def _draw_interval(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``[N]`` lower and ``[N]`` upper ends of the images' intervals, drawn by their weights."""
        levels, weights = self.levels(batch.step, batch.steps)
        device = batch.images.device
        levels = levels.float().to(device)
        interval = torch.multinomial(weights.to(device), len(batch.images), replacement=True, generator=batch.generator)
        return levels[interval], levels[interval + 1]


def _squared_l2(difference: Tensor) -> Tensor:
    """The mean over the batch of the squared l2 norms of ``[N, C, H, W]``."""
    return difference.flatten(1).square().sum(1).mean()


def _pseudo_huber(difference: Tensor) -> Tensor:
    """``[N, C, H, W]`` → ``[N]``: sqrt(|x|^2 + c^2) - c."""
    c = _HUBER * math.sqrt(difference[0].numel())
    return (difference.flatten(1).square().sum(1) + c * c).sqrt() - c
