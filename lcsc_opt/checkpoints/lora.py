"""The names of a LoRA's tensors: which of them belong to the same module, and which module that is.

Three flavours of names are in use: ``diffusers`` (``unet.….lora.down.weight`` or ``unet.….lora_A.weight``), ``peft``
(``base_model.model.….lora_A.weight``) and ``kohya`` (``lora_unet_….lora_down.weight``, with a tensor ``.alpha``).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.folders import find_weights
from lcsc_opt.checkpoints.reading import read_metadata

Flavour = Literal["diffusers", "peft", "kohya"]

PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),  # of diffusers before 0.22: …attn1.processor.to_q_lora.down.weight
    (".lora_down.weight", ".lora_up.weight"),
)
ALPHA = ".alpha"
PEFT_PREFIX = "base_model.model."
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
KOHYA_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
OLD_ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
OLD_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclasses.dataclass(frozen=True)
class LoraModule:
    """The tensors of one adapted module.

    Attributes:
        name: the module's part of the tensors' names.
        component: which model of a pipeline it belongs to; empty where the names do not tell.
        path: the module inside that model; in kohya's files with underscores in place of dots.
        down: name of the factor ``[rank, in]`` or ``[rank, in, h, w]``.
        up: name of the factor ``[out, rank]`` or ``[out, rank, 1, 1]``.
        alpha: name of the scalar; ``None`` where the file has none.
    """

    name: str
    component: str
    path: str
    down: str
    up: str
    alpha: str | None


def lora_flavour(names: Iterable[str]) -> Flavour | None:
    """The flavour of a state dict with these ``names``; ``None`` when it holds no LoRA factor."""
    downs = [name for name in names if name.endswith(tuple(down for down, _ in PAIRS))]
    if not downs:
        return None
    if all(name.startswith(PEFT_PREFIX) for name in downs):
        return "peft"
    return "kohya" if all(name.startswith(tuple(KOHYA_COMPONENTS)) for name in downs) else "diffusers"


def lora_modules(names: Iterable[str]) -> tuple[LoraModule, ...]:
    """The modules of a LoRA, in the order of ``names``.

    Raises:
        TrajectoryError: no LoRA, or one with other parts than a pair of factors and an alpha for each module, such as
            DoRA, LoHa, LoKr or LoRA with a third factor.
    """
    names = list(names)
    flavour = lora_flavour(names)
    if flavour is None:
        raise TrajectoryError(
            "These weights are no LoRA: none of their names ends like a factor (lora_A, lora_down …)."
        )
    present, taken = set(names), set()
    modules = []
    for name in names:
        for down, up in PAIRS:
            if name.endswith(down):
                module = _module(flavour, name, down, up, present)
                modules.append(module)
                taken |= {module.down, module.up, module.alpha}
                break
    for name in names:
        if name not in taken:
            raise TrajectoryError(f"{name!r} is no part of a LoRA of two factors: its products cannot be told.")
    return tuple(modules)


def _module(flavour: Flavour, name: str, down: str, up: str, present: set[str]) -> LoraModule:
    stem = name.removesuffix(down)
    if stem + up not in present:
        raise TrajectoryError(f"{name!r} has no partner {stem + up!r}: the LoRA is not whole.")
    component, path = _place(flavour, stem, old=down.startswith("_"))
    alpha = stem + ALPHA if stem + ALPHA in present else None
    return LoraModule(stem, component, path, name, stem + up, alpha)


def _place(flavour: Flavour, stem: str, *, old: bool) -> tuple[str, str]:
    """The component and the module inside it, read from the ``stem`` of a name."""
    if flavour == "peft":
        return "", stem.removeprefix(PEFT_PREFIX)
    if flavour == "kohya":
        prefix = next(prefix for prefix in KOHYA_COMPONENTS if stem.startswith(prefix))
        return KOHYA_COMPONENTS[prefix], stem.removeprefix(prefix)
    component, _, path = stem.partition(".")
    if component not in COMPONENTS:
        component, path = "", stem
    path = path.removeprefix(PEFT_PREFIX).replace(".processor.", ".")  # files of LCM-LoRA's trainer have PEFT's
    if old:
        base, _, projection = path.rpartition(".")
        renamed = OLD_TEXT_ATTENTION if base.endswith("self_attn") else OLD_ATTENTION
        path = f"{base}.{renamed.get(projection, projection)}"
    return component, path


def _check_factors(module: LoraModule, down: Sequence[int], up: Sequence[int]) -> None:
    linear = len(down) == 2 and len(up) == 2
    convolution = len(down) == 4 and len(up) == 4 and tuple(up[2:]) == (1, 1)
    if not (linear or convolution) or up[1] != down[0] or not down[0]:
        raise TrajectoryError(
            f"{module.name}: factors of shapes {list(down)} and {list(up)} make no product; expected [rank, in] and "
            "[out, rank], or [rank, in, h, w] and [out, rank, 1, 1]."
        )


ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside the weights


ADAPTER_METADATA = "lora_adapter_metadata"  # the same, in the safetensors header of files that diffusers writes


PACKED_ALPHAS = "lora_alphas"  # the same, in the metadata of a packed trajectory


SCALE_ENTRIES = ("lora_alpha", "alpha_pattern", "use_rslora")  # of PEFT's configuration; others may hold paths


LONGEST_PATTERN = 500  # characters; PEFT's own are names of modules


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
        """The factor of the product, alpha / rank."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class LoraAlphas:
    """The alphas of a LoRA whose tensors do not hold them.

    Attributes:
        configs: component → PEFT's configuration of it. The one of the empty component, as in PEFT's own files, is for
            all components without one. A module without a configuration has alpha = rank, as in diffusers.
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
    _check_factors(module, down.shape, up.shape)
    rank = int(down.shape[0])
    alpha = (alphas or LoraAlphas()).of(module, rank) if module.alpha is None else float(weights[module.alpha])
    return LoraFactors(down, up, alpha)


def _whole_pattern(pattern: str) -> str:
    """A regular expression of PEFT's ``alpha_pattern``, as PEFT matches it with the path of a module."""
    return rf"(.*\.)?({pattern})$"


