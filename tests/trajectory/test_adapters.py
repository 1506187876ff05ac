"""Adapters whose combinations have a strength, since the base model is one of the checkpoints; and several in one."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcsc_opt.base.errors import StudySpecError, TrajectoryError
from lcsc_opt.base.study_file import parse_study_file
from lcsc_opt.checkpoints.lora import LoraAlphas, lora_modules
from lcsc_opt.coefficients.profiles import average_name, default_origin, strength_coefficients, strength_of
from lcsc_opt.database.arrays import coefficients_of
from lcsc_opt.database.connection import open_storage
from lcsc_opt.database.store import StoredStudy
from lcsc_opt.optimizers.grids import ProfileGrid
from lcsc_opt.sampling.lora import to_diffusers
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.adapters import adapters_in, open_with_base, requests_of_adapters
from lcsc_opt.trajectory.sources import PackRequest
from tests import tiny_pipelines
from tests.commands import Typed
from tests.lora_files import SAVERS, deltas

if find_spec("peft") is None:
    pytest.skip("needs peft", allow_module_level=True)

Saved = dict[int, dict[str, Tensor]]
"""Step → module → ΔW as PEFT computes it."""


def train(folder: Path, seeds: dict[int, int], flavour: str = "diffusers", **changes: Any) -> Saved:
    """LoRAs at steps, each of a seed; ``changes`` are PEFT's configuration."""
    saved = {}
    targets = changes.pop("targets", ["to_q", "conv1"])
    for step, seed in seeds.items():
        network = tiny_pipelines.adapted_unet(seed, targets, **changes)
        SAVERS[flavour](network, folder / f"checkpoint-{step}")
        saved[step] = deltas(network)
    return saved


def opened(*patterns: Path, folder: Path) -> Trajectory:
    return open_with_base(requests_of_adapters(PackRequest(patterns, folder)))


def products(trajectory: Trajectory, coefficients: Any) -> dict[str, Tensor]:
    """Module → ΔW of a combination."""
    weights = trajectory.merge(np.asarray(coefficients, dtype=np.float64))
    found = {}
    for module in lora_modules(weights):
        down, up, scale = module.factors(weights, trajectory.lora_alphas())
        product = scale * (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])
        found[module.path.replace("_", ".")] = product
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    renamed = {name.replace("_", "."): value for name, value in expected.items()}
    torch.testing.assert_close(found, renamed, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("flavour", list(SAVERS))
@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 1.5])
def test_a_checkpoint_with_a_strength_adds_so_much_of_its_product_to_the_base(
    tmp_path: Path, flavour: str, strength: float
) -> None:
    saved = train(tmp_path / "run", {100: 1, 200: 2}, flavour)
    trajectory = opened(tmp_path / "run", folder=tmp_path)
    assert (trajectory.steps, adapters_in(trajectory)) == ((0, 100, 200), 1)
    coefficients = strength_coefficients(trajectory.steps, 200, strength)
    assert coefficients.sum() == 1
    assert strength_of(coefficients) == pytest.approx(strength)
    assert_same(products(trajectory, coefficients), {name: strength * value for name, value in saved[200].items()})


def test_several_adapters_of_one_base_add_up_without_products_of_one_with_another(tmp_path: Path) -> None:
    """They have other ranks, alphas and modules."""
    first = train(tmp_path / "a", {100: 1, 200: 2})
    second = train(tmp_path / "b", {100: 3, 300: 4}, r=3, lora_alpha=1.5, targets=["to_q", "to_v"])
    trajectory = opened(tmp_path / "a", tmp_path / "b", folder=tmp_path)
    assert (trajectory.steps, adapters_in(trajectory)) == ((0, 100, 200, 300, 500), 2)
    found = products(trajectory, [-0.3, 0.0, 0.9, 0.0, 0.4])
    assert len(found) > max(len(first[200]), len(second[300]))
    expected = {name: 0.81 * value for name, value in first[200].items()}
    for name, value in second[300].items():
        expected[name] = expected.get(name, 0) + 0.16 * value
    assert_same(found, expected)
    again = opened(tmp_path / "a", tmp_path / "b", folder=tmp_path)
    assert again.path == trajectory.path, "it is made once"


