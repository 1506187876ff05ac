"""LoRA state dicts: their factors and alphas, their names in a diffusers pipeline, and files of them.

A LoRA adds ``alpha / rank * up @ down`` to the weight of a module. A trajectory's merge combines its tensors as they
are, as the paper does.
"""

from __future__ import annotations

from pathlib import Path

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.progress import notice
from lcsc_opt.checkpoints.lora import (
    ADAPTER_CONFIG,
    PACKED_ALPHAS,
    LoraAlphas,
    lora_flavour,
    lora_modules,
    read_alphas,
)
from lcsc_opt.trajectory.trajectory import Trajectory


def trajectory_alphas(trajectory: Trajectory) -> LoraAlphas:
    """The alphas of LoRA checkpoints whose tensors do not hold them, from the trajectory or beside its last source.

    Raises:
        TrajectoryError: only the PEFT checkpoints tell the alpha, and they are gone; or the metadata is broken.
    """
    modules = lora_modules(trajectory.names)
    if all(module.alpha is not None for module in modules):
        return LoraAlphas()
    if text := trajectory.metadata.get(PACKED_ALPHAS):
        try:
            return LoraAlphas.model_validate_json(text)
        except ValueError as error:
            raise TrajectoryError(f"{trajectory.path}: the configuration of its LoRA is broken.") from error
    source = trajectory.sources[-1]
    there = bool(source) and Path(source).exists()
    if there and (found := read_alphas(source, key=trajectory.metadata.get("key"))) is not None:
        return found
    if lora_flavour(trajectory.names) == "peft" and not there:
        where = source or "the checkpoint"
        raise TrajectoryError(
            f"{trajectory.path}: the LoRA's alpha stands in {ADAPTER_CONFIG} beside {where}, which is not there: "
            "give lora_alpha."
        )
    notice(f"{trajectory.path}: the LoRA's alpha is taken to be its rank, as diffusers does; give lora_alpha otherwise")
    return LoraAlphas()
