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


def names_of_epochs(folder: Path) -> set[str]:
    """Of the tensors in the last file below a folder."""
    return set(load_file(sorted(folder.rglob("*.safetensors"))[-1]))


def test_files_of_which_pipelines_skip_a_part_are_told(workplace: Path, typed: Typed) -> None:
    for step in (100, 200):
        for folder, targets in (("mixed", TARGETS), ("plain", ["to_q"])):
            network = tiny_pipelines.adapted_unet(step, targets)
            tiny_pipelines.save_lora(network, workplace / folder / f"checkpoint-{step}")
    said = typed("apply", "uniform", "mixed", "-o", "mixed.safetensors").err
    file = tiny_pipelines.save_lora(tiny_pipelines.adapted_unet(100, TARGETS), workplace / "one")
    names = load_file(file)
    skipped = sum(".lora.down" in name or ".lora.up" in name for name in names)
    assert 0 < skipped < len(names)
    assert f"load_lora_weights skips {skipped} of its {len(names)} tensors" in said
    assert "skips" not in typed("apply", "uniform", "plain", "-o", "plain.safetensors").err


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
    typed("apply", "step:200", "lora", "-o", "plain.safetensors")
    if flavour == "diffusers":  # whose scripts write names in two forms, of which pipelines skip one
        other = tiny_pipelines.stable_diffusion(workplace / "others")
        other.load_lora_weights("plain.safetensors")
        torch.testing.assert_close(deltas(other.unet), expected, rtol=1e-5, atol=1e-7)
    else:
        assert load_file("plain.safetensors").keys() == names_of_epochs(workplace / "lora")
    typed("apply", "second.safetensors", "lora", "-o", "again.safetensors")
    torch.testing.assert_close(load_file("again.safetensors"), load_file("second.safetensors"), rtol=0, atol=0)
    assert read_metadata("again.safetensors") == read_metadata("second.safetensors")
    if flavour == "peft":
        typed("apply", "uniform", "lora", "-o", "folder")
        assert {path.name for path in Path("folder").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    else:
        said = typed("apply", "uniform", "lora", "-o", "folder", status=2).err
        assert "an adapter's folder needs its own configuration" in said
