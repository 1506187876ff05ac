"""Every row of the table "Exports" in ``docs/reference.md`` is run as it is printed, and loaded as it says."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lcsc_opt.cli import run as lcsc
from lcsc_opt.exports import Recipe
from lcsc_opt.exports.merging import merge
from lcsc_opt.trajectory import Trajectory
from tests import tiny_pipelines
from tests.model_studies import like, state_dict, write_model_study
from tests.unet_examples import unet

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
LORA = {f"unet.{ATTENTION}.lora_A.weight": torch.zeros(2, 8), f"unet.{ATTENTION}.lora_B.weight": torch.zeros(8, 2)}


def example(form: str) -> str:
    """The command in the last column of this form's row."""
    table = PAGE.read_text(encoding="utf-8").split("\n## Exports\n")[1]
    row = next(line for line in table.splitlines() if line.startswith(f"| {form} |"))
    return row.split("|")[-2].strip().strip("`")


def load_model(path: Path) -> dict[str, Tensor]:
    from diffusers import UNet2DModel

    model, info = UNet2DModel.from_pretrained(path, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values()), info
    return dict(model.state_dict())


def load_lora(path: Path) -> dict[str, Tensor]:
    """Through diffusers, into a U-Net's adapter, and out of its layer again."""
    from diffusers import StableDiffusionPipeline

    network = tiny_pipelines.unet()
    tensors, alphas = StableDiffusionPipeline.lora_state_dict(path)
    StableDiffusionPipeline.load_lora_into_unet(tensors, network_alphas=alphas, unet=network, adapter_name="best")
    layer = network.get_submodule(ATTENTION)
    factors = {"lora_A": layer.lora_A["best"].weight, "lora_B": layer.lora_B["best"].weight}
    assert layer.scaling["best"] == 1.0
    return {f"unet.{ATTENTION}.{name}.weight": factor.detach().to(torch.float16) for name, factor in factors.items()}


FORMS: dict[str, tuple[Any, Any]] = {
    "safetensors": (lambda: None, load_file),
    "PyTorch": (lambda: None, lambda path: torch.load(path, weights_only=True)),
    "diffusers": (lambda: dict(unet().state_dict()), load_model),
    "LoRA": (lambda: LORA, load_lora),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_example_of_the_page_writes_what_it_says(form: str, workplace: Path) -> None:
    template, load = FORMS[form]
    made = template()
    weights = state_dict if made is None else functools.partial(like, made)
    small: dict[str, Any] = {"optimizers": ["LCSC"], "budget": {"evaluations": 8}, "space": {"rows": "layers"}}
    file = write_model_study(workplace, weights=weights, name="digits", **small)
    assert lcsc(["run", str(file)]) == 0
    if form == "diffusers":
        unet().save_pretrained("model")
    _, *arguments = shlex.split(example(form))
    assert lcsc(arguments) == 0
    path = Path(arguments[arguments.index("-o") + 1])
    torch.testing.assert_close(load(path), merge(Trajectory.open("run.trajectory"), Recipe.read(path)))
