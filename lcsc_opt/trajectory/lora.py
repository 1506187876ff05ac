"""LoRA state dicts: their factors and alphas, their names in a diffusers pipeline, and files of them.

A LoRA adds ``alpha / rank * up @ down`` to the weight of a module. Combining its tensors as they are, as the paper
does, is what a trajectory's own merge does; ``lora_products`` combines the products.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.files import replacing
from lcsc_opt.base.imports import prepare_torchvision
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.lora import (
    ADAPTER_CONFIG,
    PACKED_ALPHAS,
    PAIRS,
    Flavour,
    LoraAlphas,
    LoraFactors,
    LoraModule,
    _parse,
    _scale_entries,
    lora_factors,
    lora_flavour,
    lora_modules,
    read_alphas,
)
from lcsc_opt.trajectory.store import Trajectory

SDXL_BLOCKS = ("input_blocks_", "middle_block_", "output_blocks_")  # kohya's names for the U-Net of SDXL


def trajectory_alphas(trajectory: Trajectory) -> LoraAlphas:
    """The alphas of a trajectory of LoRA checkpoints whose tensors do not hold them: packed, or beside its last source.

    Raises:
        TrajectoryError: PEFT checkpoints that are no longer there, whose alpha nothing else tells; broken metadata.
    """
    modules = lora_modules(trajectory.names)
    if all(module.alpha is not None for module in modules):
        return LoraAlphas()
    if text := trajectory.metadata.get(PACKED_ALPHAS):
        packed = _parse(trajectory.path, text)
        return LoraAlphas({name: _scale_entries(trajectory.path, config) for name, config in packed.items()})
    source = trajectory.sources[-1]
    if source and Path(source).exists():
        return read_alphas(source, key=trajectory.metadata.get("key")) or LoraAlphas()
    if lora_flavour(trajectory.names) == "peft":
        where = source or "the checkpoint"
        raise TrajectoryError(
            f"{trajectory.path}: the LoRA's alpha stands in {ADAPTER_CONFIG} beside {where}, which is not there: "
            "give lora_alpha."
        )
    notice(f"{trajectory.path}: the LoRA's alpha is taken to be its rank, as diffusers does; give lora_alpha otherwise")
    return LoraAlphas()


def diffusers_paths(
    modules: Iterable[LoraModule], *, component: str = "unet", unet_config: Any = None
) -> dict[str, tuple[str, str]]:
    """Name of each module → its component and path in a diffusers pipeline.

    kohya's names are converted by diffusers itself, which knows the U-Nets of Stable Diffusion and SDXL.

    Args:
        modules: of one LoRA.
        component: what modules belong to whose names do not tell.
        unet_config: the U-Net's configuration, whose ``layers_per_block`` kohya's names for SDXL need.

    Raises:
        TrajectoryError: names that diffusers does not know, or that it would take for others without ``unet_config``.
    """
    modules = list(modules)
    if lora_flavour(module.down for module in modules) == "kohya":
        return _convert_kohya(modules, unet_config)
    return {module.name: (module.component or component, module.path) for module in modules}


def _convert_kohya(modules: list[LoraModule], unet_config: Any) -> dict[str, tuple[str, str]]:
    own = [module.down for module in modules if module.component == "unet" and module.path.startswith(SDXL_BLOCKS)]
    if own and unet_config is None:
        raise TrajectoryError(
            f"{own[0]!r} is a name of SDXL's first code, which the U-Net's layers_per_block translates: export the "
            "LoRA from its study with --as lora, or give unet_config."
        )
    prepare_torchvision()
    from diffusers import StableDiffusionPipeline

    marks = {name: torch.tensor(i) for i, module in enumerate(modules) for name in (module.down, module.up)}
    convert = cast("Any", StableDiffusionPipeline).lora_state_dict
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


def to_diffusers(
    weights: Mapping[str, Tensor],
    alphas: LoraAlphas | None = None,
    *,
    component: str = "unet",
    unet_config: Any = None,
) -> dict[str, Tensor]:
    """A LoRA of any flavour under the names that a pipeline's ``load_lora_weights`` loads.

    alpha / rank is multiplied into ``up``, since these names have no place for alpha: they mean alpha = rank.

    Args:
        weights: the LoRA.
        alphas: where the tensors do not hold them; ``None`` takes alpha = rank.
        component: what modules belong to whose names do not tell, ``unet`` or ``transformer``.
        unet_config: as for :func:`diffusers_paths`.

    Raises:
        TrajectoryError: not a LoRA of two factors a module, or names that diffusers does not know.
    """
    modules = lora_modules(weights)
    paths = diffusers_paths(modules, component=component, unet_config=unet_config)
    converted = {}
    for module in modules:
        factors = lora_factors(weights, module, alphas)
        where, path = paths[module.name]
        down, up = _diffusers_names(where, path)
        converted[down], converted[up] = factors.down, scaled_up(factors)
    return converted


def scaled_up(factors: LoraFactors) -> Tensor:
    """``up`` times alpha / rank, in its own dtype, rounded once."""
    if factors.scale == 1.0:
        return factors.up
    return (factors.up.double() * factors.scale).to(factors.up.dtype)


def _diffusers_names(component: str, path: str) -> tuple[str, str]:
    """Text encoders are loaded by their older suffix only."""
    down, up = PAIRS[2] if component.startswith("text_encoder") else PAIRS[0]
    return f"{component}.{path}{down}", f"{component}.{path}{up}"


def save_lora(
    weights: Mapping[str, Tensor],
    path: str | Path,
    flavour: Flavour = "diffusers",
    metadata: Mapping[str, str] | None = None,
    *,
    alphas: LoraAlphas | None = None,
    component: str = "unet",
    unet_config: Any = None,
) -> None:
    """Write a LoRA as one safetensors file; of flavour ``diffusers`` or ``kohya``, ``load_lora_weights`` loads it.

    Args:
        weights: the LoRA, of any flavour.
        path: the new file; one that is there is replaced when the new one is whole.
        flavour: ``diffusers`` converts; any other has to be the one that ``weights`` has.
        metadata: texts for the header.
        alphas: as for :func:`to_diffusers`; a file of flavour ``peft`` gets none, and needs ``adapter_config.json``.
        component: as for :func:`to_diffusers`.
        unet_config: as for :func:`to_diffusers`.

    Raises:
        TrajectoryError: as :func:`to_diffusers`, another flavour than the weights', or the disk refuses.
    """
    own = lora_flavour(weights)
    if flavour == "diffusers":
        weights = to_diffusers(weights, alphas, component=component, unet_config=unet_config)
    elif flavour != own:
        raise TrajectoryError(f"A LoRA with names of {own} is written with these or those of diffusers, not {flavour}.")
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    try:
        with replacing(path) as pending:
            save_file(tensors, pending, metadata={"format": "pt", **(metadata or {})})
    except (OSError, SafetensorError) as error:
        raise TrajectoryError(f"Cannot write {path}: {error}.") from error
