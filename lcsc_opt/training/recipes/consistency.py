"""Recipes of consistency models, which give an image from any noise level in one step."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lcsc_opt.sampling.consistency import ConsistencyFunction, noise_levels
from lcsc_opt.training.recipes.base import (
    Batch,
    Count,
    Coupling,
    Finite,
    NonNegative,
    Positive,
    TrainingRecipe,
    column,
    denoising_weight,
)

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
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

    def scheduler(self) -> dict[str, Any]:
        """Multistep consistency sampling (Song et al. 2023, Alg. 1)."""
        return _scheduler(sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma_data=self.sigma_data)

    def _function(self, batch: Batch, *, target: bool = False) -> ConsistencyFunction:
        """F of the student or of its target (Song et al. 2023, Eq. 5)."""
        return batch.function(self.sigma_data, self.sigma_min, target=target)

    def _uniform_interval(self, count: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """``[N]`` lower and ``[N]`` upper ends of intervals between ``count`` levels, drawn uniformly."""
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
        """N(k) of Appendix C: ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1."""
        s0 = self.first_levels
        s1 = self.last_levels
        return math.ceil(math.sqrt(step / steps * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1

    def target_rate(self, step: int, steps: int) -> float:
        """mu(k) of Appendix C: exp(s0 ln(mu_0) / N(k))."""
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
    needs = "teacher"

    levels: Annotated[int, Field(ge=2)] = 18
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.95

    def loss(self, batch: Batch) -> Tensor:
        """E |f(x_{t_{n+1}}, t_{n+1}) - f^-(x^phi_{t_n}, t_n)|^2 with n uniform, lambda = 1 and the squared l2 norm.

        x^phi is one step of Heun's method on dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, Alg. 1).
        """
        assert batch.teacher is not None  # `needs` says so
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

    def loss(self, batch: Batch) -> Tensor:
        """Eq. 7: E d(f(x + sigma_{i+1} z, sigma_{i+1}), f(x + sigma_i z, sigma_i)) / (sigma_{i+1} - sigma_i)."""
        low, high, _ = self._draw_interval(batch)
        z = batch.normal()
        function = self._function(batch)
        with torch.no_grad():
            target = function(batch.images + column(low) * z, low)
        student = function(batch.images + column(high) * z, high)
        return (_pseudo_huber(student - target, _HUBER) / (high - low)).mean()

    def discretization(self, step: int, steps: int) -> int:
        """N(k) - 1, the number of intervals between noise levels at a step: it doubles on a schedule."""
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
        quantiles = torch.erf((levels.log() - self.noise_mean) / (math.sqrt(2) * self.noise_std))
        return levels, quantiles.diff() / 2

    def _draw_interval(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``[N]`` lower and ``[N]`` upper ends of the images' intervals, and the indices ``[N]`` of these."""
        levels, weights = self.levels(batch.step, batch.steps)
        device = batch.images.device
        levels = levels.float().to(device)
        interval = torch.multinomial(weights.to(device), len(batch.images), replacement=True, generator=batch.generator)
        return levels[interval], levels[interval + 1], interval


class Ect(TrainingRecipe):
    """Easy consistency tuning (Geng et al. 2024): a diffusion model that becomes a consistency model.

    The network at noise level t and, without a gradient, at r < t with the same noise; r nears t in stages. Where r is
    0 the target is the image itself, and the loss that of a diffusion model: tuning begins there.

    Attributes:
        sigma_max: where sampling begins; training draws any level.
        sigma_data: the data's standard deviation.
        noise_mean: P_mean, of the logarithm of the noise levels.
        noise_std: P_std of it.
        shrink: q: the gap of r and t is divided by it at every stage.
        stages: equal parts of the training, the first with q^1; the number is ours.
        gap_height: k of n(t) = 1 + k sigmoid(-b t), how much wider the gap is at little noise.
        gap_slope: b.
        huber: c / sqrt(CHW) of the loss sqrt(|x|^2 + c^2) - c.
    """

    name = "ect"
    kind = "consistency"
    begins_from = ("edm",)
    optimizer = "RAdam"
    curriculum = True
    needs = "from"
    sampler: ClassVar[dict[str, Any]] = {"steps": 1}

    learning_rate: Positive = 3e-4
    sigma_max: Positive = 20.0
    sigma_data: Positive = 0.5
    noise_mean: Finite = -1.1
    noise_std: Positive = 2.0
    shrink: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    stages: Count = 8
    gap_height: NonNegative = 8.0
    gap_slope: NonNegative = 1.0
    huber: Positive = _HUBER

    def loss(self, batch: Batch) -> Tensor:
        """E w(t) d(f(x + t e, t), sg f(x + r e, r)) with w(t) = 1 / t^2 + 1 / sigma_data^2.

        In stage a = 1, 2, … r is t (1 - n(t) / q^a), and at least 0.
        """
        t = (batch.normal_each() * self.noise_std + self.noise_mean).exp()
        stage = 1 + batch.step * self.stages // batch.steps
        gap = (1 + self.gap_height * torch.sigmoid(-self.gap_slope * t)) / self.shrink**stage
        r = (t * (1 - gap)).clamp(min=0)
        noise = batch.normal()
        function = batch.function(self.sigma_data)
        with torch.no_grad():
            level = torch.where(r > 0, r, t)  # where r is 0 any valid level does: the result is not used
            denoised = function(batch.images + column(r) * noise, level)
            target = torch.where(column(r) > 0, denoised, batch.images)  # f(x, 0) = x
        difference = function(batch.images + column(t) * noise, t) - target
        loss: Tensor = (denoising_weight(t, self.sigma_data) * _pseudo_huber(difference, self.huber)).mean()
        return loss

    def scheduler(self) -> dict[str, Any]:
        """Multistep consistency sampling, with the boundary at no noise."""
        return _scheduler(sigma_min=0.0, sigma_max=self.sigma_max, sigma_data=self.sigma_data)


