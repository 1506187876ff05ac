"""Sampling through the schedulers of diffusers: DDPM, DDIM, DPM-Solver++, Heun, consistency models, …

The loop is that of diffusers' own unconditional pipelines, but noise belongs to an image's index.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field, JsonValue, model_validator
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError, text_of
from lcsc_opt.base.imports import has_parameter, import_extra
from lcsc_opt.base.records import Noise
from lcsc_opt.base.settings import AlsoSettings, Count, near_miss
from lcsc_opt.sampling.diffusers_folder import find_diffusers_class
from lcsc_opt.sampling.latents import LatentDecoder
from lcsc_opt.sampling.network import NetworkSampler, NetworkSettings
from lcsc_opt.sampling.noise import ImageNoise

Schedulers = dict[str, tuple[str, dict[str, Any]]]
"""Name → class in diffusers, and the settings of its configuration that the name stands for."""

SCHEDULERS: Schedulers = {
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
"""All that a study file may name, as a model without a scheduler of its own has them."""

_DPM_SOLVER = "DPMSolverMultistepScheduler"
_FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_VARIANCE_PRESERVING = (
    "DDIM",
    "DDPMParallel",
    "DDPMScheduler",
    "DEISMultistep",
    "DPMSolver",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "KDPM2",
    "LCM",
    "LMSDiscrete",
    "PNDM",
    "SASolver",
    "TCD",
    "UniPC",
)
_DENOISERS: Schedulers = {name: scheduler for name, scheduler in SCHEDULERS.items() if name != "consistency"}
_FAMILIES: dict[str, Schedulers] = {
    **dict.fromkeys(_VARIANCE_PRESERVING, _DENOISERS),
    "FlowMatch": {
        "euler": ("FlowMatchEulerDiscreteScheduler", {}),
        "heun": ("FlowMatchHeunDiscreteScheduler", {}),
        "lcm": ("FlowMatchLCMScheduler", {}),
        "dpm-solver++": (_DPM_SOLVER, {"algorithm_type": "dpmsolver++", **_FLOW_SIGMAS}),
        "sde-dpm-solver++": (_DPM_SOLVER, {"algorithm_type": "sde-dpmsolver++", **_FLOW_SIGMAS}),
        "unipc": ("UniPCMultistepScheduler", _FLOW_SIGMAS),
    },
    "EDM": {
        "euler": ("EDMEulerScheduler", {}),
        "dpm-solver++": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        "sde-dpm-solver++": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    },
    "CMStochasticIterative": {"consistency": SCHEDULERS["consistency"]},
}
"""How the classes of a family begin whose networks predict the same → what its schedulers are. What networks of all
other classes predict is not known, so they have no other scheduler than their own."""

_CLIPS = ("clip_sample", "clip_denoised")  # the settings by which schedulers clip their estimate of the image


class SchedulerSettings(AlsoSettings):
    """``sampler:`` of a study file.

    Attributes:
        name: which of :data:`SCHEDULERS`; without it the pipeline's own.
        steps: how many; for most samplers that is the number of model calls.
        timesteps: the steps themselves, if the scheduler accepts them: ``[22, 0]`` for a consistency model.
        scheduler: settings that replace those of its configuration: ``{solver_order: 3, clip_sample: false}``.
        step: further arguments of each step: ``{eta: 0.5}`` for DDIM.
        also: what differs in the sampler that only reports use: ``{steps: 50}``.
    """

    name: str | None = None
    steps: Count | None = None
    timesteps: Annotated[list[int], Field(min_length=1)] | None = None
    scheduler: dict[str, JsonValue] = Field(default={})
    step: dict[str, JsonValue] = Field(default={})

    @model_validator(mode="after")
    def _check(self) -> SchedulerSettings:
        if self.name not in (None, *SCHEDULERS):
            raise ValueError(f"name: expected one of {', '.join(SCHEDULERS)}, got {self.name!r}")
        if (self.steps is None) == (self.timesteps is None):
            raise ValueError("expected either steps or timesteps")
        return self

    @property
    def timestep_arguments(self) -> dict[str, Any]:
        """The arguments of a scheduler's ``set_timesteps``, and of a pipeline's call: the timesteps, or how many."""
        if self.timesteps is not None:
            return {"timesteps": self.timesteps}
        return {"num_inference_steps": self.steps}


def build_scheduler(
    name: str | None, config: Mapping[str, Any] | None, options: Mapping[str, Any] | None = None
) -> Any:
    """A scheduler of diffusers, as ``Scheduler.from_config(config, **options)`` makes it.

    Args:
        name: which one; ``None`` for the one that the configuration names.
        config: a pipeline's ``scheduler_config.json``; missing keys have the scheduler's own defaults.
        options: settings that replace those of ``config``.

    Raises:
        ObjectiveError: no name and no configuration, an unknown option, or values that the scheduler refuses.
    """
    pipeline_config = dict(config or {})
    class_name = str(pipeline_config.get("_class_name", ""))
    changes: dict[str, Any] = {}
    if name is not None:
        class_name, changes = _in_family(name, pipeline_config)
    changes = {**changes, **(options or {})}  # what a user says replaces what the name stands for
    names = ", ".join(SCHEDULERS)
    if not class_name:
        raise ObjectiveError(f"sampler.name: the model comes without a scheduler; name one of {names}")
    scheduler_class = find_diffusers_class(class_name, "SchedulerMixin")
    if scheduler_class is None:
        raise ObjectiveError(
            f"sampler.name: the pipeline's {class_name!r} is not a scheduler of diffusers; name one of {names}"
        )
    parameters = list(inspect.signature(scheduler_class).parameters)
    for option in changes:
        if option not in parameters:
            raise ObjectiveError(
                f"sampler.scheduler: {class_name} has no option {option!r}{near_miss(option, parameters)}; "
                f"it has {', '.join(parameters)}"
            )
    try:
        return scheduler_class.from_config(pipeline_config, **changes)
    except Exception as error:  # schedulers raise all kinds of errors for wrong settings
        raise ObjectiveError(f"sampler.scheduler: {class_name}: {text_of(error)}") from error


def _in_family(name: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class of a scheduler for networks like the pipeline's, and its settings.

    Raises:
        ObjectiveError: there is none: it would take what the network predicts for something else.
    """
    own_class = str(config.get("_class_name", ""))
    predicts_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if not own_class:  # a model without a scheduler's configuration: the user knows what it predicts
        schedulers = SCHEDULERS
    elif predicts_flow:  # whatever the class, as DPM-Solver's with these settings
        schedulers = _FAMILIES["FlowMatch"]
    else:
        schedulers = next((family for start, family in _FAMILIES.items() if own_class.startswith(start)), {})
    if name not in schedulers:
        raise ObjectiveError(
            f"sampler.name: {name} is not for a network of {own_class}, whose predictions mean something else; "
            f"leave it out, or name one of these: {', '.join(schedulers) or 'none'}"
        )
    class_name, settings = schedulers[name]
    if "shift" in config and "use_flow_sigmas" in settings:
        settings = {**settings, "flow_shift": config["shift"]}  # what those other schedulers call it
    return class_name, settings


