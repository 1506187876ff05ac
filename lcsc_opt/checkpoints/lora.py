"""The names of a LoRA's tensors: which of them belong to the same module, and which module that is; and its alphas.

Three flavours of names are in use: ``diffusers`` (``unet.….lora.down.weight`` or ``unet.….lora_A.weight``), ``peft``
(``base_model.model.….lora_A.weight``) and ``kohya`` (``lora_unet_….lora_down.weight``, with a tensor ``.alpha``).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.folders import file_of_weights
from lcsc_opt.checkpoints.reading import read_metadata
from lcsc_opt.coefficients.layer_groups import LORA_FACTORS

Flavour = Literal["diffusers", "peft", "kohya"]

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, next to the weights
PACKED_ALPHAS = "lora_alphas"  # in the metadata of a packed trajectory
_PEFT_PREFIX = "base_model.model."
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA_PREFIXES = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_unet_": "unet",
    "lora_te2_": "text_encoder_2",
}
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # PEFT's init_lora_weights, as in pissa_niter_16
# files of diffusers from before PEFT: projection → module of a U-Net's attention, and of CLIP's
_OLD_ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_OLD_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclasses.dataclass(frozen=True)
class LoraModule:
    """The tensors of one adapted module.

    Attributes:
        name: the module's part of the tensors' names.
        component: which model of a pipeline it belongs to; empty if the names do not tell.
        path: the module inside that model; in kohya's files with underscores in place of dots.
        down: name of the factor ``[rank, in]`` or ``[rank, in, h, w]``.
        up: name of the factor ``[out, rank]`` or ``[out, rank, 1, 1]``.
        alpha: name of the scalar; ``None`` where tensors do not hold it.
    """

    name: str
    component: str
    path: str
    down: str
    up: str
    alpha: str | None

    def factors(self, weights: Mapping[str, Tensor], alphas: LoraAlphas) -> tuple[Tensor, Tensor, float]:
        """``down [rank, in(, h, w)]``, ``up [out, rank(, 1, 1)]`` and the scale of their product, alpha / rank.

        ``alphas`` are for a module whose tensors hold none.

        Raises:
            TrajectoryError: the shapes of the factors do not belong together.
        """
        down = weights[self.down]
        up = weights[self.up]
        rank = len(down)
        is_linear = down.dim() == 2 and up.dim() == 2
        is_convolution = down.dim() == 4 and up.dim() == 4 and up.shape[2:] == (1, 1)
        if not (is_linear or is_convolution) or up.shape[1] != rank or rank == 0:
            raise TrajectoryError(
                f"{self.name}: factors of shapes {list(down.shape)} and {list(up.shape)} cannot be multiplied; "
                "expected [rank, in] and [out, rank], or [rank, in, h, w] and [out, rank, 1, 1]."
            )
        alpha = alphas.of(self, rank) if self.alpha is None else float(weights[self.alpha])
        return down, up, alpha / rank


class _Scale(pydantic.BaseModel):
    """The entries of PEFT's configuration that decide a LoRA's scale; others, such as local paths, are dropped."""

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore")

    lora_alpha: pydantic.FiniteFloat
    alpha_pattern: dict[str, pydantic.FiniteFloat] | None = None
    use_rslora: bool | None = None
    init_lora_weights: bool | str | None = None

    @pydantic.field_validator("alpha_pattern")
    @classmethod
    def _check_patterns(cls, patterns: dict[str, float] | None) -> dict[str, float] | None:
        """Refuse broken patterns where a file is read, and not where a module is looked for."""
        for pattern in patterns or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns

    def alpha_of(self, path: str) -> float:
        """The alpha of the module at ``path``: that of the first pattern that matches, else that of all modules."""
        for pattern, alpha in (self.alpha_pattern or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):  # as PEFT matches the paths of modules
                return alpha
        return self.lora_alpha


class LoraAlphas(pydantic.BaseModel):
    """The alphas of a LoRA whose tensors do not hold them.

    Attributes:
        configs: component → its scale. PEFT's own files have only the component ``""``, which stands for all components
            that are not named. A module without a scale has alpha = rank, as in diffusers.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    configs: dict[str, _Scale] = {}

    def check_start(self) -> None:
        """Refuse adapters that are no LoRAs of the base model: some initializations change the base, too.

        Raises:
            TrajectoryError: naming the initialization.
        """
        for config in self.configs.values():
            method = str(config.init_lora_weights)
            if method.startswith(_CHANGE_THE_BASE):
                raise TrajectoryError(
                    f"The adapter began by {method}, which also changed the base weights, so it is no LoRA of the base "
                    "model alone. Convert the checkpoints first: PEFT's save_pretrained has "
                    "path_initial_model_for_weight_conversion for it; or write the adapter as PEFT has it."
                )

    @classmethod
    def constant(cls, alpha: float) -> LoraAlphas:
        """The same alpha for every module."""
        return cls(configs={"": _Scale(lora_alpha=alpha)})

    @classmethod
    def read(cls, path: str | Path, *, key: str | None = None) -> LoraAlphas | None:
        """The alphas in a LoRA file's header, or in ``adapter_config.json`` next to it or one folder up; else ``None``.

        Args:
            path: a file, or a checkpoint's folder, whose weights may lie in a subfolder such as ``unet_lora``.
            key: which weights of the folder, as in :func:`read_checkpoint`.

        Raises:
            TrajectoryError: the configuration cannot be read, or is not one of a LoRA.
        """
        file = file_of_weights(Path(path), key)
        text = read_metadata(file).get("lora_adapter_metadata")  # PEFT's configuration, in files that diffusers writes
        if text:
            return _parse(file, text)
        folder = file if file.is_dir() else file.parent
        for config in (folder / ADAPTER_CONFIG, folder.absolute().parent / ADAPTER_CONFIG):
            if config.is_file():
                return _parse(config, config.read_bytes())
        return None

    def of(self, module: LoraModule, rank: int) -> float:
        """The alpha of ``module``, such that its product is multiplied by alpha / rank."""
        config = self.configs.get(module.component, self.configs.get(""))
        if config is None:
            return float(rank)
        alpha = config.alpha_of(module.path)
        if config.use_rslora:  # which multiplies by alpha / sqrt(rank)
            alpha *= math.sqrt(rank)
        return alpha


