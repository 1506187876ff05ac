from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import lcsc_opt
from lcsc_opt.base.errors import LcscError, StudySpecError, TrajectoryError
from lcsc_opt.base.paths import BuildContext
from lcsc_opt.base.records import HELD_OUT, SEARCH, Candidate
from lcsc_opt.base.study_spec import ObjectiveSpec
from lcsc_opt.checkpoints.lora import lora_modules
from lcsc_opt.database.names import LAST_CHECKPOINT
from lcsc_opt.objective.loading import load_objective
from lcsc_opt.objective.merge_sample_score import MergeSampleScore
from lcsc_opt.sampling.base import prompts_of
from lcsc_opt.sampling.lora import to_diffusers
from tests import tiny_pipelines
from tests.contracts import check_objective
from tests.objectives.image_objectives import one_line
from tests.study_examples import stored_report

if not (find_spec("peft") and find_spec("transformers")):
    pytest.skip("needs peft and transformers", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("folder", "few_of_average")  # of the folder the cache
STEPS = (100, 200, 300)
COEFFICIENTS = np.array([1.6, -0.9, 0.3])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("study"))


def train(place: Path) -> Path:
    """A study's folder: a pipeline, checkpoints as the trainers of diffusers leave them, prompts and photographs."""
    pipeline = tiny_pipelines.stable_diffusion(place)
    pipeline.save_pretrained(place / "pipeline")
    for step in STEPS:
        network = tiny_pipelines.adapted_unet(step, ["to_q", "to_out.0", "conv1"])
        tiny_pipelines.save_lora(network, place / "lora" / f"checkpoint-{step}")
        tiny_pipelines.randomize(pipeline.unet, step, only="attn")
        pipeline.unet.save_pretrained(place / "whole" / f"checkpoint-{step}" / "unet")
    (place / "prompts.txt").write_text("a cat\na dog\na red house\n")
    (place / "other.txt").write_text("a boat\n")
    (place / "photographs").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(image).save(place / "photographs" / f"{i}.png")
    return place


def objective(place: Path, *, rows: str | None = None, **changes: Any) -> MergeSampleScore:
    settings = {
        **{"pipeline": "pipeline", "component": "lora", "sampler": {"name": "lcm", "steps": 3}},
        **{"checkpoints": "lora/checkpoint-*/pytorch_lora_weights.safetensors", "prompts": "prompts.txt"},
        **{"loss": "fid@tests.tiny_pipelines:Colours", "reference": "photographs"},
        **{"images": 8, "batch_size": 4, "device": "cpu"},
    }
    kept = {name: value for name, value in {**settings, **changes}.items() if value is not None}
    built = load_objective(ObjectiveSpec(file="latent_diffusion", settings=kept), BuildContext(place), rows=rows)
    assert isinstance(built, MergeSampleScore)
    return built


