"""Text-to-image sampling through the pipelines of diffusers: a merged U-Net, transformer or LoRA, prompts from a file.

Images come from the pipeline's own ``__call__``, so they are those that the pipeline gives for the same latents,
prompts and generators. Nothing that a pipeline's folder holds is run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import LcscError, ObjectiveError, text_of
from lcsc_opt.base.imports import has_parameter, import_extra
from lcsc_opt.base.libraries import quiet_libraries
from lcsc_opt.base.machine import collector_resting
from lcsc_opt.base.records import HELD_OUT, SEARCH, SELECTION, Noise
from lcsc_opt.base.reproducibility import derive_seed
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.sampling.base import ModuleWeights, recomputed_calls
from lcsc_opt.sampling.diffusers_sampler import SchedulerSettings, public_keys, set_timesteps
from lcsc_opt.sampling.encoded_prompts import EncodedPrompts
from lcsc_opt.sampling.layout import has_layouts
from lcsc_opt.sampling.lora import LoraAdapter
from lcsc_opt.sampling.network import DTYPES, NetworkSettings, load_weights
from lcsc_opt.sampling.noise import ImageNoise

Component = Literal["unet", "transformer", "lora"]
_WHOLE_GROUPS = (SEARCH.group, SELECTION.group, HELD_OUT.group)  # evaluations of them have all prompts
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components that text-to-image can do without
PIPELINES = (
    "StableDiffusionPipeline",
    "LatentConsistencyModelPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
)


def load_pipeline(name: str, settings: NetworkSettings, *, lora: bool = False) -> Any:
    """Load a pipeline for :class:`LatentDiffusionSampler`.

    Its weights are cast to the settings' dtype, as diffusers does. There is no safety checker, whose black images no
    metric is meant for.

    Args:
        name: a folder that ``save_pretrained`` wrote, or a name at the Hugging Face hub.
        settings: where and how it runs.
        lora: whether LoRAs will be loaded into it.

    Raises:
        MissingPackageError: one of the packages that it runs on cannot be imported.
        ObjectiveError: there is no such pipeline or device, it is not supported, or it needs custom code.
    """
    for package in ("transformers", "accelerate"):
        import_extra(package)  # its error says more than that of diffusers
    if lora:
        import_extra("peft")
    device = settings.torch_device()
    with collector_resting():
        loader = import_extra("diffusers").DiffusionPipeline
    try:
        with quiet_libraries():
            index = loader.load_config(name)
            _check_index(name, index)
            # diffusers loads a folder that was saved without a component, as the third encoder of SD3, only if told so
            absent = {component for component, entry in index.items() if entry in ([None, None], (None, None))}
            as_none = dict.fromkeys(absent.union(UNUSED).intersection(index))
            pipeline = loader.from_pretrained(name, torch_dtype=DTYPES[settings.dtype], **as_none)
    except LcscError:
        raise
    except Exception as error:  # models raise all kinds of errors for wrong settings
        raise ObjectiveError(
            f"pipeline: {name} cannot be loaded, neither as a folder of a pipeline nor from the Hugging Face hub: "
            f"{text_of(error)[:300]} On a machine with a network, "
            f"'hf download {name} --local-dir FOLDER' fetches one"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    return pipeline


def _check_index(name: str, index: Mapping[str, Any]) -> None:
    """Refuse a ``model_index.json`` of another pipeline, or with classes neither of diffusers nor of transformers."""
    pipelines = import_extra("diffusers.pipelines")
    for component, entry in index.items():
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2):
            continue
        library, _ = entry
        is_ours = library in (None, "diffusers", "transformers") or hasattr(pipelines, str(library))
        if component.startswith("_") or not is_ours:
            raise ObjectiveError(f"pipeline: {name} needs custom code for {component}, which is never run")
    class_name = index["_class_name"]
    if class_name not in PIPELINES:
        raise ObjectiveError(f"pipeline: {class_name} is not supported; expected one of {', '.join(PIPELINES)}")


_NO_LINES_OF_TEXT = (".yaml", ".yml", ".json", ".jsonl", ".toml", ".csv", ".parquet")
_OPTIONS_OF_SD_SCRIPTS = re.compile(r"\s--[a-z]{1,2}\s\S+")  # as in "a red fox --n blurry --w 512 --l 7.5"


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are left out, and so is a byte-order mark.

    A line that begins with # is a prompt like any other.

    Raises:
        ObjectiveError: it cannot be read, holds none, or holds more than prompts: a table, or options of sd-scripts.
    """
    if path.suffix in _NO_LINES_OF_TEXT:
        raise ObjectiveError(f"prompts: {path} is no text file of one prompt a line; write one, or a list in its place")
    try:
        # not splitlines, which also ends a line at characters that an editor shows inside of it
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise ObjectiveError(
            f"prompts: there is no file {path}; expected a text file of one prompt a line, or a list, as "
            "[a red fox, an owl]"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ObjectiveError(f"prompts: {path} cannot be read as UTF-8, one prompt a line: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ObjectiveError(f"prompts: {path} holds no prompt; expected one a line")
    for prompt in prompts:
        options = _OPTIONS_OF_SD_SCRIPTS.search(prompt)
        if options is not None:
            raise ObjectiveError(
                f"prompts: {path} has options of sd-scripts, {options[0].strip()!r}, which would be read as words; "
                "leave them out; negative_prompt, width, height, guidance_scale and the sampler's steps are settings, "
                "for all prompts"
            )
    return prompts


class LatentDiffusionSampler:
    """Images of a text-to-image pipeline.

    Args:
        pipeline: a pipeline of diffusers, as :func:`load_pipeline` returns it; nothing else may use it.
        schedule: the steps of the pipeline's scheduler, and further arguments of the pipeline, such as ``eta``.
        component: what is merged: the ``unet``, the ``transformer`` or a ``lora``.
        prompts: image i is sampled with prompt i mod n.
        held_out_prompts: the same for held-out noise; ``None`` uses ``prompts`` there, too.
        noise_seed: of all noise.
        guidance_scale: the pipeline's argument; 1 is no classifier-free guidance.
        negative_prompt: what guidance leads away from; ``None`` is the pipeline's default.
        height, width: size of the images in pixels; ``None`` is the size that the model was trained on.
        alphas: the alphas of merged LoRAs, for the component ``lora``; ``None`` is alpha = rank.

    Attributes:
        networks_to_lay_out: the U-Net or transformer, and the decoder, where a layout is to be chosen.
        encoded_prompts: what is kept of the text encoders; another :class:`EncodedPrompts` bounds its memory.

    Raises:
        ObjectiveError: a component, a size or an option that does not fit.
    """

    def __init__(
        self,
        pipeline: Any,
        schedule: SchedulerSettings,
        *,
        component: Component,
        prompts: Sequence[str],
        held_out_prompts: Sequence[str] | None = None,
        noise_seed: int,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        alphas: LoraAlphas | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.component = component
        self.prompts = tuple(prompts)
        self.held_out_prompts = tuple(held_out_prompts or prompts)
        if component != "lora" and getattr(pipeline, component, None) is None:
            raise ObjectiveError(f"component: {type(pipeline).__name__} has no {component}")
        self.denoiser = getattr(pipeline, "unet", None) or pipeline.transformer  # each of PIPELINES has one of them
        self.image_size = (self._length("height", height, 0), self._length("width", width, 1))
        factor = pipeline.vae_scale_factor
        latent_shape = (self.denoiser.config.in_channels, *(length // factor for length in self.image_size))
        self.noise = ImageNoise(noise_seed, latent_shape)
        self._guidance_scale = guidance_scale
        self._negative_prompt = negative_prompt
        # a network that embeds the guidance needs no second call
        embeds_guidance = self.denoiser.config.get("time_cond_proj_dim") is not None
        takes_negative_prompt = has_parameter(pipeline.__call__, "negative_prompt")
        self._guided = takes_negative_prompt and not embeds_guidance and guidance_scale > 1
        if negative_prompt is not None and not self._guided:
            raise ObjectiveError(
                "negative_prompt: only classifier-free guidance has one, with a guidance_scale above 1 and not of a "
                "latent consistency model; leave it out"
            )
        self._set_schedule(schedule)
        self.alphas = alphas
        self._lora: LoraAdapter | None = None
        networks = [self.denoiser, getattr(getattr(pipeline, "vae", None), "decoder", None)]
        self.networks_to_lay_out = tuple(
            network for network in networks if network is not None and has_layouts(network)
        )
        if component == "lora":
            self.networks_to_lay_out = ()  # its layers are made later, when the first one is loaded
            self._lora = LoraAdapter(pipeline, alphas)
        self.encoded_prompts = EncodedPrompts()

    def with_scheduler(self, scheduler: Any, schedule: SchedulerSettings) -> LatentDiffusionSampler:
        """A sampler from the same networks, whose weights :meth:`load` of this one sets.

        Raises:
            ObjectiveError: an option that does not fit.
        """
        sampler = copy.copy(self)
        sampler.pipeline = copy.copy(self.pipeline)
        sampler.pipeline.scheduler = scheduler
        sampler._set_schedule(schedule)
        return sampler

    def _set_schedule(self, schedule: SchedulerSettings) -> None:
        """Set what depends on the scheduler's steps, and how many network calls an image takes."""
        self._schedule = schedule
        self._options = {**schedule.timestep_arguments, **schedule.step}
        self.nfe = len(set_timesteps(self.pipeline.scheduler, self._schedule))
        if self._guided:
            self.nfe *= 2
        self.recomputed = self.nfe
        if self.nfe == 1:  # a single call's activations are needed at once, so recomputing saves no memory
            self.recomputed = 0

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy merged weights into the U-Net or transformer, or into the adapter that the first LoRA makes."""
        if self._lora is None:
            load_weights(self.denoiser, weights)
        else:
            self._lora.load(weights)

    @property
    def weights(self) -> ModuleWeights:
        """The U-Net's, the transformer's or the LoRA's, for gradients."""
        factors: Mapping[str, Tensor] | None = None
        if self._lora is not None:
            factors = self._lora.factors
        return ModuleWeights(self.denoiser, *self._modules().values(), lora=factors)

    def prompts_of(self, noise: Noise, start: int, stop: int) -> list[str]:
        """The prompts of the images ``[start, stop)``: image i has prompt i mod n.

        Noise that an optimizer chooses itself begins at a prompt of its own: an optimizer that asks for few images on
        fresh noise each time would otherwise see the first prompts only.
        """
        prompts = self.prompts
        if noise.group == HELD_OUT.group:
            prompts = self.held_out_prompts
        first = 0
        if noise.group not in _WHOLE_GROUPS:
            first = derive_seed(noise.seed, "prompts", noise.group) % len(prompts)
        return [prompts[(first + image) % len(prompts)] for image in range(start, stop)]

    @property
    def fewest_report_images(self) -> int:
        """With fewer images, a report would leave out prompts: the choice's, or those of held-out noise."""
        return max(len(self.prompts), len(self.held_out_prompts))

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """``[stop - start, 3, height, width]`` images, nominally in [-1, 1], float32 or wider."""
        height, width = self.image_size
        latents = self.noise.batch(noise, start, stop)
        call: Any = type(self.pipeline).__call__
        if torch.is_grad_enabled():
            call = inspect.unwrap(call)  # without the decorator torch.no_grad
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet_libraries())
            if self._lora is None or not self._lora.trains_text_encoder:  # else embeddings change
                stack.enter_context(self.encoded_prompts.answering(self.pipeline))
            if self.recomputed:
                stack.enter_context(recomputed_calls(self.denoiser))
            output = call(
                self.pipeline,
                **self._prompt_options(self.prompts_of(noise, start, stop)),
                guidance_scale=self._guidance_scale,
                height=height,
                width=width,
                latents=latents.to(self.denoiser.device, self.denoiser.dtype),
                generator=self.noise.generators(noise, start, stop),
                output_type="pt",
            )
        if torch.is_grad_enabled():
            # multistep schedulers hold earlier outputs, and with them the graph, until they are set again
            set_timesteps(self.pipeline.scheduler, self._schedule)
        unit_range: Tensor = output.images.to(torch.promote_types(output.images.dtype, torch.float32))
        return unit_range * 2 - 1

    def _prompt_options(self, prompts: list[str]) -> dict[str, Any]:
        """The pipeline's arguments for these prompts, with those of all images."""
        options: dict[str, Any] = {**self._options, "prompt": prompts}
        if self._guided and self._negative_prompt is not None:
            options["negative_prompt"] = [self._negative_prompt] * len(prompts)
        for name in ("clean_caption", "use_resolution_binning"):  # PixArt's, which would change prompts and sizes
            if has_parameter(self.pipeline.__call__, name):
                options[name] = False
        return options

    def describe(self) -> dict[str, object]:
        """Settings that change the images, and a hash of all weights that are not merged."""
        scheduler = self.pipeline.scheduler
        lora = None
        if self.alphas is not None:
            lora = {"alphas": self.alphas.model_dump()}
        return {
            "pipeline": type(self.pipeline).__name__,
            "component": self.component,
            "lora": lora,
            "weights": self._fixed_weights_sha256,
            "sampler": type(scheduler).__name__,
            "scheduler": public_keys(scheduler.config),
            "steps": self._options,
            "guidance_scale": self._guidance_scale,
            "negative_prompt": self._negative_prompt,
            "prompts": [_sha256(self.prompts), len(self.prompts)],
            "held_out_prompts": [_sha256(self.held_out_prompts), len(self.held_out_prompts)],
            "image_size": list(self.image_size),
            "noise_seed": self.noise.seed,
            "dtype": str(self.denoiser.dtype).removeprefix("torch."),
        }

    def _modules(self) -> dict[str, nn.Module]:
        """The pipeline's components that have weights, by name: those that are merged, and those that stay."""
        components = self.pipeline.components.items()
        return {name: component for name, component in components if isinstance(component, nn.Module)}

    def _length(self, name: str, pixels: int | None, axis: int) -> int:
        """Height (``axis`` 0) or width (1) in pixels; by default that of the images that the model was trained on."""
        if pixels is not None:
            return pixels
        latents = self.denoiser.config.get("sample_size")
        if isinstance(latents, (list, tuple)):
            latents = latents[axis]
        if not isinstance(latents, int):
            raise ObjectiveError(f"{name}: the pipeline does not say what size it was trained on; give it")
        trained_on: int = latents * self.pipeline.vae_scale_factor
        return trained_on

    @functools.cached_property
    def _fixed_weights_sha256(self) -> str:
        """SHA-256 of all weights but the merged ones, under the names that they had before a LoRA was loaded."""
        fixed: dict[str, Tensor] = {}
        for component, module in self._modules().items():
            if self._lora is None and module is self.denoiser:  # which is merged
                continue
            for name, tensor in module.state_dict().items():
                if ".lora_" not in name:
                    fixed[f"{component}.{name.replace('.base_layer.', '.')}"] = tensor
        return weights_sha256(fixed)


def _sha256(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
