"""Putting one merged LoRA after the other into a pipeline, without making its adapter again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcsc_opt.base.errors import ObjectiveError, TrajectoryError
from lcsc_opt.base.imports import import_extra, quiet_libraries
from lcsc_opt.checkpoints.lora import LoraAlphas, LoraModule, lora_flavour, lora_modules
from lcsc_opt.checkpoints.weights import difference
from lcsc_opt.coefficients.layer_groups import LORA_FACTORS

ADAPTER = "merged"
_NAMES, _TEXT_NAMES = LORA_FACTORS[0], LORA_FACTORS[2]  # that load_lora_weights takes; the older for text encoders
_PARAMETERS = dict(zip(_NAMES + _TEXT_NAMES, ("lora_A", "lora_B") * 2, strict=True))  # of PEFT's layers


class LoraAdapter:
    """The adapter of a pipeline that merged LoRAs are copied into, one after the other.

    Its parameters are the factors as they are, and alpha / rank is the scale of PEFT's layers. So a gradient in a
    parameter is the gradient in the factor.

    Args:
        pipeline: of diffusers.
        alphas: of the LoRAs; ``None`` is alpha = rank.

    Attributes:
        factors: a factor's name in the checkpoints → its parameter; empty until the first LoRA is loaded.

    Raises:
        ObjectiveError: the pipeline takes no LoRA.
    """

    def __init__(self, pipeline: Any, alphas: LoraAlphas | None) -> None:
        if not hasattr(pipeline, "load_lora_weights"):
            raise ObjectiveError(f"component: {type(pipeline).__name__} takes no LoRA; merge its transformer or unet")
        self._pipeline, self._alphas = pipeline, alphas or LoraAlphas()
        self._unet = getattr(pipeline, "unet", None)
        self._places: dict[str, tuple[Any, nn.Parameter]] = {}  # a factor's name in diffusers → its layer of PEFT
        self.factors: dict[str, Tensor] = {}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy a merged LoRA into the adapter, which the first one makes.

        Raises:
            ObjectiveError: it does not fit the pipeline, or has other names or shapes than the first one.
        """
        component, config = ("transformer", None) if self._unet is None else ("unet", self._unet.config)
        named = _diffusers_names(weights, component=component, unet_config=config)
        factors = {name: weights[own] for name, (_, own) in named.items()}
        scales = {name: module.factors(weights, self._alphas)[2] for name, (module, _) in named.items()}
        if not self._places:
            self._places = self._create(factors)
            self.factors = {own: self._places[name][1] for name, (_, own) in named.items()}
        there = {name: parameter for name, (_, parameter) in self._places.items()}
        if (differs := difference(factors, there)) is not None:
            raise ObjectiveError(f"the LoRA does not fit the one in the pipeline: it {differs}")
        with torch.no_grad():
            for name, (layer, parameter) in self._places.items():
                parameter.copy_(factors[name])
                layer.scaling[ADAPTER] = scales[name]

    def _create(self, factors: Mapping[str, Tensor]) -> dict[str, tuple[Any, nn.Parameter]]:
        """Let the pipeline load it as it loads a file, and find the layers and parameters that it went to."""
        # copies: tensors of the right dtype would become the parameters
        in_dtype = {name: factor.to(self._part(name).dtype, copy=True) for name, factor in factors.items()}
        try:
            with quiet_libraries():  # diffusers warns of every part that a LoRA is not of
                self._pipeline.load_lora_weights(in_dtype, adapter_name=ADAPTER)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ObjectiveError(f"the LoRA does not fit {type(self._pipeline).__name__}: {reason}") from error
        return {name: self._place(name) for name in factors}

    def _part(self, name: str) -> Any:
        part = getattr(self._pipeline, name.partition(".")[0], None)
        if not isinstance(part, nn.Module):
            raise ObjectiveError(f"the LoRA's {name} belongs to a part that {type(self._pipeline).__name__} lacks")
        return part

    def _place(self, name: str) -> tuple[Any, nn.Parameter]:
        """PEFT's layer of a factor, and the parameter in it."""
        suffix = next((suffix for suffix in _PARAMETERS if name.endswith(suffix)), "")
        path = name.removesuffix(suffix).partition(".")[2]
        part = self._part(name)
        for place in (path, path.removeprefix("text_model.")):  # which transformers 5 has no more
            try:
                layer: Any = part.get_submodule(place)
                parameter: nn.Parameter = getattr(layer, _PARAMETERS[suffix])[ADAPTER].weight
            except (AttributeError, KeyError):
                continue
            return layer, parameter
        raise ObjectiveError(f"the LoRA's {name} has no place in the pipeline's {type(part).__name__}")


