"""Sampling through the schedulers of diffusers: DDPM, DDIM, DPM-Solver++, Heun, consistency models, …

The loop is that of diffusers' own unconditional pipelines, but noise belongs to an image's index.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, JsonValue, model_validator
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.records import Noise
from lcsc_opt.base.settings import FrozenModel, near_miss
from lcsc_opt.sampling.latents import LatentDecoder
from lcsc_opt.sampling.network import NetworkSampler, NetworkSettings
from lcsc_opt.sampling.noise import ClassLabels, ImageNoise

SchedulerName = Literal[
    "ddpm", "ddim", "dpm-solver++", "sde-dpm-solver++", "unipc", "heun", "euler", "euler-ancestral", "consistency",
    "lcm",
]  # fmt: skip

SCHEDULERS: dict[SchedulerName, tuple[str, dict[str, str]]] = {
    "ddpm": ("DDPMScheduler", {}),  # Ho et al. 2020
    "ddim": ("DDIMScheduler", {}),  # Song et al. 2021
    "dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),  # Lu et al. 2022
    "sde-dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),  # Zhao et al. 2023
    "heun": ("HeunDiscreteScheduler", {}),  # Karras et al. 2022, Algorithm 1
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "consistency": ("CMStochasticIterativeScheduler", {}),  # Song et al. 2023, Algorithm 1
    "lcm": ("LCMScheduler", {}),  # Luo et al. 2023, latent consistency models
}
"""Name → class in diffusers, and the settings of its configuration that the name stands for."""


class SchedulerSettings(FrozenModel):
    """``sampler:`` of a study file.

    Attributes:
        name: which scheduler; without it the pipeline's own.
        steps: how many; for most samplers that is the number of model calls.
        timesteps: which ones, in place of ``steps``, if the scheduler takes them: ``[22, 0]`` for a consistency model.
        scheduler: settings that replace those of its configuration: ``{solver_order: 3, clip_sample: false}``.
        step: further arguments of each step: ``{eta: 0.5}`` for DDIM.
    """

    name: SchedulerName | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    timesteps: Annotated[list[int], Field(min_length=1)] | None = None
    scheduler: dict[str, JsonValue] = Field(default={})
    step: dict[str, JsonValue] = Field(default={})

    @model_validator(mode="after")
    def _steps_or_timesteps(self) -> SchedulerSettings:
        if (self.steps is None) == (self.timesteps is None):
            raise ValueError("expected either steps or timesteps")
        return self


def build_scheduler(
    name: SchedulerName | None, config: Mapping[str, Any] | None, options: Mapping[str, Any] | None = None
) -> Any:
    """A scheduler of diffusers, as ``Scheduler.from_config(config, **options)`` makes it.

    Args:
        name: which one; ``None`` for the one that the configuration names.
        config: a pipeline's ``scheduler_config.json``; missing keys have the scheduler's own defaults.
        options: settings that replace those of ``config``.

    Raises:
        ObjectiveError: no name and no configuration, an unknown option, or values that the scheduler refuses.
    """
    diffusers = import_extra("diffusers")
    class_name, fixed = SCHEDULERS[name] if name else (str((config or {}).get("_class_name", "")), {})
    kind: Any = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        found = (
            f"the pipeline's {class_name!r} is none of diffusers'" if class_name else "there is no pipeline's to take"
        )
        raise ObjectiveError(f"sampler.name: {found}; name one of {', '.join(SCHEDULERS)}")
    known = list(inspect.signature(kind).parameters)
    changes = {**fixed, **(options or {})}
    if unknown := [option for option in changes if option not in known]:
        raise ObjectiveError(
            f"sampler.scheduler: {kind.__name__} has no option {unknown[0]!r}{near_miss(unknown[0], known)}; "
            f"it has {', '.join(known)}"
        )
    try:
        return cast("Any", kind).from_config(dict(config or {}), **changes)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ObjectiveError(f"sampler.scheduler: {kind.__name__}: {' '.join(str(error).split())}") from error


def set_timesteps(scheduler: Any, schedule: Mapping[str, Any]) -> Tensor:
    """``[T]`` timesteps, on the CPU like all numbers of a scheduler, which is then before its first step.

    Raises:
        ObjectiveError: the scheduler does not take them.
    """
    try:
        scheduler.set_timesteps(**schedule)
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ObjectiveError(f"sampler: {type(scheduler).__name__} refuses {schedule}: {reason}") from error
    timesteps: Tensor = scheduler.timesteps
    return timesteps


class DiffusersSampler(NetworkSampler):
    """Images from a network called as ``network(x, timesteps [N], class_labels=…)`` and a scheduler of diffusers.

    Args:
        network: gets the merged weights; such as ``UNet2DModel`` or ``DiTTransformer2DModel``.
        scheduler: any scheduler of diffusers with ``set_timesteps`` and ``step``; it is this sampler's alone.
        steps: how many steps of the scheduler; ``None`` with ``timesteps``.
        timesteps: the steps themselves, for schedulers that take them, such as those of consistency models.
        step_options: further arguments of the scheduler's ``step``, such as ``eta`` of DDIM.
        calls: how many model calls one call of the network counts as.
        timestep_scale: the network is told the scheduler's timesteps times this.
        image_shape, noise, labels, decoder, settings, trained: as of :class:`NetworkSampler`.

    Raises:
        ObjectiveError: the scheduler does not take these steps or options; no such device.
    """

    def __init__(
        self,
        network: nn.Module,
        scheduler: Any,
        *,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        image_shape: Sequence[int],
        noise: ImageNoise,
        labels: ClassLabels | None = None,
        decoder: LatentDecoder | None = None,
        step_options: Mapping[str, Any] | None = None,
        settings: NetworkSettings | None = None,
        trained: nn.Module | None = None,
        calls: int = 1,
        timestep_scale: float = 1.0,
    ) -> None:
        shared: dict[str, Any] = {"image_shape": image_shape, "noise": noise, "labels": labels, "decoder": decoder}
        super().__init__(network, settings, trained=trained, **shared)
        self.scheduler, self._timestep_scale = scheduler, timestep_scale
        self._schedule = {"num_inference_steps": steps} if timesteps is None else {"timesteps": list(timesteps)}
        self._step_options = dict(step_options or {})
        learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
        self._uses_variance = learned and type(scheduler).__name__ == "DDPMScheduler"
        self._guidance = None if labels is None else labels.guidance
        calls_of_a_step = calls * (1 if self._guidance is None else 2)
        self.nfe = len(self._timesteps()) * calls_of_a_step
        self.recomputed = self.nfe - calls_of_a_step  # all but those of the last step
        known = inspect.signature(scheduler.step).parameters
        if unknown := [option for option in self._step_options if option not in known]:
            raise ObjectiveError(f"sampler.step: {type(scheduler).__name__} has no {unknown[0]!r}")
        self._takes_generator = "generator" in known

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """``[stop - start, C, H, W]`` images in [-1, 1]."""
        z = self.noise.batch(noise, start, stop, self.image_shape).to(self._network.device, self._network.dtype)
        images: Tensor = z * self.scheduler.init_noise_sigma
        labels = self._labels(noise, start, stop)
        options = dict(self._step_options)
        if self._takes_generator:
            options["generator"] = self.noise.generators(noise, start, stop)
        timesteps = self._timesteps()
        for step, timestep in enumerate(timesteps):
            scaled = self.scheduler.scale_model_input(images, timestep)
            output = self._predict(scaled, timestep, labels, again=step < len(timesteps) - 1)
            images = self.scheduler.step(output, timestep, images, **options).prev_sample
        self._timesteps()  # multistep schedulers hold outputs, and with them the graph
        return self._decoded(images)

    def describe(self) -> dict[str, object]:
        """Settings that change the images."""
        return {
            **super().describe(),
            "sampler": type(self.scheduler).__name__,
            "scheduler": _plain(self.scheduler.config),
            "steps": self._schedule,
            "step_options": self._step_options,
            "network": type(self._network.trained).__name__,
            "architecture": _plain(getattr(self._network.module, "config", {})),
            **({} if self._timestep_scale == 1 else {"timestep_scale": self._timestep_scale}),
        }

    def _timesteps(self) -> Tensor:
        """``[T]`` timesteps; also resets the scheduler to its first step."""
        return set_timesteps(self.scheduler, self._schedule)

    def _predict(self, images: Tensor, timestep: Tensor, labels: Tensor | None, *, again: bool) -> Tensor:
        times = timestep.to(self._network.dtype if timestep.is_floating_point() else timestep.dtype)
        if self._timestep_scale != 1:
            times = times * self._timestep_scale
        times = times.to(images.device).expand(len(images))
        if labels is None:
            return self._kept(self._network(images, times, again=again))
        if self._guidance is None:
            return self._kept(self._network(images, times, class_labels=labels, again=again))
        scale, null_label = self._guidance
        classes = torch.cat([labels, torch.full_like(labels, null_label)])
        both = self._network(images.repeat(2, 1, 1, 1), times.repeat(2), class_labels=classes, again=again)
        conditional, unconditional = both.chunk(2)
        channels = self.image_shape[0]  # further channels are a learned variance, which is not guided
        difference = conditional[:, :channels] - unconditional[:, :channels]
        guided = unconditional[:, :channels] + scale * difference
        return self._kept(torch.cat([guided, conditional[:, channels:]], dim=1))

    def _kept(self, output: Tensor) -> Tensor:
        """The output without the learned variance, unless the scheduler uses that."""
        return output if self._uses_variance else output[:, : self.image_shape[0]]


def _plain(config: Mapping[str, Any]) -> dict[str, object]:
    """A configuration of diffusers without its private keys."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