def test_what_is_no_adapter_or_not_of_one_base_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "a", {100: 1, 200: 2})
    train(tmp_path / "kohya", {100: 1, 200: 2}, "kohya")
    with pytest.raises(TrajectoryError, match="names its factors otherwise"):
        opened(tmp_path / "a", tmp_path / "kohya", folder=tmp_path / "files")
    for step in (100, 200):
        (tmp_path / "whole").mkdir(exist_ok=True)
        save_file({"weight": torch.full((2,), float(step))}, tmp_path / f"whole/m-{step}.safetensors")
    with pytest.raises(TrajectoryError, match="not a LoRA"):
        opened(tmp_path / "whole", folder=tmp_path / "files")
    train(tmp_path / "zero", {0: 1, 200: 2})
    with pytest.raises(TrajectoryError, match="begins at step 0, which stands for the base model"):
        opened(tmp_path / "zero", folder=tmp_path / "files")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_average_that_a_trainer_kept_of_an_adapter_keeps_its_digits(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for step in (100, 200):
        average = {
            "unet.to_q.lora_A.weight": torch.randn(2, 8, generator=generator),
            "unet.to_q.lora_B.weight": torch.randn(8, 2, generator=generator),
        }
        weights = {name: (factor + step).to(dtype) for name, factor in average.items()}
        torch.save({"model": weights, "ema": average}, tmp_path / f"lora_{step}.pt")
    trajectory = opened(tmp_path / "lora_*.pt", folder=tmp_path)
    assert trajectory.steps == (0, 100, 200)
    torch.testing.assert_close(trajectory.trainer_ema(), average, rtol=0, atol=0)


def test_a_grid_of_strengths_has_each_epoch_with_each_and_names_them() -> None:
    steps = (0, 100, 200)
    points = ProfileGrid("strength").points(steps)
    names = [average_name(point, steps) for point in points]
    assert len(points) == 12
    assert names[:2] == ["step 100, strength 0.25", "step 100, strength 0.5"]
    assert names[3] == "step 100"
    assert names[-1] == "step 200, strength 1.5"
    assert len(ProfileGrid("strength", values=[0.8]).points(steps)) == 2
    with pytest.raises(StudySpecError, match=r"add space: \{strength: true\}"):
        ProfileGrid("strength").points((100, 200))
    with pytest.raises(StudySpecError, match="expected strengths of at least 0"):
        ProfileGrid("strength", values=[-1]).points(steps)


def test_a_study_file_says_it_of_the_space() -> None:
    content = {
        **{"name": "a", "objective": {"file": "latent_diffusion.py", "settings": {"checkpoints": "run"}}},
        **{"optimizers": ["CMA"], "space": {"strength": True, "rows": "layers"}},
    }
    parsed = parse_study_file(content, source="it")
    assert parsed.space.rows == "layers"
    assert parsed.objective.settings == {"checkpoints": "run", "strength": True}
    assert content["space"] == {"strength": True, "rows": "layers"}, "the caller's own stays as it is"
    alone = {**content, "space": {"strength": True}, "optimizers": ["LCSCGradient"]}
    usual = {**content, "optimizers": ["LCSCGradient"]}
    usual.pop("space")
    spaces = [parse_study_file(one, source="it").space for one in (alone, usual)]
    assert spaces[0] == spaces[1], "the rest of the space is the usual one"


def test_averages_leave_the_base_out_so_that_they_are_what_the_user_has() -> None:
    steps = (0, 100, 200, 300)
    points = ProfileGrid("ema").points(steps)
    trained = ProfileGrid("ema").points(steps[1:])
    assert [average_name(point, steps) for point in points] == [average_name(point, steps[1:]) for point in trained]
    assert all(point[0] == 0 for point in points)
    assert default_origin(steps)[0] == 0
    assert len(ProfileGrid("ema").points((0, 100))) > 1, "of two checkpoints both are needed"


def test_searches_move_the_strength_and_an_export_has_it_in_its_factors(workplace: Path, typed: Typed) -> None:
    tiny_pipelines.stable_diffusion(workplace).save_pretrained(workplace / "pipeline")
    train(workplace / "lora", {100: 1, 200: 2, 300: 3})
    (workplace / "real").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(image).save(workplace / "real" / f"{i}.png")
    settings = {
        **{"pipeline": "pipeline", "component": "lora", "checkpoints": "lora", "prompts": ["a fox", "an owl"]},
        **{"sampler": {"name": "lcm", "steps": 1}, "loss": "fid@tests.tiny_pipelines:Colours", "reference": "real"},
        **{"images": 16, "guidance_scale": 1},
    }
    study = {
        **{"name": "strong", "objective": {"file": "latent_diffusion.py", "settings": settings}},
        **{
            "space": {"strength": True, "kind": "affine"},
            "budget": {"evaluations": 6},
            "held_out": {"images": 16, "top": 1},
        },
        "optimizers": ["CMA", {"LCSCGradient": {"images": 8}}, {"Grid": {"profile": "strength", "values": [0.5, 1.5]}}],
    }
    Path("study.yaml").write_text(yaml.safe_dump(study))
    typed("run", "study.yaml")
    for optimizer in ("CMA", "LCSCGradient"):
        trials = StoredStudy.open(open_storage("sqlite:///studies.db", write=False), f"strong/{optimizer}/0").trials()
        found = {round(strength_of(coefficients_of(trial)), 6) for trial in trials}
        assert len(found) > 2, f"{optimizer} tries several strengths"
    typed("export", "strong/Grid/0", "--trial", "1", "--as", "lora", "-o", "strong.safetensors")
    written = load_file("strong.safetensors")
    original = load_file("lora/checkpoint-100/pytorch_lora_weights.safetensors")
    ours, theirs = to_diffusers(written), to_diffusers(original, LoraAlphas.read(Path("lora/checkpoint-100")))
    for module in lora_modules(theirs):
        expected = 1.5 * theirs[module.up].flatten(1) @ theirs[module.down].flatten(1)
        torch.testing.assert_close(ours[module.up].flatten(1) @ ours[module.down].flatten(1), expected)
    typed("apply", "strong.safetensors", "lora", "-o", "again.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in load_file("again.safetensors").items())
    shown = typed.json("show", "strong.safetensors")
    assert shown["adapters"] == 1
    assert "1.5" in typed("show", "strong.safetensors").out
    assert json.loads(json.dumps(shown["steps"])) == [0, 100, 200, 300]


def test_rows_without_the_base_are_no_combination_with_a_strength(tmp_path: Path) -> None:
    """As a study without strengths may get its checkpoints from a trajectory that another study packed."""
    train(tmp_path / "lora", {100: 1, 200: 2})
    with_base = opened(tmp_path / "lora", folder=tmp_path / "files")
    assert adapters_in(with_base) == 1
    rows = Trajectory.open(with_base.path, steps=(100, 200))
    assert adapters_in(rows) is None
