"""Text-to-image pipelines of diffusers: the checkpoints of a U-Net, of a transformer, or of a LoRA such as LCM-LoRA.

For a LoRA that was trained to sample in four steps::

    settings:
      pipeline: stable-diffusion-v1-5/stable-diffusion-v1-5
      component: lora
      checkpoints: lcm-lora/checkpoint-*/unet_lora
      sampler: {name: lcm, steps: 4}
      prompts: prompts.txt
      reference: photographs/
      dtype: fp16

It needs transformers, accelerate and, for a LoRA, peft.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.settings import Positive, parse_settings, second_of
from lcsc_opt.checkpoints.lora import LoraAlphas, lora_flavour, warn_of_two_forms
from lcsc_opt.objective.contract import Objective
from lcsc_opt.objective.settings import ImageObjectiveSettings
from lcsc_opt.sampling.diffusers_sampler import SchedulerSettings, build_scheduler
from lcsc_opt.sampling.text_to_image import LatentDiffusionSampler, load_pipeline, read_prompts
from lcsc_opt.trajectory import Trajectory

Pixels = Annotated[int, Field(ge=8, multiple_of=8)]


class Settings(ImageObjectiveSettings):
    """The settings of all objectives over images, and these.

    Attributes:
        pipeline: a folder that ``save_pretrained`` wrote, or a name at the Hugging Face hub.
        component: what the checkpoints hold: the pipeline's ``unet`` or ``transformer``, or a ``lora``.
        lora_alpha: of LoRA checkpoints, if neither they nor a configuration next to them contain it.
        sampler: scheduler and steps; without a name the pipeline's own scheduler. ``also`` is another one, for reports.
        guidance_scale: above 1 every step needs two model calls (one for a latent consistency model).
        negative_prompt: guidance leads away from it; by default the pipeline's.
        prompts: a text file, one prompt a line, or a list of prompts; at most as many as ``images``. Image i has prompt
            i mod n. Each is encoded once in a process, unless the LoRA changes a text encoder.
        held_out_prompts: the same, for held-out images.
        height: of the images, in pixels; by default the height that the model was trained on.
        width: of the images, likewise.
        dtype: of the network's arithmetic, and of the pipeline's weights.
    """

    pipeline: str
    component: Literal["unet", "transformer", "lora"] = "unet"
    lora_alpha: Positive | None = None
    sampler: SchedulerSettings
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    negative_prompt: str | None = None
    prompts: str | list[str]
    held_out_prompts: str | list[str] | None = None
    height: Pixels | None = None
    width: Pixels | None = None

    @model_validator(mode="after")
    def _alpha_belongs_to_a_lora(self) -> Settings:
        if self.component != "lora" and self.lora_alpha:
            raise ValueError("lora_alpha is for component: lora")
        return self


def build(settings: dict[str, Any], context: BuildContext) -> Objective:
    """Load the pipeline, open the checkpoints, and put sampler and metrics together."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    checked.check(context)
    prompts = _prompts(checked.prompts, context)
    if len(prompts) > checked.images:
        raise ObjectiveError(
            f"prompts: there are more ({len(prompts):,}) than images ({checked.images:,}), so a search would never use "
            "some; give more images, or fewer prompts"
        )
    held_out_prompts = None
    if checked.held_out_prompts is not None:
        held_out_prompts = _prompts(checked.held_out_prompts, context)
    trajectory = checked.trajectory(context)
    alphas = _alphas(checked, trajectory)
    pipeline = _pipeline(checked, context)
    trained_with = pipeline.scheduler  # whose betas and prediction type any other scheduler takes over
    pipeline.scheduler = _scheduler(trained_with, checked.sampler)
    sampler = LatentDiffusionSampler(
        pipeline,
        checked.sampler,
        component=checked.component,
        prompts=prompts,
        held_out_prompts=held_out_prompts,
        noise_seed=checked.noise_seed,
        guidance_scale=checked.guidance_scale,
        negative_prompt=checked.negative_prompt,
        height=checked.height,
        width=checked.width,
        alphas=alphas,
    )
    second = second_of(checked.sampler)
    also = None
    if second is not None:
        also = sampler.with_scheduler(_scheduler(trained_with, second), second)
    return checked.objective(sampler, trajectory, context, also=also)


def _prompts(given: str | list[str], context: BuildContext) -> tuple[str, ...]:
    """The prompts of a file, or those that the study file lists itself."""
    if isinstance(given, str):
        return read_prompts(context.path(given))
    if not any(prompt.strip() for prompt in given):
        raise ObjectiveError("prompts: the list holds no prompt; give one, or a text file with one a line")
    return tuple(given)


def _alphas(checked: Settings, trajectory: Trajectory) -> LoraAlphas | None:
    """What scales the LoRA's matrices; ``None`` for whole networks."""
    if checked.component != "lora":
        if lora_flavour(trajectory.names) is not None:
            raise ObjectiveError("component: the checkpoints are those of a LoRA; write component: lora")
        return None
    warn_of_two_forms(trajectory.sources[-1], trajectory.names)
    return trajectory.lora_alphas(checked.lora_alpha)


def _pipeline(checked: Settings, context: BuildContext) -> Any:
    """The pipeline, from a folder, or from the hub if there is no folder of that name."""
    path = context.path(checked.pipeline)
    name = str(path) if path.exists() else checked.pipeline
    return load_pipeline(name, checked, lora=checked.component == "lora")


def _scheduler(trained_with: Any, sampler: SchedulerSettings) -> Any:
    """The scheduler that the settings name, with what it needs to know of the training from the pipeline's own."""
    config = {**trained_with.config, "_class_name": type(trained_with).__name__}
    return build_scheduler(sampler.name, config, sampler.scheduler)