def set_timesteps(scheduler: Any, schedule: SchedulerSettings) -> Tensor:
    """``[T]`` timesteps, on the CPU like all numbers of a scheduler, which is then before its first step.

    Raises:
        ObjectiveError: the scheduler does not accept them.
    """
    try:
        scheduler.set_timesteps(**schedule.timestep_arguments)
    except Exception as error:  # schedulers raise all kinds of errors for wrong timesteps
        name = type(scheduler).__name__
        raise ObjectiveError(f"sampler: {name} refuses {schedule.timestep_arguments}: {text_of(error)}") from error
    timesteps: Tensor = scheduler.timesteps
    return timesteps


class DiffusersSampler(NetworkSampler):
    """Images from a network called as ``network(x, timesteps [N], class_labels=…)`` and a scheduler of diffusers.

    Args:
        network: gets the merged weights; such as ``UNet2DModel`` or ``DiTTransformer2DModel``.
        scheduler: any scheduler of diffusers with ``set_timesteps`` and ``step``; it is this sampler's alone.
        schedule: the scheduler's steps, and further arguments of each; what chose the scheduler itself is not read.
        timestep_scale: the network is told the scheduler's timesteps times this.
        noise, decoder, settings: as of :class:`NetworkSampler`.

    Raises:
        ObjectiveError: the scheduler does not accept these steps; no such device.
    """

    def __init__(
        self,
        network: nn.Module,
        scheduler: Any,
        schedule: SchedulerSettings,
        *,
        noise: ImageNoise,
        decoder: LatentDecoder | None = None,
        settings: NetworkSettings | None = None,
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__(network, settings, noise=noise, decoder=decoder)
        self.scheduler = scheduler
        self._timestep_scale = timestep_scale
        self._schedule = schedule
        # DDPM's step expects the learned variance as further channels; the steps of others expect the prediction alone
        learns_variance = str(scheduler.config.get("variance_type", "")).startswith("learned")
        self._uses_variance = learns_variance and type(scheduler).__name__.startswith("DDPM")
        self._guidance: tuple[float, int] | None = None
        if noise.labels is not None:
            self._guidance = noise.labels.guidance
        self._takes_generator = has_parameter(scheduler.step, "generator")
        calls_of_step = 1 if self._guidance is None else 2
        self.nfe = calls_of_step * len(set_timesteps(scheduler, schedule))
        self.recomputed = self.nfe - calls_of_step

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """``[stop - start, C, H, W]`` images, nominally in [-1, 1]."""
        z = self.noise.batch(noise, start, stop)
        z = z.to(self._network.device, self._network.dtype)
        images: Tensor = z * getattr(self.scheduler, "init_noise_sigma", 1.0)  # those of flow matching have none
        labels = self._labels(noise, start, stop)
        options: dict[str, Any] = dict(self._schedule.step)
        if self._takes_generator:
            options["generator"] = self.noise.generators(noise, start, stop)
        timesteps = set_timesteps(self.scheduler, self._schedule)
        for step, timestep in enumerate(timesteps):
            scaled = images
            if hasattr(self.scheduler, "scale_model_input"):
                scaled = self.scheduler.scale_model_input(images, timestep)
            is_last = step == len(timesteps) - 1
            output = self._predict(scaled, timestep, labels, recompute=not is_last)
            with self._clipping(is_last=is_last):
                images = self.scheduler.step(output, timestep, images, **options).prev_sample
        # frees the outputs that multistep schedulers hold, and with them the graph
        set_timesteps(self.scheduler, self._schedule)
        return self._decoded(images)

    def describe(self) -> dict[str, object]:
        """Settings that change the images."""
        return {
            **super().describe(),
            "sampler": type(self.scheduler).__name__,
            "scheduler": public_keys(self.scheduler.config),
            "steps": self._schedule.timestep_arguments,
            "step_options": self._schedule.step,
            "network": type(self.network).__name__,
            "architecture": public_keys(getattr(self._network.module, "config", None)),
            "timestep_scale": self._timestep_scale,
        }

    @contextlib.contextmanager
    def _clipping(self, *, is_last: bool) -> Iterator[None]:
        """While this is open, a scheduler clips its estimates of the image as its configuration says, but not the last.

        That one is the image: metrics see by how much it leaves [-1, 1], and clip it themselves. Latents are no images,
        and the last ones are clipped, too.
        """
        if not is_last or self.decoder is not None:
            yield
            return
        clips = {name: self.scheduler.config[name] for name in _CLIPS if name in self.scheduler.config}
        self.scheduler.register_to_config(**dict.fromkeys(clips, False))
        try:
            yield
        finally:
            self.scheduler.register_to_config(**clips)

    def _predict(
        self,
        images: Tensor,
        timestep: Tensor,
        labels: Tensor | None,
        *,
        recompute: bool,
    ) -> Tensor:
        """What the scheduler's ``step`` expects of the network: ``[N, C, H, W]``, of DDPM perhaps with a variance.

        ``timestep`` is of the shape ``[]``, ``labels`` are ``[N]``; ``recompute`` is that of :class:`PreparedNetwork`.
        """
        if timestep.is_floating_point():  # those of consistency models are float64
            timestep = timestep.to(self._network.dtype)
        if self._timestep_scale != 1:
            timestep = timestep * self._timestep_scale
        times = timestep.to(images.device).expand(len(images))
        if labels is None:
            output = self._network(images, times, recompute=recompute)
        elif self._guidance is None:
            output = self._network(images, times, class_labels=labels, recompute=recompute)
        else:
            output = self._guided_output(images, times, labels, self._guidance, recompute=recompute)
        if self._uses_variance:
            return output
        return output[:, : self.noise.shape[0]]  # without a variance that the network may have learned

    def _guided_output(
        self,
        images: Tensor,
        times: Tensor,
        labels: Tensor,
        guidance: tuple[float, int],
        *,
        recompute: bool,
    ) -> Tensor:
        """Classifier-free guidance: conditional and unconditional outputs from one call on twice as many images."""
        scale, null_label = guidance
        labels_and_null = torch.cat([labels, torch.full_like(labels, null_label)])
        outputs = self._network(
            images.repeat(2, 1, 1, 1), times.repeat(2), class_labels=labels_and_null, recompute=recompute
        )
        conditional, unconditional = outputs.chunk(2)
        channels = self.noise.shape[0]  # further channels are a learned variance, which is not guided
        difference = conditional[:, :channels] - unconditional[:, :channels]
        guided = unconditional[:, :channels] + scale * difference
        return torch.cat([guided, conditional[:, channels:]], dim=1)


def public_keys(config: object) -> dict[str, object]:
    """A configuration of diffusers without its private keys; empty for what a user's own network calls by that name.

    Also without infinities, which are defaults, and which JSON does not have.
    """
    if not isinstance(config, import_extra("diffusers.configuration_utils").FrozenDict):
        return {}
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    return {name: value for name, value in public.items() if not (isinstance(value, float) and math.isinf(value))}
