"""``lcsc apply`` with a rate or the like: one merge without a study, whose recipe makes the same model again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lcsc_opt.cli import run as lcsc
from lcsc_opt.coefficients.profiles import ema_coefficients, power_ema_coefficients
from lcsc_opt.exports import Recipe
from lcsc_opt.trajectory import pack
from tests.model_studies import STEPS, state_dict, write_checkpoints


@pytest.fixture(autouse=True)
def place(workplace: Path) -> None:
    write_checkpoints(Path("runs"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("ema:0.9", ema_coefficients(STEPS, 0.9)),
        ("power:0.1", power_ema_coefficients(STEPS, 0.1)),
        ("uniform", np.full(5, 0.2)),
        ("last:2", np.array([0, 0, 0, 0.5, 0.5])),
        ("step:20", np.array([0, 1.0, 0, 0, 0])),
    ],
)
def test_it_is_the_merge_of_the_checkpoints_and_apply_makes_the_same_file(
    source: str, expected: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lcsc(["apply", source, "runs", "-o", "average.safetensors"]) == 0
    torch.testing.assert_close(load_file("average.safetensors"), pack("runs", "all.trajectory").merge(expected))
    assert Recipe.read(Path("average.safetensors")).coefficients == tuple(expected.tolist())
    assert lcsc(["show", "average.safetensors"]) == 0
    assert lcsc(["apply", "average.safetensors", "runs", "-o", "again.safetensors"]) == 0
    torch.testing.assert_close(load_file("again.safetensors"), load_file("average.safetensors"))
    assert load_file("average.safetensors")["constant"].equal(state_dict(10)["constant"])


def test_a_recipe_is_applied_to_the_same_weights_without_its_key() -> None:
    Path("keyed").mkdir()
    for step in STEPS:
        torch.save({"model": state_dict(step)}, f"keyed/model{step}.pt")
    assert lcsc(["apply", "uniform", "keyed", "--key", "model", "-o", "keyed.safetensors"]) == 0
    assert lcsc(["apply", "keyed.safetensors", "runs", "-o", "bare.safetensors"]) == 2
    assert lcsc(["apply", "keyed.safetensors", "runs", "--key", "", "-o", "bare.safetensors"]) == 0
    torch.testing.assert_close(load_file("bare.safetensors"), load_file("keyed.safetensors"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ema:fast", "ema:fast: expected a number, as in ema:0.9999 or power:0.1"),
        ("last:0", "last:0: there are 5 checkpoints"),
        ("step:25", "step:25: there is no checkpoint of this step; the steps are 10, 20, 30, 40, 50"),
        ("last:6", "last:6: there are 5 checkpoints"),
        ("ema:2", "ema:2: rate: expected at least 0 and below 1, got 2.0"),
        ("emma", "emma does not exist: name an exported model, a recipe or a study, or an average such as ema:0.9999"),
    ],
)
def test_what_cannot_be_averaged_is_one_line(source: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lcsc(["apply", source, "runs", "-o", "average.safetensors"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("average.safetensors").exists()


def test_files_are_rounded_as_the_recipes_checkpoints_were(capsys: pytest.CaptureFixture[str]) -> None:
    assert lcsc(["trajectory", "pack", "runs", "-o", "packed", "--stored", "float16"]) == 0
    assert lcsc(["apply", "uniform", "packed", "-o", "mean.safetensors"]) == 0
    assert lcsc(["apply", "mean.safetensors", "runs", "-o", "again.safetensors"]) == 0
    torch.testing.assert_close(load_file("again.safetensors"), load_file("mean.safetensors"))
    assert lcsc(["trajectory", "pack", "runs", "-o", "exact"]) == 0
    assert lcsc(["apply", "mean.safetensors", "exact", "-o", "again.safetensors", "--overwrite"]) == 2
    advice = "The recipe combines weights stored as float16: name the files themselves."
    assert advice in capsys.readouterr().err.splitlines()[-1]
