"""Files of LoRAs in the flavours of names that trainers write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny_pipelines


def deltas(network: Any) -> dict[str, Tensor]:
    """Module → ΔW, as PEFT computes it."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer.get_delta_weight(layer.active_adapters[0]).detach() for name, layer in layers.items()}


def save_peft(network: Any, folder: Path) -> Path:
    from peft import get_peft_model, set_peft_model_state_dict
    from peft.utils import get_peft_model_state_dict

    wrapped = get_peft_model(tiny_pipelines.unet(), network.peft_config["default"])
    factors = get_peft_model_state_dict(network)
    set_peft_model_state_dict(wrapped, {f"base_model.model.{name}": value for name, value in factors.items()})
    wrapped.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def save_kohya(network: Any, folder: Path) -> Path:
    """As the trainers of LCM-LoRA do: names from diffusers' own converter, and the alpha of each module."""
    from diffusers.utils import convert_state_dict_to_kohya
    from peft.utils import get_peft_model_state_dict

    factors = {f"unet.{name}": value for name, value in get_peft_model_state_dict(network).items()}
    named = convert_state_dict_to_kohya(factors)
    alpha = network.peft_config["default"].lora_alpha
    tensors = {name: tensor.contiguous() for name, tensor in named.items()}
    for name in tensors:
        if name.endswith(".alpha"):
            tensors[name] = torch.tensor(float(alpha))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


TARGETS = ["to_q", "to_v", "to_out.0", "conv1"]
KOHYA_EPOCHS = {100: "hat-000001.safetensors", 200: "hat-000002.safetensors", 300: "hat.safetensors"}


def save_kohya_epochs(folder: Path) -> None:
    """The epochs of a LoRA as kohya's trainer names them; the last one has no number."""
    folder.mkdir(parents=True)
    for step, name in KOHYA_EPOCHS.items():
        weights = load_file(save_kohya(tiny_pipelines.adapted_unet(step, TARGETS), folder.with_suffix(".one")))
        save_file(weights, folder / name, metadata={"ss_steps": str(step)})


SAVERS: dict[str, Callable[[Any, Path], Path]] = {
    "diffusers": tiny_pipelines.save_lora,
    "peft": save_peft,
    "kohya": save_kohya,
}
