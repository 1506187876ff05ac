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

from lcsc_opt.base.paths import given_path
from lcsc_opt.base.settings import parse_settings
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.objective.settings import BatchSize, ImageObjectiveSettings
from lcsc_opt.sampling.diffusers_sampler import SchedulerSettings, build_scheduler
from lcsc_opt.sampling.text_to_image import LatentDiffusionSampler, load_pipeline, read_prompts

Pixels = Annotated[int, Field(ge=8, multiple_of=8)]


class Settings(ImageObjectiveSettings):
    """The settings of all objectives over images, and these.

    Attributes:
        pipeline: a folder that ``save_pretrained`` wrote, or a name at the Hugging Face hub.
        component: what the checkpoints hold: the pipeline's ``unet`` or ``transformer``, or a ``lora``.
        lora_alpha: of LoRA checkpoints, if neither they nor a configuration next to them tell it.
        sampler: scheduler and steps; without a name the pipeline's own scheduler.
        guidance_scale: above 1 every step takes two model calls (one for a latent consistency model).
        negative_prompt: guidance leads away from it; without it the pipeline's default.
        prompts: a text file, one prompt a line; image i is of prompt i mod n.
        held_out_prompts: the same, for the held-out images.
        height: of the images, in pixels; without it the height that the model was trained on.
        width: of the images, likewise.
        dtype: of the network's arithmetic, and of the pipeline's weights.
    """

    pipeline: str
    component: Literal["unet", "transformer", "lora"] = "unet"
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    sampler: SchedulerSettings
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    negative_prompt: str | None = None
    prompts: str
    held_out_prompts: str | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    batch_size: BatchSize = 8

    @model_validator(mode="after")
    def _alpha_belongs_to_a_lora(self) -> Settings:
        if self.component != "lora" and self.lora_alpha:
            raise ValueError("lora_alpha is for component: lora")
        return self

    def check(self) -> None:
        """The checks of all objectives over images; also that the prompts can be read."""
        super().check()
        for prompts in (self.prompts, self.held_out_prompts):
            if prompts is not None:
                read_prompts(given_path(prompts))


def build(settings: dict[str, Any]) -> MergeSampleScore:
    """Load the pipeline, open the checkpoints, and put sampler and metrics together."""
    checked = parse_settings(Settings, settings, source="objective.settings")
    prompts = read_prompts(given_path(checked.prompts))
    held_out = None if checked.held_out_prompts is None else read_prompts(given_path(checked.held_out_prompts))
    trajectory = checked.trajectory()
    alphas = None
    if checked.component == "lora":
        given = checked.lora_alpha
        alphas = trajectory.lora_alphas() if given is None else LoraAlphas.constant(given)
    pipeline = _pipeline(checked)
    sampler = LatentDiffusionSampler(
        pipeline,
        component=checked.component,
        prompts=prompts,
        held_out_prompts=held_out,
        noise=checked.noise(),
        steps=checked.sampler.steps,
        timesteps=checked.sampler.timesteps,
        guidance_scale=checked.guidance_scale,
        negative_prompt=checked.negative_prompt,
        height=checked.height,
        width=checked.width,
        options=checked.sampler.step,
        alphas=alphas,
    )
    return checked.objective(sampler, trajectory)


def _pipeline(settings: Settings) -> Any:
    path = given_path(settings.pipeline)
    name = str(path) if path.exists() else settings.pipeline
    pipeline = load_pipeline(name, settings, lora=settings.component == "lora")
    chosen = settings.sampler
    if chosen.name or chosen.scheduler:
        own = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
        pipeline.scheduler = build_scheduler(chosen.name, own, chosen.scheduler)
    return pipeline
