"""Text-to-image sampling through the pipelines of diffusers: a merged U-Net, transformer or LoRA, prompts from a file.

Images come from the pipeline's own ``__call__``, so they are those that the pipeline gives for the same latents,
prompts and generators. Nothing that a pipeline's folder holds is run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.imports import import_extra, quiet_libraries
from lcsc_opt.base.records import HELD_OUT, Noise
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.sampling.base import ModuleWeights, recomputed_calls
from lcsc_opt.sampling.diffusers_sampler import set_timesteps
from lcsc_opt.sampling.lora import LoraAdapter
from lcsc_opt.sampling.network import DTYPES, NetworkSettings, PreparedNetwork, load_weights
from lcsc_opt.sampling.noise import ImageNoise

Component = Literal["unet", "transformer", "lora"]
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components that text-to-image can do without
PIPELINES = (
    *("StableDiffusionPipeline", "LatentConsistencyModelPipeline", "StableDiffusionXLPipeline"),
    *("StableDiffusion3Pipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"),
)


def load_pipeline(name: str, settings: NetworkSettings, *, lora: bool = False) -> Any:
    """Load a pipeline for :class:`LatentDiffusionSampler`.

    Its weights are cast to the settings' dtype, as diffusers does. There is no safety checker, whose black images no
    metric is meant for.

    Args:
        name: a folder that ``save_pretrained`` wrote, or a name at the Hugging Face hub.
        settings: where and how it runs; ``compile`` is for the U-Net or transformer.
        lora: whether LoRAs will be loaded into it.

    Raises:
        MissingPackageError: one of the packages that it runs on cannot be imported.
        ObjectiveError: there is no such pipeline or device, it is not supported, or it needs code of its own.
    """
    for package in ("transformers", "accelerate", *(("peft",) if lora else ())):
        import_extra(package)  # diffusers would say less
    device = settings.torch_device()
    loader = import_extra("diffusers").DiffusionPipeline
    try:
        with warnings.catch_warnings(), quiet_libraries():
            warnings.simplefilter("ignore")  # diffusers warns of how it calls others, and of the older name of dtype
            index = loader.load_config(name)
            _check_index(name, index)
            unused = {component: None for component in UNUSED if component in index}
            pipeline = loader.from_pretrained(name, torch_dtype=DTYPES[settings.dtype], **unused)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ObjectiveError(
            f"pipeline: {name} cannot be loaded, neither as a folder of a pipeline nor from the Hugging Face hub: "
            f"{reason} Where there is a network, 'hf download {name} --local-dir FOLDER' gets one"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    found = (getattr(pipeline, name, None) for name in ("unet", "transformer", "vae"))
    for index, part in enumerate(part for part in found if part is not None):
        PreparedNetwork(part, settings if index == 0 else settings.model_copy(update={"compile": False}))
    return pipeline


def _check_index(name: str, index: Mapping[str, Any]) -> None:
    """Refuse a ``model_index.json`` of another pipeline, or with classes neither of diffusers nor of transformers."""
    pipelines = import_extra("diffusers.pipelines")
    entries = {key: value for key, value in index.items() if isinstance(value, (list, tuple)) and len(value) == 2}
    for component, (library, _) in entries.items():
        known = library in (None, "diffusers", "transformers")
        if component[0] == "_" or not (known or hasattr(pipelines, str(library))):
            raise ObjectiveError(f"pipeline: {name} needs code of its own for {component}, which is never run")
    if (kind := index["_class_name"]) not in PIPELINES:
        raise ObjectiveError(f"pipeline: {kind} is not supported; these are: {', '.join(PIPELINES)}")


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are left out, and so is a byte-order mark.

    A line that begins with # is a prompt like any other.

    Raises:
        ObjectiveError: it cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ObjectiveError(f"prompts: {path} cannot be read as UTF-8, one prompt a line: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ObjectiveError(f"prompts: {path} holds no prompt; expected one a line")
    return prompts


class LatentDiffusionSampler:
    """Images of a text-to-image pipeline.

    Args:
        pipeline: of diffusers, as :func:`load_pipeline` gives it; it is this sampler's alone.
        component: what merged weights are: those of ``unet`` or ``transformer``, or a ``lora``.
        prompts: image i is of prompt i mod n.
        held_out_prompts: the same for the held-out noise; without them it takes ``prompts``, too.
        noise: where all noise comes from.
        steps: of the scheduler; or
        timesteps: the steps themselves, where the pipeline takes them.
        guidance_scale: as the pipeline takes it; 1 is no classifier-free guidance.
        negative_prompt: what guidance leads away from; ``None`` leaves it to the pipeline.
        height, width: of the images, in pixels; ``None`` is what the model was trained on.
        options: further arguments of the pipeline, such as ``eta``.
        alphas: of merged LoRAs, for the component ``lora``; ``None`` is alpha = rank.

    Raises:
        ObjectiveError: a component, a size or an option that does not fit.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        component: Component,
        prompts: Sequence[str],
        held_out_prompts: Sequence[str] | None = None,
        noise: ImageNoise,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        options: Mapping[str, Any] | None = None,
        alphas: LoraAlphas | None = None,
    ) -> None:
        self.pipeline, self.component, self.noise = pipeline, component, noise
        self.prompts = tuple(prompts)
        self.held_out_prompts = self.prompts if held_out_prompts is None else tuple(held_out_prompts)
        self.denoiser = cast("Any", getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None))
        if component != "lora" and getattr(pipeline, component, None) is None:
            raise ObjectiveError(f"component: {type(pipeline).__name__} has no {component}")
        self.image_size = (self._length("height", height, 0), self._length("width", width, 1))
        self._schedule = {"num_inference_steps": steps} if timesteps is None else {"timesteps": list(timesteps)}
        self._guidance_scale = guidance_scale
        self._options = {**self._schedule, **(options or {})}
        if unknown := [name for name in self._options if not self._takes(name)]:
            raise ObjectiveError(f"sampler: {type(pipeline).__name__} does not take {unknown[0]!r}")
        embeds_guidance = self.denoiser.config.get("time_cond_proj_dim") is not None  # one call is enough for it
        guided = guidance_scale > 1 and self._takes("negative_prompt") and not embeds_guidance
        self._guided, self._negative_prompt = guided, negative_prompt
        self.nfe = len(set_timesteps(pipeline.scheduler, self._schedule)) * (2 if guided else 1)
        compiled = getattr(self.denoiser, "_compiled_call_impl", None) is not None
        self.recomputed = 0 if self.nfe == 1 or compiled else self.nfe  # not where a compiler would see it
        self.alphas = alphas
        self._lora = LoraAdapter(pipeline, alphas) if component == "lora" else None

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy merged weights into the U-Net or transformer, or into the adapter that the first LoRA makes."""
        if self._lora is None:
            load_weights(self.denoiser, weights)
        else:
            self._lora.load(weights)

    @property
    def weights(self) -> ModuleWeights:
        """The U-Net's, the transformer's or the LoRA's, for gradients."""
        parts = (part for part in self.pipeline.components.values() if isinstance(part, nn.Module))
        return ModuleWeights(self.denoiser, *parts, lora=None if self._lora is None else self._lora.factors)

    def prompts_of(self, noise: Noise, start: int, stop: int) -> list[str]:
        """Image i is of prompt i mod n."""
        prompts = self.held_out_prompts if noise.group == HELD_OUT.group else self.prompts
        return [prompts[image % len(prompts)] for image in range(start, stop)]

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """``[stop - start, 3, height, width]`` images in [-1, 1], float32 or wider."""
        prompts = self.prompts_of(noise, start, stop)
        options: dict[str, Any] = {**self._options, "prompt": prompts}
        if self._guided and self._negative_prompt is not None:
            options["negative_prompt"] = [self._negative_prompt] * len(prompts)
        options |= {name: False for name in ("clean_caption", "use_resolution_binning") if self._takes(name)}
        factor = self.pipeline.vae_scale_factor
        shape = (self.denoiser.config.in_channels, *(length // factor for length in self.image_size))
        latents = self.noise.batch(noise, start, stop, shape)
        again = recomputed_calls(self.denoiser) if self.recomputed else contextlib.nullcontext()
        call: Any = type(self.pipeline).__call__
        if torch.is_grad_enabled():
            call = inspect.unwrap(call)  # it is wrapped to disable gradients
        with quiet_libraries(), again:
            output = call(
                self.pipeline,
                **options,
                guidance_scale=self._guidance_scale,
                height=self.image_size[0],
                width=self.image_size[1],
                latents=latents.to(self.denoiser.device, self.denoiser.dtype),
                generator=self.noise.generators(noise, start, stop),
                output_type="pt",
            )
        if torch.is_grad_enabled():
            # multistep schedulers forget what they hold, and with it the graph
            set_timesteps(self.pipeline.scheduler, self._schedule)
        images: Tensor = output.images.to(torch.promote_types(output.images.dtype, torch.float32)) * 2 - 1
        return images

    def describe(self) -> dict[str, object]:
        """Settings that change the images, and a hash of all weights that are not merged."""
        scheduler = self.pipeline.scheduler
        return {
            "sampler": type(self.pipeline).__name__,
            "component": self.component,
            "lora": None if self.alphas is None else {"alphas": self.alphas.model_dump()},
            "weights": self._fixed_weights_sha256,
            "scheduler": type(scheduler).__name__,
            "scheduler_config": {name: value for name, value in scheduler.config.items() if name[0] != "_"},
            "options": self._options,
            "guidance_scale": self._guidance_scale,
            "negative_prompt": self._negative_prompt,
            "prompts": [_sha256(self.prompts), len(self.prompts)],
            "held_out_prompts": [_sha256(self.held_out_prompts), len(self.held_out_prompts)],
            "image_size": list(self.image_size),
            "noise_seed": self.noise.seed,
            "dtype": str(self.denoiser.dtype).removeprefix("torch."),
        }

    def _takes(self, argument: str) -> bool:
        return argument in inspect.signature(self.pipeline.__call__).parameters

    def _length(self, name: str, pixels: int | None, axis: int) -> int:
        """Height or width, as a multiple of what one latent covers."""
        factor = self.pipeline.vae_scale_factor
        size = self.denoiser.config.get("sample_size")
        latents = size[axis] if isinstance(size, (list, tuple)) else size
        if pixels is None and not isinstance(latents, int):
            raise ObjectiveError(f"{name}: the pipeline does not say what size it was trained on; give it")
        pixels = cast("int", latents) * factor if pixels is None else pixels
        if pixels < 1 or pixels % max(factor, 8):
            raise ObjectiveError(f"{name}: expected a multiple of {max(factor, 8)}, got {pixels}")
        return pixels

    @functools.cached_property
    def _fixed_weights_sha256(self) -> str:
        """SHA-256 of all weights but the merged ones, as they were before any LoRA was loaded."""
        merged = None if self._lora is not None else self.denoiser
        modules = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        return weights_sha256(
            {
                f"{module}.{name.replace('.base_layer.', '.')}": tensor
                for module, part in modules.items()
                if part is not merged
                for name, tensor in part.state_dict().items()
                if ".lora_" not in name
            }
        )


def _sha256(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
