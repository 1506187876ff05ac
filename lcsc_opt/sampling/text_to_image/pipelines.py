"""Loading a text-to-image pipeline of diffusers, without running anything that its folder holds."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from lcsc_opt.base.errors import ObjectiveError
from lcsc_opt.base.imports import quiet_libraries
from lcsc_opt.sampling.network import DTYPES, NetworkSettings, compile_in_place
from lcsc_opt.sampling.text_to_image.prompts import EMBEDDINGS

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components that text-to-image can do without


def require_text_to_image(*, lora: bool) -> None:
    """Check that the optional packages are installed.

    Raises:
        ObjectiveError: naming the first that is missing.
    """
    for package in ("transformers", "accelerate", *(("peft",) if lora else ())):
        if importlib.util.find_spec(package) is None:
            raise ObjectiveError(f"text-to-image needs {package}, which is not installed: pip install {package}")


def load_pipeline(name: str, settings: NetworkSettings, *, lora: bool = False) -> Any:
    """Load a pipeline for :class:`~lcsc_opt.sampling.text_to_image.sampler.LatentDiffusionSampler`.

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
    require_text_to_image(lora=lora)
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
    _set_up(pipeline, settings)
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


def _set_up(pipeline: Any, settings: NetworkSettings) -> None:
    parts = [part for part in (getattr(pipeline, n, None) for n in ("unet", "transformer", "vae")) if part is not None]
    for part in parts:
        network: nn.Module = part.eval()
        if settings.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    if parts:
        compile_in_place(parts[0], settings.compile)
