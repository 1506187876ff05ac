"""``lcsc apply`` of a LoRA's checkpoints without a study: the form that a pipeline loads."""

from __future__ import annotations

import warnings
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


def test_of_names_in_two_forms_an_export_has_one_and_what_pipelines_skip_is_told(workplace: Path, typed: Typed) -> None:
    """diffusers converts the old form only where the first name, in the order of the alphabet, has it."""
    targets = [*TARGETS, "conv_in"]
    for step in (100, 200):
        for folder, adapted in (("skipped", targets), ("loaded", TARGETS)):
            network = tiny_pipelines.adapted_unet(step, adapted)
            tiny_pipelines.save_lora(network, workplace / folder / f"checkpoint-{step}")
    said = typed("apply", "step:200", "skipped", "-o", "one.safetensors").err
    names = load_file("skipped/checkpoint-100/pytorch_lora_weights.safetensors")
    skipped = sum(".lora.down" in name or ".lora.up" in name for name in names)
    assert f"load_lora_weights skips {skipped} of its {len(names)} tensors" in said
    expected = deltas(tiny_pipelines.adapted_unet(200, targets))
    loaded = {}
    for file in ("skipped/checkpoint-200", "one.safetensors"):
        pipeline = tiny_pipelines.stable_diffusion(workplace / f"words-{len(loaded)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of what is skipped
            pipeline.load_lora_weights(file)
        loaded[file] = deltas(pipeline.unet)
    assert len(loaded["skipped/checkpoint-200"]) < len(expected)
    torch.testing.assert_close(loaded["one.safetensors"], expected, rtol=1e-5, atol=1e-7)
    said = typed("apply", "step:200", "loaded", "-o", "same.safetensors").err
    assert "skips" not in said
    assert "--as lora" not in said, "it loads as it is"
    assert load_file("same.safetensors").keys() == names_of_epochs(workplace / "loaded")


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
    said = typed("apply", "step:200", "lora", "-o", "plain.safetensors").err
    assert ("--as lora writes what load_lora_weights loads" in said) == (flavour == "peft")
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