SDXL_BLOCKS = ("input_blocks_", "middle_block_", "output_blocks_")  # kohya's names for the U-Net of SDXL


def to_diffusers(
    weights: Mapping[str, Tensor],
    alphas: LoraAlphas | None = None,
    *,
    component: str = "unet",
    unet_config: Any = None,
) -> dict[str, Tensor]:
    """A LoRA of any flavour under the names that a pipeline's ``load_lora_weights`` loads.

    alpha / rank is multiplied into ``up``, since these names have no place for alpha: they mean alpha = rank. kohya's
    names are converted by diffusers itself, which knows the U-Nets of Stable Diffusion and SDXL.

    Args:
        weights: the LoRA.
        alphas: where the tensors do not hold them; ``None`` takes alpha = rank.
        component: what modules belong to whose names do not tell, ``unet`` or ``transformer``.
        unet_config: the U-Net's configuration, whose ``layers_per_block`` kohya's names for SDXL need.

    Raises:
        TrajectoryError: not a LoRA of two factors a module, or names that diffusers does not know, or that it would
            take for others without ``unet_config``.
    """
    converted = {}
    for name, (module, own) in _diffusers_names(weights, component=component, unet_config=unet_config).items():
        *_, scale = module.factors(weights, alphas or LoraAlphas())
        scaled = own == module.up and scale != 1.0
        converted[name] = (weights[own].double() * scale).to(weights[own].dtype) if scaled else weights[own]
    return converted


def _diffusers_names(names: Iterable[str], *, component: str, unet_config: Any) -> dict[str, tuple[LoraModule, str]]:
    """A factor's name in diffusers → its module, and its own name."""
    modules = lora_modules(names)
    places = {module.name: (module.component or component, module.path) for module in modules}
    if lora_flavour(module.down for module in modules) == "kohya":
        places = _kohya_places(modules, unet_config)
    named: dict[str, tuple[LoraModule, str]] = {}
    for module in modules:
        where, path = places[module.name]
        down, up = _TEXT_NAMES if where.startswith("text_encoder") else _NAMES
        named |= {f"{where}.{path}{down}": (module, module.down), f"{where}.{path}{up}": (module, module.up)}
    return named


def _kohya_places(modules: Sequence[LoraModule], unet_config: Any) -> dict[str, tuple[str, str]]:
    """Name of each module → its component and path in a pipeline of diffusers."""
    own = [module.down for module in modules if module.component == "unet" and module.path.startswith(SDXL_BLOCKS)]
    if own and unet_config is None:
        raise TrajectoryError(
            f"{own[0]!r} is a name of SDXL's first code, which the U-Net's layers_per_block translates: export the "
            "LoRA from its study with --as lora, or give unet_config."
        )
    marks = {name: torch.tensor(i) for i, module in enumerate(modules) for name in (module.down, module.up)}
    convert = import_extra("diffusers").StableDiffusionPipeline.lora_state_dict
    try:
        renamed, _ = convert(marks, unet_config=unet_config)
        found = lora_modules(renamed)
        if len(found) < len(modules):
            raise ValueError(f"{len(modules) - len(found)} modules are left out")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, TrajectoryError) as error:
        raise TrajectoryError(
            f"diffusers does not know the names of this LoRA, such as {modules[0].down!r}: it converts kohya's files "
            "of Stable Diffusion and SDXL; convert it with the trainer's own tools."
        ) from error
    return {modules[int(renamed[module.down])].name: (module.component, module.path) for module in found}
