"""LoRA state dicts: their factors and alphas, their names in a diffusers pipeline, and files of them.

A LoRA adds ``alpha / rank * up @ down`` to the weight of a module. Combining its tensors as they are, as the paper
does, is what a trajectory's own merge does; ``lora_products`` combines the products.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lcsc_opt.base.errors import CheckpointError, TrajectoryError
from lcsc_opt.base.files import replacing
from lcsc_opt.base.imports import prepare_torchvision
from lcsc_opt.base.progress import notice
from lcsc_opt.trajectory.formats import read_metadata
from lcsc_opt.trajectory.formats.contents import Refused
from lcsc_opt.trajectory.formats.folders import find_weights
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
PACKED_ALPHAS = "lora_alphas"  # what both tell, in the metadata of a packed trajectory
SCALE_ENTRIES = ("lora_alpha", "alpha_pattern", "use_rslora")  # of PEFT's configuration; others may hold paths
LONGEST_PATTERN = 500  # characters; PEFT's own are names of modules
SDXL_BLOCKS = ("input_blocks_", "middle_block_", "output_blocks_")  # kohya's names for the U-Net of SDXL


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
        configs: component → PEFT's configuration of it. That of the empty component, as in PEFT's own files, is for
            all that have none. A module without a configuration has alpha = rank, as diffusers takes it.
    """

    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def constant(cls, alpha: float) -> LoraAlphas:
        """The same alpha for every module."""
        return cls({component: {"lora_alpha": alpha} for component in ("", *COMPONENTS)})

    def of(self, module: LoraModule, rank: int) -> float:
        """The alpha of ``module``, such that its product is multiplied by alpha / rank."""
        config = self.configs.get(module.component, self.configs.get(""))
        if config is None:
            return float(rank)
        alpha = float(config["lora_alpha"])
        for pattern, other in (config.get("alpha_pattern") or {}).items():
            if re.match(_whole_pattern(pattern), module.path):
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


def _whole_pattern(pattern: str) -> str:
    """A regular expression of PEFT's ``alpha_pattern``, as PEFT matches it with the path of a module."""
    return rf"(.*\.)?({pattern})$"


def read_alphas(path: str | Path, *, key: str | None = None) -> LoraAlphas | None:
    """What a LoRA file's header, or ``adapter_config.json`` beside it or one folder up, says of alphas; else ``None``.

    Args:
        path: a file, or a checkpoint's folder, whose weights may lie in a subfolder such as ``unet_lora``.
        key: which weights of the folder, as in :func:`read_checkpoint`.

    Raises:
        CheckpointError: a configuration that is none.
    """
    file = _weights_file(Path(path), key)
    if text := read_metadata(file).get(ADAPTER_METADATA):
        return LoraAlphas(_by_component(_parse(file, text)))
    folder = file if file.is_dir() else file.parent
    for config in (folder / ADAPTER_CONFIG, folder.absolute().parent / ADAPTER_CONFIG):
        if config.is_file():
            return LoraAlphas({"": _scale_entries(config, _parse(config, _read_text(config)))})
    return None


def _weights_file(path: Path, key: str | None) -> Path:
    """The file of a folder that has the weights; the folder itself where they are not told apart."""
    if not path.is_dir():
        return path
    try:
        return find_weights(path, key).file
    except Refused:
        return path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


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
    checked = {component: scale_entries(config) for component, config in found.items()}
    return {component: config for component, config in checked.items() if config is not None}


def _scale_entries(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    entries = scale_entries(config)
    if entries is None:
        raise CheckpointError(f"{path} tells no number lora_alpha: it is not the configuration of a LoRA.")
    return entries


def scale_entries(config: object) -> dict[str, Any] | None:
    """What of PEFT's configuration decides a LoRA's scale; ``None`` where that is not numbers and regular expressions.

    Every other entry is left out: some name folders of the machine that trained it.
    """
    if not isinstance(config, Mapping):
        return None
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping) or not all(map(_is_pattern, patterns)):
        return None
    if not all(map(_is_finite, (config.get("lora_alpha"), *patterns.values()))):
        return None
    return {name: config[name] for name in SCALE_ENTRIES if config.get(name)} | {"lora_alpha": config["lora_alpha"]}


def _is_pattern(text: object) -> bool:
    if not isinstance(text, str) or len(text) > LONGEST_PATTERN:
        return False
    try:
        re.compile(_whole_pattern(text))
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_finite(number: object) -> bool:
    try:
        return isinstance(number, (int, float)) and math.isfinite(number)
    except OverflowError:  # a whole number beyond floating point
        return False


def alphas_metadata(names: Iterable[str], source: Path, key: str) -> dict[str, str]:
    """The metadata entry that keeps the alphas of a LoRA in its packed trajectory; empty for other weights.

    Args:
        names: of the tensors.
        source: a checkpoint, as :func:`read_alphas` takes it.
        key: which weights of it.
    """
    if lora_flavour(names) is None:
        return {}
    try:
        alphas = read_alphas(source, key=key)
    except CheckpointError:
        return {}  # whoever needs the alphas is told then
    return {} if alphas is None else {PACKED_ALPHAS: json.dumps(alphas.configs)}


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
