"""A sampler for a folder that diffusers wrote: of a text-to-image pipeline, or of a model that makes images alone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.sampling.base import Sampler
from lcsc_opt.sampling.diffusers_folder import DiffusersFolder
from lcsc_opt.sampling.diffusers_sampler import DiffusersSampler, SchedulerName, build_scheduler
from lcsc_opt.sampling.network import NetworkSettings
from lcsc_opt.sampling.noise import ClassLabels, ImageNoise
from lcsc_opt.sampling.text_to_image import Component, LatentDiffusionSampler, load_pipeline

INDEX = "model_index.json"
_SLOW_SCHEDULER = "DDPMScheduler"  # of trainings; it needs hundreds of steps
_WITHOUT_GUIDANCE = "LCMScheduler"  # models that are distilled for it have the guidance in their weights


class FolderSampling(NetworkSettings):
    """How images are sampled with the model of a folder, and how its networks are run.

    Attributes:
        pipeline: a folder that ``save_pretrained`` wrote; of text-to-image pipelines also a name at the hub.
        sampler: the scheduler; by default the pipeline's own, and without prompts DPM-Solver++ in place of DDPM.
        sampling_steps: how many steps it makes.
        guidance: the scale of classifier-free guidance with prompts; by default the pipeline's, and 1 with ``lcm``.
        seed: of all noise.
    """

    pipeline: str
    sampler: SchedulerName | None = None
    sampling_steps: Annotated[int, Field(ge=1)] = 20
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    def check(self, *, with_prompts: bool) -> None:
        """Refuse a folder that does not fit the prompts, or their absence; only its index is read.

        Raises:
            ObjectiveError: prompts without a text encoder, or a text encoder without prompts.
        """
        encodes = has_text_encoder(Path(self.pipeline))  # None: at the hub, unknown until loaded
        if with_prompts and encodes is False:
            raise ObjectiveError(
                f"prompts: {self.pipeline} has no text encoder; leave the prompts out, and give a number of images"
            )
        if encodes and not with_prompts:
            raise ObjectiveError(f"prompts: {self.pipeline} makes images of texts; give a file with one prompt a line")

    def text_to_image(self, prompts: Sequence[str], alphas: LoraAlphas | None) -> LatentDiffusionSampler:
        """A sampler of images of ``prompts``; ``alphas`` are those of a LoRA, ``None`` merges whole networks.

        Raises:
            ObjectiveError: the pipeline cannot be loaded.
        """
        pipeline = load_pipeline(self.pipeline, self, lora=alphas is not None)
        if self.sampler is not None:
            pipeline.scheduler = build_scheduler(self.sampler, pipeline.scheduler.config)
        component: Component = "transformer"
        if alphas is not None:
            component = "lora"
        elif getattr(pipeline, "unet", None) is not None:
            component = "unet"
        return LatentDiffusionSampler(
            pipeline,
            component=component,
            prompts=prompts,
            noise=ImageNoise(self.seed),
            steps=self.sampling_steps,
            guidance_scale=self._guidance_of(pipeline),
            alphas=alphas,
        )

    def unconditional(self) -> DiffusersSampler:
        """A sampler of images from noise; of a model with classes, image i is of class i mod C.

        Raises:
            ObjectiveError: the folder holds no such model.
        """
        folder = DiffusersFolder.read(Path(self.pipeline))
        if folder.scheduler is None and self.sampler is not None:
            notice(f"{folder.path} has no scheduler_config.json: the scheduler's defaults are used, such as its betas")
        scheduler = self.sampler
        if scheduler is None and (folder.scheduler or {}).get("_class_name") == _SLOW_SCHEDULER:
            scheduler = "dpm-solver++"
        noise = ImageNoise(self.seed)
        labels = None
        if folder.classes is not None:
            labels = ClassLabels(folder.classes, "balanced", noise=noise)
        return DiffusersSampler(
            folder.network(),
            build_scheduler(scheduler, folder.scheduler),
            steps=self.sampling_steps,
            image_shape=folder.image_shape(),
            noise=noise,
            labels=labels,
            timestep_scale=folder.timestep_scale,
            settings=self,
        )

    def _guidance_of(self, pipeline: Any) -> float:
        """The scale that was asked for, else the pipeline's default."""
        if self.guidance is not None:
            return self.guidance
        if type(pipeline.scheduler).__name__ == _WITHOUT_GUIDANCE:
            return 1.0
        default = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
        return float(default)


def has_text_encoder(folder: Path) -> bool | None:
    """Whether a folder is a pipeline's with a text encoder; ``None`` for a name at the hub.

    Raises:
        ObjectiveError: its ``model_index.json`` cannot be read.
    """
    if not folder.exists():
        return None
    index = folder / INDEX
    if not index.is_file():
        return False
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        encoders = [entry for name, entry in content.items() if name.startswith("text_encoder")]
    except (OSError, ValueError, AttributeError) as error:
        raise ObjectiveError(f"{index} cannot be read as a pipeline's index: {error}") from error
    return any(isinstance(entry, list) and entry[:1] != [None] for entry in encoders)


def sampler_of(
    sampling: FolderSampling, *, prompts: Sequence[str] | None, lora_alphas: LoraAlphas | None = None
) -> Sampler:
    """The sampler of a folder, for prompts or without them.

    Args:
        sampling: the folder, and how it is sampled.
        prompts: image i is of prompt i mod n; ``None`` for a model that needs none.
        lora_alphas: of checkpoints that are LoRAs; ``None`` for whole networks.

    Raises:
        ObjectiveError: the folder does not fit the prompts, or the LoRA.
    """
    sampling.check(with_prompts=prompts is not None)
    if prompts is not None:
        return sampling.text_to_image(prompts, lora_alphas)
    if lora_alphas is not None:
        raise ObjectiveError(
            f"pipeline: {sampling.pipeline} has no text encoder, and the checkpoints are a LoRA; give the "
            "pipeline that it is for, and prompts"
        )
    return sampling.unconditional()
