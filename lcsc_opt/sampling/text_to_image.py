"""Text-to-image sampling through the pipelines of diffusers: a merged U-Net, transformer or LoRA, prompts from a file.

Images come from the pipeline's own ``__call__``, so they are those that the pipeline gives for the same latents,
prompts and generators.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.records import HELD_OUT, Noise
from lcsc_opt.checkpoints.lora import LoraAlphas
from lcsc_opt.checkpoints.weights import weights_sha256
from lcsc_opt.sampling.base import (
    ModuleWeights,
    recomputed_calls,
)
from lcsc_opt.sampling.diffusers_sampler import without_deprecations
from lcsc_opt.sampling.lora import LoraAdapter
from lcsc_opt.sampling.network import load_weights
from lcsc_opt.sampling.noise import ImageNoise
from lcsc_opt.sampling.pipelines import PromptEmbeddings

NO_LORA_GRADIENT = "the gradient of a LoRA in a pipeline is not known"
Component = Literal["unet", "transformer", "lora"]


class LatentDiffusionSampler:
    """Images of a text-to-image pipeline.

    Args:
        pipeline: of diffusers, as :func:`~lcsc_opt.sampling.pipelines.load_pipeline` gives it; it is
            this sampler's alone.
        component: what merged weights are: those of ``unet`` or ``transformer``, or a ``lora``.
        prompts: image i is of prompt i mod n.
        held_out_prompts: the same for the held-out noise; without them it takes ``prompts``, too.
        noise: where all noise comes from.
        steps: of the scheduler; or
        timesteps: the steps themselves, where the pipeline takes them.
        guidance_scale: as the pipeline takes it; 1 is no classifier-free guidance.
        negative_prompt: what guidance leads away from; ``None`` leaves it to the pipeline.
        height: of the images, in pixels; ``None`` is what the model was trained on.
        width: the same.
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
        guided = guidance_scale > 1 and self._takes("negative_prompt_embeds") and not embeds_guidance
        self._embeddings = PromptEmbeddings(pipeline, negative_prompt=negative_prompt, guided=guided)
        self._model_calls = self._count_steps() * (2 if guided else 1)
        self.alphas = alphas
        self._lora = LoraAdapter(pipeline, alphas) if component == "lora" else None
        self._weights_sha256: str | None = None

    @property
    def nfe(self) -> int:
        """Model calls per image; classifier-free guidance takes two a step."""
        return self._model_calls

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy merged weights into the U-Net or transformer, or into the adapter that the first LoRA makes."""
        if self._lora is None:
            load_weights(self.denoiser, weights)
        elif self._lora.load(weights):
            self._embeddings.forget()

    @property
    def weights(self) -> ModuleWeights:
        """The U-Net's or transformer's, for gradients."""
        parts = (part for part in self.pipeline.components.values() if isinstance(part, nn.Module))
        reason = None if self._lora is None else NO_LORA_GRADIENT
        return ModuleWeights(self.denoiser, *parts, reason=reason)

    @property
    def recomputed(self) -> int:
        """Model calls per image that a backward pass makes again: all, where there are several and no compiler."""
        compiled = getattr(self.denoiser, "_compiled_call_impl", None) is not None
        return 0 if self.nfe == 1 or compiled else self.nfe

    def sample(self, noise: Noise, start: int, stop: int) -> Tensor:
        """``[stop - start, 3, height, width]`` images in [-1, 1], float32."""
        prompts = self.held_out_prompts if noise.group == HELD_OUT.group else self.prompts
        embedded = self._embeddings.of([prompts[image % len(prompts)] for image in range(start, stop)])
        latents = self.noise.batch(noise, start, stop, self._latent_shape())
        again = recomputed_calls(self.denoiser) if self.recomputed else contextlib.nullcontext()
        with without_deprecations(), again:
            output = self._call(
                **embedded,
                **self._options,
                **({"use_resolution_binning": False} if self._takes("use_resolution_binning") else {}),
                guidance_scale=self._guidance_scale,
                height=self.image_size[0],
                width=self.image_size[1],
                latents=latents.to(self.denoiser.device, self.denoiser.dtype),
                generator=self.noise.generators(noise, start, stop),
                output_type="pt",
            )
        if torch.is_grad_enabled():
            self._count_steps()  # this forgets what multistep schedulers hold, and with it the graph
        images: Tensor = output.images.float() * 2 - 1
        return images

    def describe(self) -> dict[str, object]:
        """Settings that change the images, and a hash of all weights that are not merged."""
        scheduler = self.pipeline.scheduler
        return {
            "sampler": type(self.pipeline).__name__,
            "component": self.component,
            "lora": None if self.alphas is None else {"alphas": self.alphas.model_dump()},
            "weights": self._fixed_weights_sha256(),
            "scheduler": type(scheduler).__name__,
            "scheduler_config": {name: value for name, value in scheduler.config.items() if name[0] != "_"},
            "options": self._options,
            "guidance_scale": self._guidance_scale,
            "negative_prompt": self._embeddings.negative_prompt,
            "prompts": [_sha256(self.prompts), len(self.prompts)],
            "held_out_prompts": [_sha256(self.held_out_prompts), len(self.held_out_prompts)],
            "image_size": list(self.image_size),
            "noise_seed": self.noise.seed,
            "dtype": str(self.denoiser.dtype).removeprefix("torch."),
        }

    def _call(self, **arguments: Any) -> Any:
        """The pipeline's ``__call__``, which itself is wrapped to disable gradients."""
        if not torch.is_grad_enabled():
            return self.pipeline(**arguments)
        return inspect.unwrap(type(self.pipeline).__call__)(self.pipeline, **arguments)

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

    def _latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        return self.denoiser.config.in_channels, self.image_size[0] // factor, self.image_size[1] // factor

    def _count_steps(self) -> int:
        scheduler = self.pipeline.scheduler
        try:
            with without_deprecations():
                scheduler.set_timesteps(**self._schedule)
        except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())
            raise ObjectiveError(f"sampler: {type(scheduler).__name__} refuses {self._schedule}: {reason}") from error
        return len(scheduler.timesteps)

    def _fixed_weights_sha256(self) -> str:
        """SHA-256 of all weights but the merged ones, as they were before any LoRA was loaded."""
        if self._weights_sha256 is None:
            merged = None if self._lora is not None else self.denoiser
            modules = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
            self._weights_sha256 = weights_sha256(
                {
                    f"{module}.{name.replace('.base_layer.', '.')}": tensor
                    for module, part in modules.items()
                    if part is not merged
                    for name, tensor in part.state_dict().items()
                    if ".lora_" not in name
                }
            )
        return self._weights_sha256


def _sha256(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