class Slct(Ict):
    """Improved training of latent consistency models (Dao et al. 2025), with a loss robust to outliers of latents.

    The abstract names the techniques; the numbers beyond it are those of the authors' published experiments
    (github.com/quandao10/LCT): c as a function of the number of noise levels, the lowest quarter of these, and the
    weight 5 of the diffusion loss.

    Attributes:
        diffusion_share: the share of the noise levels, the lowest ones, at which the image itself is a second target.
        diffusion_weight: the weight of that loss.
        coupling: the coupling of noise and images in a batch.
    """

    name = "slct"
    latent = True
    network_options: ClassVar[dict[str, Any]] = {"norm_num_groups": 1}  # which makes it layer normalization

    diffusion_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    diffusion_weight: NonNegative = 5.0
    coupling: Coupling = "optimal-transport"

    def loss(self, batch: Batch) -> Tensor:
        """The Cauchy loss of iCT's difference, and the diffusion loss of the student where there is little noise.

        The Cauchy loss is ln(1 + m / (2 c^2)) of the mean square m, which does not depend on the size of the latents.
        """
        low, high, interval = self._draw_interval(batch)
        count = self.discretization(batch.step, batch.steps)
        noise = batch.normal(self.coupling)
        function = self._function(batch)
        with torch.no_grad():
            target = function(batch.images + column(low) * noise, low)
        student = function(batch.images + column(high) * noise, high)

        mean_squares = (student - target).flatten(1).square().mean(1)
        c = self._robustness(count)
        consistency = (torch.log1p(mean_squares / (2 * c**2)) / (high - low)).mean()

        has_little_noise = interval < math.floor(self.diffusion_share * count)
        squared_errors = (student - batch.images).square().flatten(1).mean(1)
        errors = denoising_weight(high, self.sigma_data) * squared_errors
        diffusion = (errors * has_little_noise).sum() / has_little_noise.sum().clamp(min=1)
        total: Tensor = consistency + self.diffusion_weight * diffusion
        return total

    def _robustness(self, count: int) -> float:
        """C of the Cauchy loss with ``count`` intervals between noise levels."""
        if count > self.first_discretization:
            return math.exp(-1.15 * math.log(count) - 0.85)
        return _HUBER * math.sqrt(4 * 32 * 32)  # iCT's, of the latents of 256×256 images

    def prepare(self, network: nn.Module) -> None:
        """Non-scaling layer normalization: the scales are one, and stay so."""
        for module in network.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, _NORMS) and weight is not None:
                with torch.no_grad():
                    weight.fill_(1.0)
                weight.requires_grad_(requires_grad=False)

    def scheduler(self) -> dict[str, Any]:
        """Multistep consistency sampling; latents have no bounds to clip to."""
        scheduler = super().scheduler()
        scheduler["clip_denoised"] = False
        return scheduler


def _scheduler(*, sigma_min: float, sigma_max: float, sigma_data: float) -> dict[str, Any]:
    return {
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": 40,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "sigma_data": sigma_data,
        "rho": 7.0,
        "clip_denoised": True,
    }


def _squared_l2(difference: Tensor) -> Tensor:
    """The mean over the batch of the squared l2 norms of ``[N, C, H, W]``."""
    return difference.flatten(1).square().sum(1).mean()


def _pseudo_huber(difference: Tensor, scale: float) -> Tensor:
    """``[N, C, H, W]`` → ``[N]``: sqrt(|x|^2 + c^2) - c with c = ``scale`` sqrt(CHW)."""
    c = scale * math.sqrt(difference[0].numel())
    return (difference.flatten(1).square().sum(1) + c * c).sqrt() - c