def lora_flavour(names: Iterable[str]) -> Flavour | None:
    """The flavour of a state dict with these ``names``, or ``None`` if it is no LoRA, or also holds the base model."""
    down_suffixes = tuple(down for down, _ in LORA_FACTORS)
    all_names = list(names)
    downs = [name for name in all_names if name.endswith(down_suffixes)]
    has_base_model = any(".base_layer." in name for name in all_names)  # PEFT's name of a layer that is adapted
    if not downs or has_base_model:
        return None
    if all(name.startswith(_PEFT_PREFIX) for name in downs):
        return "peft"
    if all(name.startswith(tuple(_KOHYA_PREFIXES)) for name in downs):
        return "kohya"
    return "diffusers"


def loads_in_pipelines(names: Iterable[str]) -> bool:
    """Whether ``load_lora_weights`` reads these names of factors as they are: they name a pipeline's component."""
    return all(name.startswith(tuple(f"{component}." for component in _COMPONENTS)) for name in names)


def warn_of_two_forms(file: str, names: Collection[str]) -> None:
    """Say of names in two forms that pipelines skip some of them, so that they show other models than ours.

    ``file`` has them; it is empty where a training loop wrote the checkpoints.
    """
    skipped = len(in_one_form(names))
    if skipped:
        notice(
            f"{file or 'the last checkpoint'}: its tensors, like those of all these checkpoints, have names in two "
            f"forms, and load_lora_weights skips {skipped} of its {len(names)} tensors, so a pipeline that loads such "
            "a file shows another model; here, and in what is exported, all of them count. lcsc apply step:N FOLDER "
            "-o FILE.safetensors --as lora writes a checkpoint that loads as a whole"
        )


def in_one_form(names: Iterable[str]) -> dict[str, str]:
    """New names of the factors that ``load_lora_weights`` would skip; mostly none.

    diffusers' scripts write two forms of names where layers beside the attention are adapted:
    ``….to_q.lora.down.weight`` and ``….conv_in.lora_A.weight``. The first tensor of a component, in the alphabetical
    order of safetensors, decides which of them are loaded: all, or those in the form ``lora_A`` alone.
    """
    (new_down, new_up), (old_down, old_up) = LORA_FACTORS[:2]
    of_component: dict[str, list[str]] = {}
    for name in sorted(names):
        of_component.setdefault(name.partition(".")[0], []).append(name)
    renamed = {}
    for of_one in of_component.values():
        if not of_one[0].endswith((new_down, new_up)):
            continue
        for name in of_one:
            if name.endswith(old_down):
                renamed[name] = name.removesuffix(old_down) + new_down
            elif name.endswith(old_up):
                renamed[name] = name.removesuffix(old_up) + new_up
    return renamed


