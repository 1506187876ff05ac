"""Text-to-image pipelines of diffusers: loaded without running anything that their folders hold; and their prompts."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.imports import quiet_libraries
from lcsc_opt.sampling.network import DTYPES, NetworkSettings, compile_in_place

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components that text-to-image can do without
CACHE_BYTES = 4 * 2**30

_TWO = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_TWO, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
EMBEDDINGS: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": _TWO,
    "LatentConsistencyModelPipeline": _TWO,
    "StableDiffusionXLPipeline": _POOLED,
    "StableDiffusion3Pipeline": _POOLED,
    "PixArtAlphaPipeline": _MASKED,
    "PixArtSigmaPipeline": _MASKED,
}
"""Pipeline → what its ``encode_prompt`` returns, by the names under which its ``__call__`` takes it."""


def load_pipeline(name: str, settings: NetworkSettings, *, lora: bool = False) -> Any:
    """Load a pipeline for :class:`~lcsc_opt.sampling.text_to_image.LatentDiffusionSampler`.

    Its weights are cast to the settings' dtype, as diffusers does. There is no safety checker, whose black images no
    metric is meant for.

    Args:
        name: a folder that ``save_pretrained`` wrote, or a name at the Hugging Face hub.
        settings: where and how it runs; ``compile`` is for the U-Net or transformer.
        lora: whether LoRAs will be loaded into it.

    Raises:
        ObjectiveError: a package is missing, there is no such pipeline or device, it is not supported, or it needs code
            of its own.
    """
    for package in ("transformers", "accelerate", *(("peft",) if lora else ())):
        if importlib.util.find_spec(package) is None:
            raise ObjectiveError(f"text-to-image needs {package}, which is not installed: pip install {package}")
    from diffusers import DiffusionPipeline

    device = settings.torch_device()
    loader: Any = DiffusionPipeline
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
    parts = [part.eval() for part in found if part is not None]
    if settings.channels_last:
        for part in parts:
            part.to(memory_format=torch.channels_last)
    if parts:
        compile_in_place(parts[0], settings.compile)
    return pipeline


def _check_index(name: str, index: Mapping[str, Any]) -> None:
    """Refuse a ``model_index.json`` of another pipeline, or with classes neither of diffusers nor of transformers."""
    import diffusers.pipelines

    entries = {key: value for key, value in index.items() if isinstance(value, (list, tuple)) and len(value) == 2}
    for component, (library, _) in entries.items():
        known = library in (None, "diffusers", "transformers")
        if component[0] == "_" or not (known or hasattr(cast("Any", diffusers.pipelines), str(library))):
            raise ObjectiveError(f"pipeline: {name} needs code of its own for {component}, which is never run")
    if (kind := index["_class_name"]) not in EMBEDDINGS:
        raise ObjectiveError(f"pipeline: {kind} is not supported; these are: {', '.join(EMBEDDINGS)}")


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are left out, and so is a byte-order mark.

    A line that begins with # is a prompt like any other.

    Raises:
        ObjectiveError: it cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ObjectiveError(
            f"prompts: {path} cannot be read: {reason}; expected a text file, one prompt a line"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ObjectiveError(f"prompts: {path} holds no prompt; expected one a line")
    return prompts


class PromptEmbeddings:
    """The embeddings of prompts, and of one negative prompt, as a pipeline's own ``encode_prompt`` gives them.

    They are kept on the CPU, up to ``cache_bytes``; what does not fit is computed each time.

    Args:
        pipeline: one of :data:`EMBEDDINGS`.
        negative_prompt: what guidance leads away from; ``None`` leaves it to the pipeline.
        guided: whether classifier-free guidance needs it.
        cache_bytes: how much is kept.
    """

    def __init__(
        self, pipeline: Any, *, negative_prompt: str | None, guided: bool, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.negative_prompt = negative_prompt
        self._pipeline, self._guided = pipeline, guided
        self._names = EMBEDDINGS[type(pipeline).__name__]
        self._taken = set(inspect.signature(pipeline.__call__).parameters)
        self._cache_bytes = cache_bytes
        self.forget()

    def forget(self) -> None:
        """Text encoders have changed."""
        self._cached: dict[str, dict[str, Tensor]] = {}
        self._negative: dict[str, Tensor] = {}
        self._free_bytes = self._cache_bytes

    def of(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Arguments of the pipeline's ``__call__`` for ``prompts``, each tensor ``[len(prompts), …]``."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cached]
        fresh = self._encode(new) if new else {}
        rows = [fresh.get(prompt) or self._cached[prompt] for prompt in prompts]
        device = self._pipeline.device
        arguments: dict[str, Any] = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        for name, tensor in self._negative.items():
            arguments[name] = tensor.to(device).expand(len(prompts), *tensor.shape)
        if "negative_prompt" in self._taken:
            arguments["negative_prompt"] = None  # of some pipelines the default is a text
        return arguments

    def _encode(self, prompts: list[str]) -> dict[str, dict[str, Tensor]]:
        arguments: dict[str, Any] = {
            "prompt": prompts,
            "prompt_2": None,
            "prompt_3": None,
            "device": self._pipeline.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": self._guided,
        }
        if self._guided and self.negative_prompt is not None:
            arguments["negative_prompt"] = [self.negative_prompt] * len(prompts)
        encode = self._pipeline.encode_prompt
        taken = inspect.signature(encode).parameters
        with torch.no_grad(), quiet_libraries():
            returned = encode(**{name: value for name, value in arguments.items() if name in taken})
        named = {
            name: tensor.cpu()
            for name, tensor in zip(self._names, returned, strict=True)
            if tensor is not None and name in self._taken
        }
        self._negative = {name: tensor[0] for name, tensor in named.items() if name.startswith("negative_")}
        fresh = {
            prompt: {name: tensor[i].clone() for name, tensor in named.items() if name not in self._negative}
            for i, prompt in enumerate(prompts)
        }
        for prompt, row in fresh.items():
            self._keep(prompt, row)
        return fresh

    def _keep(self, prompt: str, row: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in row.values())
        if size <= self._free_bytes:
            self._cached[prompt] = row
            self._free_bytes -= size
