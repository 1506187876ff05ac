"""``studies/lora``: training, search, export and ``load_lora_weights``, at toy size."""

from __future__ import annotations

import importlib
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import lcsc_opt
from lcsc_opt.base.imports import allow_mismatched_torchvision
from lcsc_opt.base.records import SEARCH
from lcsc_opt.checkpoints.lora import lora_modules
from tests.commands import Typed

if not (find_spec("peft") and find_spec("transformers")):
    pytest.skip("needs peft and transformers", allow_module_level=True)

allow_mismatched_torchvision()

FILES = Path(__file__).parents[2] / "studies" / "lora"
SHORT = (
    "objective.settings.images=10",
    "objective.settings.batch_size=10",
    "objective.settings.sampler.steps=1",
    "budget={evaluations: 2}",
    "held_out={images: 10, top: 1}",
)
CLASSIFIER = "def classifier(number: int, steps: int = 200)"
SMALL = {
    CLASSIFIER: CLASSIFIER.replace("200", "2"),  # it only has to be one
    "images[number::2]": "images[number::32]",
    "digits[number::2]": "digits[number::32]",
    "batch: int = 32": "batch: int = 4",
    "batch: int = 24": "batch: int = 4",
    '"block_out_channels": (32, 64)': '"block_out_channels": (8, 16)',
}


def study_in(folder: Path, changes: dict[str, str]) -> Any:
    """The module of the study, whose files are in the folder, with these changes in its code."""
    for file in FILES.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    code = (FILES / "digits_lora.py").read_text(encoding="utf-8")
    for text, changed in changes.items():
        assert text in code
        code = code.replace(text, changed)
    (folder / "digits_lora.py").write_text(code, encoding="utf-8")
    return importlib.import_module("digits_lora")


@pytest.fixture
def place(workplace: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, few_of_average: None) -> Path:
    """A folder that modules are imported from."""
    monkeypatch.syspath_prepend(str(workplace))
    return workplace


@pytest.mark.slow
def test_the_study_goes_from_training_which_continues_to_a_lora_that_its_pipeline_loads(
    place: Path, typed: Typed
) -> None:
    digits_lora = study_in(place, SMALL)
    sizes = {"autoencoder_steps": 2, "steps": 2, "every": 1}
    folder = Path("runs/lora")
    digits_lora.train(folder, **sizes, lora_steps=1, seeds=(0, 1))
    assert [path.name for path in Path(folder / "lora-1").iterdir()] == ["checkpoint-1"]
    written = (folder / "pipeline/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    digits_lora.train(folder, **sizes, lora_steps=3)  # what is missing
    assert (folder / "pipeline/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == written
    checkpoints = sorted(path.name for path in Path("runs/lora/lora-0").iterdir())
    assert checkpoints == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    typed("run", "lora.yaml", "--optimizer", "LCSCGradient", *SHORT)
    study = lcsc_opt.load_study("lora/LCSCGradient/0")
    objective: Any = study.objective
    assert study.coefficients.shape == (len(lora_modules(objective.trajectory.names)), 3), "a row for each module"
    table = typed("show", "lora/LCSCGradient/0").out
    assert "held_out_reward" in table

    typed("export", "lora/LCSCGradient/0", "-o", "best.safetensors", "--as", "lora")
    from diffusers import LCMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained("runs/lora/pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights("best.safetensors")
    noise = objective.sampler.noise
    sampled = pipeline(
        prompt=[f"a handwritten {digit}" for digit in ("zero", "one", "two")],
        latents=noise.batch(SEARCH, 0, 3),
        generator=noise.generators(SEARCH, 0, 3),
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="pt",
    ).images
    torch.testing.assert_close(sampled * 2 - 1, objective.images(study.coefficients, SEARCH, 3), rtol=0, atol=1e-4)

    typed("report", "lora", "-o", "report.html")
    assert "data:image/png" in Path("report.html").read_text()
