"""Diffusion and consistency models of diffusers that make images from noise, or from a class.

    objective:
      file: diffusers_unconditional.py
      settings:
        checkpoints: ddpm-output            # its checkpoint-N/unet folders; a packed trajectory; files, globs
        model: ddpm-output                  # the architecture, and the settings of the scheduler
        sampler: {name: dpm-solver++, steps: 10}
        reference: cifar10-train.npz

``model`` is the folder of a pipeline or of a model that ``save_pretrained`` wrote, or its ``config.json``. No weights
are read from it. ``sampler.name`` is ddpm, ddim, dpm-solver++, sde-dpm-solver++, unipc, heun, euler, euler-ancestral,
consistency or lcm; without a name the pipeline's own scheduler is used. The settings of training (betas, prediction
type, clipping) come from the pipeline, and ``sampler.scheduler`` changes single settings. Where the scheduler clips its
estimates, the last one, which is the image, is left to the metrics to clip:

    sampler: {name: ddim, steps: 50, step: {eta: 1.0}, scheduler: {clip_sample: false}}
    sampler: {name: consistency, timesteps: [22, 0]}      # two steps of a consistency model

With ``also``, reports measure the answer, EMA* and the last checkpoint in a second sampler, too:

    sampler: {name: ddim, steps: 10, also: {steps: 50}}

A model with classes needs ``labels``: ``balanced`` (classes take turns), ``random`` (drawn for each image) or
one class, such as 207. ``guidance: {scale: 1.5, null_label: 1000}`` adds classifier-free guidance. A model of latents
needs ``decoder: {autoencoder: FOLDER, raw_mean: [...], raw_std: [...], final_std: 0.5, low: -1}``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.progress import notice
from lcsc_opt.base.settings import FrozenModel, parse_settings, second_of
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.settings import ImageObjectiveSettings
from lcsc_opt.sampling import (
    ClassLabels,
    DecoderSettings,
    DiffusersFolder,
    DiffusersSampler,
    Labels,
    SchedulerSettings,
    build_scheduler,
)
from lcsc_opt.sampling.noise import guidance_advice


class GuidanceSettings(FrozenModel):
    """Classifier-free guidance.

    Attributes:
        scale: 1 is the model alone.
        null_label: the class that stands for no class.
    """

    scale: float
    null_label: Annotated[int, Field(ge=0)]


class Settings(ImageObjectiveSettings):
    """The settings of all objectives over images, and the model, its sampler, its classes and its decoder."""

    model: str
    sampler: SchedulerSettings
    image_shape: Annotated[list[int], Field(min_length=3, max_length=3)] | None = None
    labels: Labels | None = None
    guidance: GuidanceSettings | None = None
    decoder: DecoderSettings | None = None


def build(settings: dict[str, Any], context: BuildContext) -> Objective:
    """Build the network from its configuration; every candidate's weights come from the checkpoints."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    checked.check(context)
    folder = DiffusersFolder.read(context.path(checked.model))
    trajectory = checked.trajectory(context)
    sampler_of = _samplers(checked, folder, context)
    second = second_of(checked.sampler)
    also = None if second is None else sampler_of(second)
    return checked.objective(sampler_of(checked.sampler), trajectory, context, also=also)


def _samplers(
    checked: Settings, folder: DiffusersFolder, context: BuildContext
) -> Callable[[SchedulerSettings], DiffusersSampler]:
    """What makes samplers of one network, that of a search and a second one for reports: settings → sampler."""
    settings = checked.sampler
    if folder.scheduler is None and not settings.scheduler:
        notice(
            f"{folder.path} has no scheduler_config.json: using the scheduler's defaults for betas and prediction "
            "type; set others in sampler.scheduler"
        )
    image_shape = checked.image_shape or folder.image_shape()
    decoder = None
    if checked.decoder is not None:
        decoder = checked.decoder.build(image_shape[0], context)
    guidance = None
    if checked.guidance is not None:
        guidance = (checked.guidance.scale, checked.guidance.null_label)
    advice = ""
    if folder.classes is not None:
        advice = f"; {guidance_advice(folder.classes, folder.null_label)}"
    labels = ClassLabels.choose(
        checked.labels, classes=folder.classes, null_label=folder.null_label, guidance=guidance, advice=advice
    )
    noise = checked.noise(image_shape, labels)
    network = folder.network()

    def sampler_of(settings: SchedulerSettings) -> DiffusersSampler:
        return DiffusersSampler(
            network,
            build_scheduler(settings.name, folder.scheduler, settings.scheduler),
            settings,
            noise=noise,
            decoder=decoder,
            timestep_scale=folder.timestep_scale,
            settings=checked,
        )

    return sampler_of
