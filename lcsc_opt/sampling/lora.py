"""Putting one merged LoRA after the other into a pipeline, without making its adapter again."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError, TrajectoryError, text_of
from lcsc_opt.base.imports import import_extra
from lcsc_opt.base.libraries import quiet_libraries
from lcsc_opt.checkpoints.lora import LoraAlphas, LoraModule, lora_flavour, lora_modules
from lcsc_opt.checkpoints.weights import difference
from lcsc_opt.coefficients.layer_groups import LORA_FACTORS

ADAPTER = "merged"
_SUFFIXES = LORA_FACTORS[0]  # of (down, up) in the names that load_lora_weights expects
_TEXT_ENCODER_SUFFIXES = LORA_FACTORS[2]  # for text encoders it expects older names
_PEFT_PARAMETERS = {
    _SUFFIXES[0]: "lora_A",
    _SUFFIXES[1]: "lora_B",
    _TEXT_ENCODER_SUFFIXES[0]: "lora_A",
    _TEXT_ENCODER_SUFFIXES[1]: "lora_B",
}


class LoraAdapter:
    """The adapter of a pipeline that merged LoRAs are copied into, one after the other.

    Its parameters are the factors as they are, and alpha / rank is the scale of PEFT's layers. So a gradient in a
    parameter is the gradient in the factor.

    Args:
        pipeline: a pipeline of diffusers.
        alphas: the alphas of the LoRAs; ``None`` is alpha = rank.

    Attributes:
        factors: a factor's name in the checkpoints → its parameter; empty until the first LoRA is loaded.

    Raises:
        ObjectiveError: the pipeline does not support LoRAs.
        TrajectoryError: as :meth:`LoraAlphas.check_start`.
    """

    def __init__(self, pipeline: Any, alphas: LoraAlphas | None) -> None:
        if not hasattr(pipeline, "load_lora_weights"):
            raise ObjectiveError(
                f"component: {type(pipeline).__name__} does not support LoRAs; merge its transformer or unet"
            )
        self._pipeline = pipeline
        self._alphas = alphas or LoraAlphas()
        self._alphas.check_start()
        self._unet = getattr(pipeline, "unet", None)
        self._places: dict[str, tuple[Any, nn.Parameter]] = {}
        """A factor's name in diffusers → its layer of PEFT, and the parameter there."""
        self.factors: dict[str, Tensor] = {}

    @property
    def trains_text_encoder(self) -> bool:
        """Whether some factors belong to a text encoder."""
        return any(name.startswith("text_encoder") for name in self._places)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy a merged LoRA into the adapter, which the first one makes.

        Raises:
            ObjectiveError: it does not fit the pipeline, or has other names or shapes than the first one.
            TrajectoryError: its factors do not belong together.
        """
        if self._unet is None:
            named = _diffusers_names(weights, component="transformer", unet_config=None)
        else:
            named = _diffusers_names(weights, component="unet", unet_config=self._unet.config)
        factors: dict[str, Tensor] = {}
        scales: dict[str, float] = {}
        for name, (module, checkpoint_name) in named.items():
            factors[name] = weights[checkpoint_name]
            _down, _up, scales[name] = module.factors(weights, self._alphas)
        if not self._places:
            self._places = self._create(factors)
            for name, (_, checkpoint_name) in named.items():
                self.factors[checkpoint_name] = self._places[name][1]
        parameters = {name: parameter for name, (_, parameter) in self._places.items()}
        misfit = difference(factors, parameters)
        if misfit is not None:
            raise ObjectiveError(f"the LoRA does not fit the one in the pipeline: it {misfit}")
        with torch.no_grad():
            for name, (layer, parameter) in self._places.items():
                parameter.copy_(factors[name])
                layer.scaling[ADAPTER] = scales[name]

    def _create(self, factors: Mapping[str, Tensor]) -> dict[str, tuple[Any, nn.Parameter]]:
        """Let the pipeline load the factors as it loads a file; give PEFT's layer and the parameter of each."""
        copies: dict[str, Tensor] = {}  # since tensors of the right dtype would become the parameters themselves
        dtypes: dict[str, torch.dtype] = {}  # of components; to ask one for it goes through all its modules
        for name, factor in factors.items():
            component = name.partition(".")[0]
            if component not in dtypes:
                dtypes[component] = self._component_of(name).dtype
            copies[name] = factor.to(dtypes[component], copy=True)
        # its warning that text encoders have no factors is said of most LoRAs; each factor's place is looked up below
        loader = logging.getLogger("diffusers.loaders.lora_base")
        was_disabled = loader.disabled
        loader.disabled = True
        try:
            with quiet_libraries():
                self._pipeline.load_lora_weights(copies, adapter_name=ADAPTER)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
            pipeline = type(self._pipeline).__name__
            raise ObjectiveError(f"the LoRA does not fit {pipeline}: {text_of(error)[:300]}") from error
        finally:
            loader.disabled = was_disabled
        return {name: self._place(name) for name in factors}

    def _component_of(self, name: str) -> Any:
        """The pipeline's component that the factor of this name belongs to."""
        component = getattr(self._pipeline, name.partition(".")[0], None)
        if not isinstance(component, nn.Module):
            pipeline = type(self._pipeline).__name__
            raise ObjectiveError(f"the LoRA's {name} belongs to a component that {pipeline} lacks")
        return component

    def _place(self, name: str) -> tuple[Any, nn.Parameter]:
        """PEFT's layer of the factor of this name in diffusers, and the parameter in it."""
        component = self._component_of(name)
        suffix = next(suffix for suffix in _PEFT_PARAMETERS if name.endswith(suffix))
        path = name.removesuffix(suffix).partition(".")[2]
        for layer_path in (path, path.removeprefix("text_model.")):  # transformers 5 dropped text_model
            try:
                layer: Any = component.get_submodule(layer_path)
                parameter: nn.Parameter = getattr(layer, _PEFT_PARAMETERS[suffix])[ADAPTER].weight
            except (AttributeError, KeyError):
                continue
            return layer, parameter
        raise ObjectiveError(f"the LoRA's {name} has no place in the pipeline's {type(component).__name__}")