def own_images(place: Path, objective: Any, lora: Any = None) -> Tensor:
    """The pipeline's own images, with a LoRA that it loads itself."""
    from diffusers import DiffusionPipeline, LCMScheduler

    pipeline = DiffusionPipeline.from_pretrained(place / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    noise = objective.sampler.noise
    drawn = {"latents": noise.batch(SEARCH, 0, 4), "generator": noise.generators(SEARCH, 0, 4)}
    prompts = ["a cat", "a dog", "a red house", "a cat"]
    called = pipeline(prompt=prompts, **drawn, num_inference_steps=3, guidance_scale=1.0, output_type="pt")
    return called.images * 2 - 1


def test_held_out_images_have_prompts_and_metrics_of_their_own(place: Path) -> None:
    built = objective(place, held_out_prompts="other.txt", held_out_metrics=["kid@tests.tiny_pipelines:Colours"])
    assert built.steps == STEPS
    evaluation = built.evaluate(Candidate(COEFFICIENTS))
    assert (evaluation.cost.images, evaluation.cost.model_calls) == (8, 24)
    held_out = built.evaluate(Candidate(COEFFICIENTS, noise=HELD_OUT))
    searched = {name for name in evaluation.metrics if "shrunk" not in name}  # reports are plain
    assert set(held_out.metrics) > searched
    assert [prompts_of(built.sampler, noise, 0, 1) for noise in (SEARCH, HELD_OUT)] == [["a cat"], ["a boat"]]


def test_a_lora_keeps_the_contract_of_objectives_with_its_gradient(place: Path) -> None:
    assert objective(place).why_no_gradient() is None
    two_steps = {"name": "lcm", "steps": 2}
    check_objective(lambda: objective(place, sampler=two_steps), images=4, step=0.01)
    whole = objective(place, sampler=two_steps).evaluate(Candidate(COEFFICIENTS, images=4, gradient=True))
    by_row = objective(place, sampler=two_steps, rows="layers")
    modules = lora_modules(by_row.trajectory.names)  # type: ignore[union-attr]
    assert by_row.layer_groups is not None
    assert len(by_row.layer_groups) == len(modules)
    of_rows = by_row.evaluate(Candidate(np.tile(COEFFICIENTS, (len(modules), 1)), images=4, gradient=True))
    assert of_rows.gradient is not None
    assert whole.gradient is not None
    np.testing.assert_allclose(of_rows.gradient.sum(axis=0), whole.gradient, rtol=1e-4, atol=1e-6)


def test_a_merged_lora_gives_the_images_of_its_file(place: Path, tmp_path: Path) -> None:
    built = objective(place)
    alphas = built.trajectory.lora_alphas()  # type: ignore[union-attr]
    save_file(to_diffusers(built.trajectory.merge(COEFFICIENTS), alphas), tmp_path / "merged.safetensors")
    expected = own_images(place, built, tmp_path / "merged.safetensors")
    torch.testing.assert_close(built.images(COEFFICIENTS, SEARCH, 4), expected, rtol=0, atol=1e-5)
    assert (expected - own_images(place, built)).abs().max() > 0.01


def contrast(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward with a gradient, which looks at the prompt."""
    weights = torch.tensor([101.0 if "red" in prompt else 100.0 for prompt in prompts])
    return weights * images.std(dim=(1, 2, 3))


def flatness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that no search sees, and that falls where the other one rises."""
    return -contrast(images, prompts)


def test_a_reward_on_prompts_is_searched_and_a_worse_one_that_no_search_saw_is_reported(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {
        **{"pipeline": str(place / "pipeline"), "prompts": str(place / "prompts.txt")},
        **{"checkpoints": str(place / "whole"), "reference": str(place / "photographs")},
        **{"images": 6, "batch_size": 60, "held_out_metrics": [], "device": "cpu"},
        **{"reward": f"{__name__}:contrast", "held_out_reward": f"{__name__}:flatness"},
        **{"loss": {"reward": -1, "fid@tests.tiny_pipelines:Colours": 0.1}, "sampler": {"name": "lcm", "steps": 1}},
    }
    monkeypatch.chdir(tmp_path)
    calls: list[int] = []

    def count(module: Any, arguments: Any) -> None:
        if type(module).__name__ == "CLIPTextModel":
            calls.append(len(arguments[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        [study] = lcsc_opt.run(
            {
                "name": "rewarded",
                "objective": {"file": "latent_diffusion.py", "settings": settings},
                "optimizers": [{"LCSC": {"mutation": 5.0}}],
                "budget": {"images": 60},
                "held_out": {"images": 120, "top": 2},
            }
        )
    finally:
        hook.remove()
    assert calls == 2 * [1, 1, 1], "each prompt once by the study, and once by the new network of its answer"
    report = stored_report("rewarded")
    found = report.found[study.name]
    rows = {row.metric: row for row in report.rows(found, LAST_CHECKPOINT)}
    assert rows["reward"].gain == pytest.approx(-(rows["held_out_reward"].gain or 0))
    assert (rows["reward"].gain or 0) > 0
    assert rows["held_out_reward"].lost
    assert rows["fid@tests.tiny_pipelines:Colours"].gain is not None, "the guard is compared, too"


@pytest.mark.parametrize(("kept", "images"), [("reward", 4), ("precision", 8)])
def test_a_run_that_keeps_a_reward_says_what_the_base_model_reaches(
    kept: str,
    images: int,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {
        **{"pipeline": str(place / "pipeline"), "prompts": str(place / "prompts.txt"), "component": "lora"},
        **{"checkpoints": str(place / "lora"), "reference": str(place / "photographs"), "device": "cpu"},
        **{"images": images, "sampler": {"name": "lcm", "steps": 3}, "held_out_metrics": []},
        **{"loss": "fid@tests.tiny_pipelines:Colours", "reward": f"{__name__}:contrast", "keep": kept},
    }
    of_base = own_images(place, objective(place))  # without a LoRA
    monkeypatch.chdir(tmp_path)
    study = {"name": "kept", "objective": {"file": "latent_diffusion.py", "settings": settings}}
    lcsc_opt.run({**study, "optimizers": ["LCSC"], "budget": {"evaluations": 1}, "held_out": {"images": 8, "top": 1}})
    said = capsys.readouterr().err
    assert f"keep: {kept}" in said
    found = re.search(r"may not get worse than ([\d.]+); the base model without LoRA has ([\d.]+)", said)
    assert (found is not None) == (kept == "reward")
    if found is not None:
        expected = float(contrast(of_base, ["a cat", "a dog", "a red house", "a cat"]).mean())
        bound, base = map(float, found.groups())
        assert base == pytest.approx(expected, rel=1e-3)
        assert bound != base


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"height": 20}, StudySpecError, "height"),
        ({"checkpoints": "whole"}, TrajectoryError, "not a LoRA"),
        ({"images": 2}, LcscError, r"prompts: there are more .3. than images .2."),
        ({"component": "unet"}, LcscError, "those of a LoRA; write component: lora"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    place: Path, changes: dict[str, Any], kind: type[LcscError], said: str
) -> None:
    one_line(kind, said, lambda: objective(place, **changes)(COEFFICIENTS))


def test_guidance_calls_the_network_twice_in_each_step(place: Path) -> None:
    guided = objective(place, sampler={"name": "ddim", "steps": 2}, guidance_scale=2.0)
    assert guided.samples.samplers[0].text == "DDIMScheduler, 2 steps, 4 model calls an image, guidance 2.0"


def test_reports_also_use_another_scheduler_on_the_same_lora(place: Path) -> None:
    built = objective(place, sampler={"name": "lcm", "steps": 1, "also": {"name": "ddim", "steps": 2}})
    titles = [title.text for title in built.samples.samplers]
    assert titles == [
        "LCMScheduler, 1 model call an image, guidance 1.0",
        "DDIMScheduler, 2 model calls an image, guidance 1.0",
    ]
    alone = objective(place, sampler={"name": "ddim", "steps": 2})
    first = built(COEFFICIENTS)
    elsewhere = built.evaluate(Candidate(COEFFICIENTS, sampler=1, noise=HELD_OUT))
    expected = alone.evaluate(Candidate(COEFFICIENTS, noise=HELD_OUT))  # few real images are shrunk by each in its own
    assert elsewhere.loss == pytest.approx(expected.loss, rel=1e-6) != first
    assert built(COEFFICIENTS) == first
