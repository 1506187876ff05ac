"""The names of a LoRA's tensors: which of them belong to the same module, and which module that is; and its alphas.

Three flavours of names are in use: ``diffusers`` (``unet.….lora.down.weight`` or ``unet.….lora_A.weight``), ``peft``
(``base_model.model.….lora_A.weight``) and ``kohya`` (``lora_unet_….lora_down.weight``, with a tensor ``.alpha``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.reading import find_weights, read_metadata
from lcsc_opt.coefficients.layer_groups import LORA_FACTORS

Flavour = Literal["diffusers", "peft", "kohya"]

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, next to the weights
PACKED_ALPHAS = "lora_alphas"  # in the metadata of a packed trajectory
_ADAPTER_METADATA = "lora_adapter_metadata"  # PEFT's configuration in files that diffusers writes
_PEFT_PREFIX = "base_model.model."
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA = {f"lora_te{number}_": "text_encoder" for number in ("", "1")}
_KOHYA |= {"lora_unet_": "unet", "lora_te2_": "text_encoder_2"}
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
        alpha: name of the scalar, if the file has one.
    """

    name: str
    component: str
    path: str
    down: str
    up: str
    alpha: str | None

    def factors(self, weights: Mapping[str, Tensor], alphas: LoraAlphas) -> tuple[Tensor, Tensor, float]:
        """``down [rank, in(, h, w)]``, ``up [out, rank(, 1, 1)]`` and the scale of their product, alpha / rank.

        Raises:
            TrajectoryError: shapes that are no factors of one product.
        """
        down, up = weights[self.down], weights[self.up]
        linear = down.dim() == 2 and up.dim() == 2
        convolution = down.dim() == 4 and up.dim() == 4 and up.shape[2:] == (1, 1)
        if not (linear or convolution) or up.shape[1] != len(down) or not len(down):
            raise TrajectoryError(
                f"{self.name}: factors of shapes {list(down.shape)} and {list(up.shape)} make no product; expected "
                "[rank, in] and [out, rank], or [rank, in, h, w] and [out, rank, 1, 1]."
            )
        alpha = alphas.of(self, len(down)) if self.alpha is None else float(weights[self.alpha])
        return down, up, alpha / len(down)


class _Scale(pydantic.BaseModel):
    """What of PEFT's configuration decides a LoRA's scale; other entries may name folders of the machine."""

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore")

    lora_alpha: pydantic.FiniteFloat
    alpha_pattern: dict[str, pydantic.FiniteFloat] | None = None
    use_rslora: bool | None = None

    @pydantic.field_validator("alpha_pattern")
    @classmethod
    def _patterns_are_expressions(cls, patterns: dict[str, float] | None) -> dict[str, float] | None:
        for pattern in patterns or ():
            try:
                re.compile(_whole(pattern))
            except (re.error, OverflowError, RecursionError):
                raise ValueError(f"{pattern[:40]!r} is no regular expression") from None
        return patterns