def lora_modules(names: Iterable[str]) -> tuple[LoraModule, ...]:
    """The modules of a LoRA, in the order of ``names``.

    Raises:
        TrajectoryError: not a LoRA, or one whose modules have more than two factors and an alpha, such as DoRA, LoHa,
            LoKr or LoRA with a third factor.
    """
    names = list(names)
    flavour = lora_flavour(names)
    if flavour is None:
        raise TrajectoryError("These weights are not a LoRA: no name ends like a factor (lora_A, lora_down …).")
    all_names = set(names)
    modules = []
    names_in_modules: set[str | None] = set()
    for down in names:
        suffixes = next((pair for pair in LORA_FACTORS if down.endswith(pair[0])), None)
        if suffixes is None:
            continue
        down_suffix, up_suffix = suffixes
        stem = down.removesuffix(down_suffix)
        up = stem + up_suffix
        if up not in all_names:
            raise TrajectoryError(f"{down!r} has no partner {up!r}: the LoRA is incomplete.")
        alpha: str | None = f"{stem}.alpha"
        if alpha not in all_names:
            alpha = None
        component, path = _component_and_path(flavour, stem, is_old=down_suffix.startswith("_"))
        modules.append(LoraModule(stem, component, path, down, up, alpha))
        names_in_modules |= {down, up, alpha}
    for name in names:
        if name not in names_in_modules:
            raise TrajectoryError(f"{name!r} is not part of a LoRA of two factors: no other adapters are supported.")
    return tuple(modules)


def _component_and_path(flavour: Flavour, stem: str, *, is_old: bool) -> tuple[str, str]:
    """The component and the module inside it, from the ``stem`` of a factor's name: what is before its suffix.

    ``is_old`` is for diffusers' files from before PEFT (``…processor.to_q_lora.down.weight``), which have other names
    for the modules of attention.
    """
    if flavour == "peft":
        return "", stem.removeprefix(_PEFT_PREFIX)
    if flavour == "kohya":
        prefix = next(prefix for prefix in _KOHYA_PREFIXES if stem.startswith(prefix))
        return _KOHYA_PREFIXES[prefix], stem.removeprefix(prefix)
    component, path = _split_component(stem)
    path = path.removeprefix(_PEFT_PREFIX)  # files of LCM-LoRA's trainer have it
    path = path.replace(".processor.", ".")
    if is_old:
        base, _, projection = path.rpartition(".")
        renamed = _OLD_ATTENTION
        if base.endswith("self_attn"):
            renamed = _OLD_TEXT_ATTENTION
        path = f"{base}.{renamed.get(projection, projection)}"
    return component, path


def _split_component(name: str) -> tuple[str, str]:
    """``unet.mid_block`` → ``unet``, ``mid_block``; a name without a component → ``""`` and the name."""
    component, _, rest = name.partition(".")
    if component in _COMPONENTS:
        return component, rest
    return "", name


def _parse(path: Path, text: str | bytes) -> LoraAlphas:
    """The alphas in the JSON of a header or of ``adapter_config.json``; ``path`` is for errors.

    ``"unet.lora_alpha"`` is of the component ``unet``; entries without a component belong to ``""``.

    Raises:
        TrajectoryError: it is no configuration of a LoRA.
    """
    configs: dict[str, dict[str, Any]] = {}
    try:
        for name, value in json.loads(text).items():
            component, entry = _split_component(name)
            configs.setdefault(component, {})[entry] = value
        # an empty configuration is refused, as it lacks lora_alpha
        return LoraAlphas.model_validate({"configs": configs or {"": {}}})
    except (ValueError, AttributeError, RecursionError) as error:  # pydantic's messages have many lines
        raise TrajectoryError(
            f"{path}: not the configuration of a LoRA; expected JSON with a number lora_alpha, and regular expressions "
            "in alpha_pattern."
        ) from error
