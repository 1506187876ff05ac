"""The names of a LoRA's tensors: which of them belong to the same module, and which module that is.

Three flavours of names are in use: ``diffusers`` (``unet.….lora.down.weight`` or ``unet.….lora_A.weight``), ``peft``
(``base_model.model.….lora_A.weight``) and ``kohya`` (``lora_unet_….lora_down.weight``, with a tensor ``.alpha``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from lcsc_opt.base.errors import TrajectoryError

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
    """The component, and the module inside it, that the ``stem`` of a name tells."""
    if flavour == "peft":
        return "", stem.removeprefix(PEFT_PREFIX)
    if flavour == "kohya":
        prefix = next(prefix for prefix in KOHYA_COMPONENTS if stem.startswith(prefix))
        return KOHYA_COMPONENTS[prefix], stem.removeprefix(prefix)
    component, _, path = stem.partition(".")
    if component not in COMPONENTS:
        component, path = "", stem
    path = path.removeprefix(PEFT_PREFIX).replace(".processor.", ".")  # PEFT's is there in files of LCM-LoRA's trainer
    if old:
        base, _, projection = path.rpartition(".")
        renamed = OLD_TEXT_ATTENTION if base.endswith("self_attn") else OLD_ATTENTION
        path = f"{base}.{renamed.get(projection, projection)}"
    return component, path


def check_factors(module: LoraModule, down: Sequence[int], up: Sequence[int]) -> None:
    """Check the shapes of two factors.

    Raises:
        TrajectoryError: they are not ``[rank, in]`` and ``[out, rank]``, nor those of convolutions.
    """
    linear = len(down) == 2 and len(up) == 2
    convolution = len(down) == 4 and len(up) == 4 and tuple(up[2:]) == (1, 1)
    if not (linear or convolution) or up[1] != down[0] or not down[0]:
        raise TrajectoryError(
            f"{module.name}: factors of shapes {list(down)} and {list(up)} make no product; expected [rank, in] and "
            "[out, rank], or [rank, in, h, w] and [out, rank, 1, 1]."
        )