class LoraAlphas(pydantic.BaseModel):
    """The alphas of a LoRA whose tensors do not hold them.

    Attributes:
        configs: component → its scale. The one of the empty component, as in PEFT's own files, is for all components
            without one. A module without a scale has alpha = rank, as in diffusers.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    configs: dict[str, _Scale] = {}

    @classmethod
    def constant(cls, alpha: float) -> LoraAlphas:
        """The same alpha for every module."""
        return cls(configs={"": _Scale(lora_alpha=alpha)})

    @classmethod
    def read(cls, path: str | Path, *, key: str | None = None) -> LoraAlphas | None:
        """The alphas in a LoRA file's header, or in ``adapter_config.json`` next to it or one folder up.

        Args:
            path: a file, or a checkpoint's folder, whose weights may lie in a subfolder such as ``unet_lora``.
            key: which weights of the folder, as in :func:`read_checkpoint`.

        Raises:
            TrajectoryError: the configuration cannot be read, or is not one of a LoRA.
        """
        file = Path(path)
        if file.is_dir():
            with contextlib.suppress(TrajectoryError):  # the configuration may lie in the folder itself
                file = find_weights(file, key).file
        if text := read_metadata(file).get(_ADAPTER_METADATA):
            return _parsed(file, text, by_component=True)
        folder = file if file.is_dir() else file.parent
        for config in (folder / ADAPTER_CONFIG, folder.absolute().parent / ADAPTER_CONFIG):
            if config.is_file():
                return _parsed(config, config.read_bytes(), by_component=False)
        return None

    def of(self, module: LoraModule, rank: int) -> float:
        """The alpha of ``module``, such that its product is multiplied by alpha / rank."""
        config = self.configs.get(module.component, self.configs.get(""))
        if config is None:
            return float(rank)
        patterns = (config.alpha_pattern or {}).items()
        matching = (alpha for pattern, alpha in patterns if re.match(_whole(pattern), module.path))
        alpha = next(matching, config.lora_alpha)
        return alpha * math.sqrt(rank) if config.use_rslora else alpha


def lora_flavour(names: Iterable[str]) -> Flavour | None:
    """The flavour of a state dict with these ``names``, or ``None`` if it holds no LoRA factor."""
    downs = [name for name in names if name.endswith(tuple(down for down, _ in LORA_FACTORS))]
    if not downs:
        return None
    if all(name.startswith(_PEFT_PREFIX) for name in downs):
        return "peft"
    return "kohya" if all(name.startswith(tuple(_KOHYA)) for name in downs) else "diffusers"


def lora_modules(names: Iterable[str]) -> tuple[LoraModule, ...]:
    """The modules of a LoRA, in the order of ``names``.

    Raises:
        TrajectoryError: no LoRA, or one with other parts than a pair of factors and an alpha for each module, such as
            DoRA, LoHa, LoKr or LoRA with a third factor.
    """
    names = list(names)
    flavour = lora_flavour(names)
    if flavour is None:
        raise TrajectoryError("These weights are no LoRA: no name ends like a factor (lora_A, lora_down …).")
    present, taken, modules = set(names), set(), []
    for name in names:
        down, up = next((pair for pair in LORA_FACTORS if name.endswith(pair[0])), ("", ""))
        if not down:
            continue
        stem = name.removesuffix(down)
        if stem + up not in present:
            raise TrajectoryError(f"{name!r} has no partner {stem + up!r}: the LoRA is not whole.")
        alpha = f"{stem}.alpha" if f"{stem}.alpha" in present else None
        modules.append(LoraModule(stem, *_place(flavour, stem, old=down.startswith("_")), name, stem + up, alpha))
        taken |= {name, stem + up, alpha}
    if left := [name for name in names if name not in taken]:
        raise TrajectoryError(f"{left[0]!r} is no part of a LoRA of two factors: its products cannot be told.")
    return tuple(modules)


def _place(flavour: Flavour, stem: str, *, old: bool) -> tuple[str, str]:
    """The component and the module inside it, read from the ``stem`` of a name."""
    if flavour == "peft":
        return "", stem.removeprefix(_PEFT_PREFIX)
    if flavour == "kohya":
        prefix = next(prefix for prefix in _KOHYA if stem.startswith(prefix))
        return _KOHYA[prefix], stem.removeprefix(prefix)
    component, _, path = stem.partition(".")
    component, path = (component, path) if component in _COMPONENTS else ("", stem)
    path = path.removeprefix(_PEFT_PREFIX).replace(".processor.", ".")  # files of LCM-LoRA's trainer have PEFT's
    if old:
        base, _, projection = path.rpartition(".")
        renamed = _OLD_TEXT_ATTENTION if base.endswith("self_attn") else _OLD_ATTENTION
        path = f"{base}.{renamed.get(projection, projection)}"
    return component, path


def _parsed(path: Path, text: str | bytes, *, by_component: bool) -> LoraAlphas:
    """``{"unet.lora_alpha": 8}`` in a header → component ``unet``; entries without a component belong to ``""``."""
    configs: dict[str, dict[str, Any]] = {}
    try:
        for name, value in json.loads(text).items():
            component, _, entry = name.partition(".") if by_component else ("", "", name)
            component, entry = (component, entry) if component in _COMPONENTS else ("", name)
            configs.setdefault(component, {})[entry] = value
        return LoraAlphas.model_validate({"configs": configs or {"": {}}})
    except (ValueError, AttributeError, RecursionError) as error:  # pydantic's errors are of many lines
        raise TrajectoryError(f"{path}: not the configuration of a LoRA, with a number lora_alpha.") from error


def _whole(pattern: str) -> str:
    """A regular expression of PEFT's ``alpha_pattern``, as PEFT matches it with the path of a module."""
    return rf"(.*\.)?({pattern})$"