def read_alphas(path: str | Path, *, key: str | None = None) -> LoraAlphas | None:
    """The alphas in a LoRA file's header, or in ``adapter_config.json`` beside it or one folder up; else ``None``.

    Args:
        path: a file, or a checkpoint's folder, whose weights may lie in a subfolder such as ``unet_lora``.
        key: which weights of the folder, as in :func:`read_checkpoint`.

    Raises:
        TrajectoryError: the configuration cannot be read, or is not one of a LoRA.
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
    """The file of a folder that has the weights; the folder itself where no file can be chosen."""
    if not path.is_dir():
        return path
    try:
        return find_weights(path, key).file
    except TrajectoryError:
        return path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrajectoryError(f"{path} cannot be read: {error}.") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TrajectoryError(f"{path}: the configuration of its LoRA is not JSON: save it again.") from error
    if not isinstance(content, dict):
        raise TrajectoryError(f"{path}: the configuration of its LoRA is not a JSON object: save it again.")
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
        raise TrajectoryError(f"{path} tells no number lora_alpha: it is not the configuration of a LoRA.")
    return entries


def scale_entries(config: object) -> dict[str, Any] | None:
    """The part of PEFT's configuration that decides a LoRA's scale; ``None`` where an entry of it is not valid.

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
        key: which weights of the checkpoint.
    """
    if lora_flavour(names) is None:
        return {}
    try:
        alphas = read_alphas(source, key=key)
    except TrajectoryError:
        return {}  # the error comes when the alphas are needed
    return {} if alphas is None else {PACKED_ALPHAS: json.dumps(alphas.configs)}
