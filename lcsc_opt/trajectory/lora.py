"""LoRA state dicts: their factors and alphas, their names in a diffusers pipeline, and files of them.

A LoRA adds ``alpha / rank * up @ down`` to the weight of a module. Combining its tensors as they are, as the paper
does, is what a trajectory's own merge does; ``lora_products`` combines the products.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lcsc_opt.errors import CheckpointError, TrajectoryError
from lcsc_opt.progress import notice
from lcsc_opt.torchvision_import import prepare_torchvision
from lcsc_opt.trajectory.formats import read_metadata
from lcsc_opt.trajectory.lora_names import (
    COMPONENTS,
    PAIRS,
    Flavour,
    LoraModule,
    check_factors,
    lora_flavour,
    lora_modules,
)
from lcsc_opt.trajectory.store import Trajectory

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside the weights
ADAPTER_METADATA = "lora_adapter_metadata"  # the same, in the safetensors header of files that diffusers writes


@dataclasses.dataclass(frozen=True, eq=False)
class LoraFactors:
    """``down [rank, in(, h, w)]``, ``up [out, rank(, 1, 1)]`` and ``alpha`` of one module."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """How many rows ``down`` has."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """What the product is multiplied by, alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """ΔW = alpha / rank · up · down, ``[out, in(, h, w)]``, as large as the module's weight."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.scale * product.view(self.up.shape[0], *self.down.shape[1:])


@dataclasses.dataclass(frozen=True)
class LoraAlphas:
    """The alphas of a LoRA whose tensors do not hold them.

    Attributes:
        configs: component → PEFT's configuration of it; the component is empty in PEFT's own files. A module without
            a configuration has alpha = rank, as diffusers takes it.
    """

    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def constant(cls, alpha: float) -> LoraAlphas:
        """The same alpha for every module."""
        return cls({component: {"lora_alpha": alpha} for component in ("", *COMPONENTS)})

    def of(self, module: LoraModule, rank: int) -> float:
        """The alpha of ``module``, such that its product is multiplied by alpha / rank."""
        config = self.configs.get(module.component)
        if config is None:
            return float(rank)
        alpha = float(config["lora_alpha"])
        for pattern, other in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module.path):  # as PEFT matches them
                alpha = float(other)
                break
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def lora_factors(weights: Mapping[str, Tensor], module: LoraModule, alphas: LoraAlphas | None = None) -> LoraFactors:
    """The factors of one module.

    Raises:
        TrajectoryError: shapes that are no factors of one product.
    """
    down, up = weights[module.down], weights[module.up]
    check_factors(module, down.shape, up.shape)
    rank = int(down.shape[0])
    alpha = (alphas or LoraAlphas()).of(module, rank) if module.alpha is None else float(weights[module.alpha])
    return LoraFactors(down, up, alpha)


def read_alphas(path: str | Path) -> LoraAlphas | None:
    """What the header of a LoRA file, or the ``adapter_config.json`` beside it, says of alphas; ``None`` if nothing.

    Args:
        path: a file, or the folder that holds it.

    Raises:
        CheckpointError: a configuration that is none.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        if text := read_metadata(file).get(ADAPTER_METADATA):
            return LoraAlphas(_by_component(_parse(file, text)))
    config = folder / ADAPTER_CONFIG
    if not config.is_file():
        return None
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{config} cannot be read: {error}.") from error
    return LoraAlphas({"": _check_config(config, _parse(config, text))})


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the configuration of its LoRA is not JSON: save it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: the configuration of its LoRA is not a JSON object: save it again.")
    return content


def _by_component(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``{"unet.lora_alpha": 8}`` → ``{"unet": {"lora_alpha": 8}}``; names without a component belong to ``""``."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        component, _, entry = name.partition(".")
        component, entry = (component, entry) if component in COMPONENTS else ("", name)
        found.setdefault(component, {})[entry] = value
    return {component: config for component, config in found.items() if _has_alpha(config)}


def _check_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    if not _has_alpha(config):
        raise CheckpointError(f"{path} tells no number lora_alpha: it is not the configuration of a LoRA.")
    return config


def _has_alpha(config: Mapping[str, Any]) -> bool:
    """Whether there is a number, and patterns that are regular expressions with numbers."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        return False
    try:
        for pattern in patterns:
            re.compile(pattern)
    except re.error:
        return False
    numbers = [config.get("lora_alpha"), *patterns.values()]
    return all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)


def trajectory_alphas(trajectory: Trajectory) -> LoraAlphas:
    """The alphas of a trajectory of LoRA checkpoints whose tensors do not hold them, read beside its last source.

    Raises:
        TrajectoryError: PEFT checkpoints that are no longer there, whose alpha nothing else tells.
    """
    modules = lora_modules(trajectory.names)
    if all(module.alpha is not None for module in modules):
        return LoraAlphas()
    source = trajectory.sources[-1]
    if source and Path(source).exists():
        return read_alphas(source) or LoraAlphas()
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
        unet_config: the U-Net's configuration, which the names that kohya uses for SDXL need.

    Raises:
        TrajectoryError: names that diffusers does not know.
    """
    modules = list(modules)
    if lora_flavour(module.down for module in modules) == "kohya":
        return _convert_kohya(modules, unet_config)
    return {module.name: (module.component or component, module.path) for module in modules}


def _convert_kohya(modules: list[LoraModule], unet_config: Any) -> dict[str, tuple[str, str]]:
    prepare_torchvision()
    from diffusers import StableDiffusionPipeline

    marks = {name: torch.tensor(i) for i, module in enumerate(modules) for name in (module.down, module.up)}
    convert = cast("Any", StableDiffusionPipeline).lora_state_dict
    try:
        renamed, _ = convert(marks, unet_config=unet_config)
        found = lora_modules(renamed)
    except (ValueError, KeyError, IndexError, TrajectoryError) as error:
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
    pending = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    try:
        save_file(tensors, pending, metadata={"format": "pt", **(metadata or {})})
        pending.replace(path)
    except (OSError, SafetensorError) as error:
        pending.unlink(missing_ok=True)
        raise TrajectoryError(f"Cannot write {path}: {error}.") from error