_NOT_OF_DIFFUSERS = re.compile(r"(diffusion_model|double_blocks|single_blocks)\.|blocks\.\d+\.(self|cross)_attn")
"""How modules are called in the first code of FLUX, Qwen-Image and Wan. They have no names here: where q, k and v are
one matrix, a factor is several of diffusers'. ``load_lora_weights`` translates such files as a whole."""
_TRANSFORMER_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.", "blocks.")  # no U-Net begins with these
SDXL_BLOCKS = ("input_blocks_", "middle_block_", "output_blocks_")  # kohya's names for the U-Net of SDXL
_UNET_BLOCKS = ("down_blocks_", "mid_block_", "up_blocks_", *SDXL_BLOCKS, "conv_", "time_")


def to_diffusers(
    weights: Mapping[str, Tensor],
    alphas: LoraAlphas | None = None,
    *,
    component: str = "unet",
    unet_config: Any = None,
) -> dict[str, Tensor]:
    """A LoRA of any flavour under the names that a pipeline's ``load_lora_weights`` loads.

    alpha / rank is multiplied into ``up``, since these names have no place for alpha: they mean alpha = rank. kohya's
    names of Stable Diffusion and SDXL are converted by diffusers itself.

    Args:
        weights: the LoRA.
        alphas: where the tensors do not hold them; ``None`` takes alpha = rank.
        component: what modules belong to whose names do not tell, ``unet`` or ``transformer``.
        unet_config: the U-Net's configuration, whose ``layers_per_block`` kohya's names for SDXL need.

    Raises:
        TrajectoryError: not a LoRA of two factors a module, or names that diffusers does not know, or that it would
            take for others without ``unet_config``.
    """
    alphas = alphas or LoraAlphas()
    named = _diffusers_names(weights, component=component, unet_config=unet_config)
    converted: dict[str, Tensor] = {}
    for name, (module, checkpoint_name) in named.items():
        factor = weights[checkpoint_name]
        *_, scale = module.factors(weights, alphas)
        if checkpoint_name == module.up and scale != 1.0:
            factor = (factor.double() * scale).to(factor.dtype)
        converted[name] = factor
    return converted


def _diffusers_names(names: Iterable[str], *, component: str, unet_config: Any) -> dict[str, tuple[LoraModule, str]]:
    """A factor's name in diffusers → its module, and the factor's name in the checkpoint; as :func:`to_diffusers`."""
    modules = lora_modules(names)
    if lora_flavour(module.down for module in modules) == "kohya":
        places = _kohya_places(modules, unet_config)
    else:
        places = {}
        for module in modules:
            if _NOT_OF_DIFFUSERS.match(module.path):
                raise _unknown_names(module)
            place = module.component or component
            if not module.component and module.path.startswith(_TRANSFORMER_BLOCKS):
                place = "transformer"
            places[module.name] = (place, module.path)
    named: dict[str, tuple[LoraModule, str]] = {}
    for module in modules:
        module_component, path = places[module.name]
        down, up = _SUFFIXES
        if module_component.startswith("text_encoder"):
            down, up = _TEXT_ENCODER_SUFFIXES
        named[f"{module_component}.{path}{down}"] = (module, module.down)
        named[f"{module_component}.{path}{up}"] = (module, module.up)
    return named


def _unknown_names(module: LoraModule) -> TrajectoryError:
    """The error for a LoRA whose modules have other names than in diffusers."""
    return TrajectoryError(
        f"{module.down!r} is no name of diffusers: without --as lora the file keeps its names, which load_lora_weights "
        "translates."
    )


def _kohya_places(modules: Sequence[LoraModule], unet_config: Any) -> dict[str, tuple[str, str]]:
    """Name of each module → its component and path in a pipeline of diffusers."""
    for module in modules:
        if module.component == "unet" and not module.path.startswith(_UNET_BLOCKS):
            raise _unknown_names(module)
        is_sdxl = module.component == "unet" and module.path.startswith(SDXL_BLOCKS)
        if is_sdxl and unet_config is None:
            raise TrajectoryError(
                f"{module.down!r} is a name of SDXL's first code, which the U-Net's layers_per_block translates: "
                "export the LoRA from its study with --as lora, or give unet_config."
            )
    # diffusers renames the tensors of a file; these hold the index of their module, which tells them apart afterwards
    indices: dict[str, Tensor] = {}
    for index, module in enumerate(modules):
        indices[module.down] = torch.tensor(index)
        indices[module.up] = torch.tensor(index)
    convert = import_extra("diffusers").StableDiffusionPipeline.lora_state_dict
    try:
        renamed, _ = convert(indices, unet_config=unet_config)
        converted = lora_modules(renamed)
        if len(converted) < len(modules):
            raise ValueError(f"{len(modules) - len(converted)} modules are left out")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, TrajectoryError) as error:
        raise TrajectoryError(
            f"diffusers does not know the names of this LoRA, such as {modules[0].down!r}: it converts kohya's files "
            "of Stable Diffusion and SDXL; convert it with the trainer's own tools."
        ) from error
    places: dict[str, tuple[str, str]] = {}
    for module in converted:
        original = modules[int(renamed[module.down])]
        places[original.name] = (module.component, module.path)
    return places
