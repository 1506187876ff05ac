"""``lcsc apply`` of a LoRA's checkpoints without a study: the form that a pipeline loads."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcsc_opt.checkpoints.reading import read_metadata
from tests import tiny_pipelines
from tests.commands import Typed
from tests.lora_files import KOHYA_EPOCHS, SAVERS, TARGETS, deltas, save_kohya_epochs

if not (find_spec("peft") and find_spec("transformers")):
    pytest.skip("needs peft and transformers", allow_module_level=True)


@pytest.mark.parametrize("flavour", list(SAVERS))
def test_apply_writes_a_lora_with_its_alphas(workplace: Path, typed: Typed, flavour: str) -> None:
    if flavour == "kohya":
        save_kohya_epochs(workplace / "lora")
    else:
        for step in KOHYA_EPOCHS:
            SAVERS[flavour](tiny_pipelines.adapted_unet(step, TARGETS), workplace / "lora" / f"checkpoint-{step}")
    typed("apply", "step:200", "lora", "-o", "second.safetensors", "--as", "lora")
    pipeline = tiny_pipelines.stable_diffusion(workplace / "words")
    pipeline.load_lora_weights("second.safetensors")
    expected = deltas(tiny_pipelines.adapted_unet(200, TARGETS))
    torch.testing.assert_close(deltas(pipeline.unet), expected, rtol=1e-5, atol=1e-7)
    typed("apply", "second.safetensors", "lora", "-o", "again.safetensors")
    torch.testing.assert_close(load_file("again.safetensors"), load_file("second.safetensors"), rtol=0, atol=0)
    assert read_metadata("again.safetensors") == read_metadata("second.safetensors")
    if flavour == "peft":
        typed("apply", "uniform", "lora", "-o", "folder")
        assert {path.name for path in Path("folder").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    else:
        said = typed("apply", "uniform", "lora", "-o", "folder", status=2).err
        assert "an adapter's folder needs its own configuration" in said
