from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lcsc_opt.base.errors import ObjectiveError, StudySpecError
from lcsc_opt.base.records import SEARCH, Candidate
from lcsc_opt.coefficients.profiles import ema_coefficients
from tests.objectives.image_objectives import build, check, combined, one_line
from tests.unet_examples import unet

FILE = "diffusers_unconditional.py"
STEPS = (100, 200, 300)


def train(folder: Path, scheduler: Any = None, **options: Any) -> None:
    """What diffusers' training scripts leave: ``checkpoint-N/unet`` and, at the end, the pipeline."""
    from diffusers import DDPMPipeline, DDPMScheduler

    for step in STEPS:
        unet(step, **options).save_pretrained(folder / "out" / f"checkpoint-{step}" / "unet")
    pipeline = DDPMPipeline(unet(STEPS[-1], **options), scheduler or DDPMScheduler(prediction_type="sample"))
    pipeline.save_pretrained(folder / "out")


def test_a_run_of_diffusers_is_searched(folder: Path) -> None:
    train(folder)
    sampler = {"name": "ddim", "steps": 3, "step": {"eta": 1.0}, "scheduler": {"clip_sample": False}}
    objective = build(FILE, folder, checkpoints="out/checkpoint-*", model="out", sampler=sampler)
    assert objective.steps == STEPS
    assert objective.sampler.nfe == 3
    check(objective)


def what_decides(folder: Path, name: str) -> Any:
    settings: Any = {"checkpoints": name, "model": name, "sampler": {"steps": 2}}
    return build(FILE, folder, **settings).key.decides


def test_the_folder_of_the_model_may_be_renamed_but_its_configuration_not_changed(folder: Path) -> None:
    train(folder)
    before = what_decides(folder, "out")
    (folder / "out").rename(folder / "moved")
    assert what_decides(folder, "moved") == before
    file = folder / "moved" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"linear"', '"scaled_linear"'))
    assert what_decides(folder, "moved") != before


def test_images_are_the_pipelines_with_the_merged_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler

    train(folder, DDIMScheduler(prediction_type="v_prediction", clip_sample=False))
    objective = build(FILE, folder, checkpoints="out", model="out", sampler={"steps": 9})
    coefficients = ema_coefficients(STEPS, 0.99)
    merged = unet(0)
    merged.load_state_dict(combined(coefficients, [unet(step) for step in STEPS]))
    pipeline = DDIMPipeline(merged, DDIMScheduler.from_pretrained(folder / "out" / "scheduler"))
    pipeline.set_progress_bar_config(disable=True)
    z = objective.sampler.noise.batch(SEARCH, 0, 12)  # type: ignore[attr-defined]
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: z)
    made = pipeline(batch_size=12, num_inference_steps=9, output_type="np").images
    expected = torch.from_numpy(made).permute(0, 3, 1, 2) * 2 - 1
    assert (objective.images(coefficients, SEARCH, 12) - expected).abs().max() < 1e-5


def test_a_consistency_model_with_classes_and_guidance(folder: Path) -> None:
    from diffusers import CMStochasticIterativeScheduler

    train(folder, CMStochasticIterativeScheduler(), num_class_embeds=4, channels=3)
    guided = {"labels": "random", "guidance": {"scale": 1.5, "null_label": 3}}
    objective = build(FILE, folder, checkpoints="out", model="out", sampler={"timesteps": [22, 0]}, **guided)
    assert objective.sampler.nfe == 4
    check(objective)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "nowhere"}, ObjectiveError, r"model: .*nowhere holds no config\.json"),
        ({"guidance": {"scale": 2.0, "null_label": 3}}, ObjectiveError, "guidance: the model has no classes"),
        (
            {"sampler": {"name": "ddim", "steps": 3, "scheduler": {"clip": 1}}},
            ObjectiveError,
            "DDIMScheduler has no option 'clip'",
        ),
        ({"sampler": {"steps": 3, "also": {"stepz": 4}}}, StudySpecError, "sampler: also: stepz: unknown key"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(folder: Path, changes: Any, kind: type[Exception], message: str) -> None:
    train(folder)
    common = {"checkpoints": "out", "model": "out", "sampler": {"name": "ddim", "steps": 3}}
    one_line(kind, message, lambda: build(FILE, folder, **{**common, **changes}))


def test_reports_also_use_a_second_sampler_that_is_named(folder: Path) -> None:
    train(folder)
    common: Any = {"checkpoints": "out", "model": "out"}
    objective = build(FILE, folder, **common, sampler={"name": "ddim", "steps": 2, "also": {"steps": 4}})
    assert objective.samples.samplers[1].text == "DDIMScheduler, 4 model calls an image"
    alone = build(FILE, folder, **common, sampler={"name": "ddim", "steps": 4})
    coefficients = ema_coefficients(STEPS, 0.99)
    elsewhere = objective.evaluate(Candidate(coefficients, sampler=1))
    assert elsewhere.loss == alone(coefficients) != objective(coefficients)
