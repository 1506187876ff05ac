"""``lcsc trajectory pack`` with steps that are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.trajectory import Trajectory
from tests.commands import Typed


@pytest.fixture
def epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files of three epochs as a shell puts them: 1, 10, 2; the only weight is the epoch."""
    monkeypatch.chdir(tmp_path)
    for epoch in (1, 2, 10):
        save_file({"w": torch.full((3,), float(epoch))}, f"epoch{epoch}.safetensors")
    return sorted(str(path) for path in Path().glob("epoch*"))


def weights(path: str) -> list[float]:
    trajectory = Trajectory.open(path)
    return [float(trajectory.checkpoint(index)["w"][0]) for index in range(len(trajectory))]


@pytest.mark.parametrize("steps", ["100,200,1000", "100,1000,200"], ids=["natural order", "the order of a shell"])
def test_steps_are_of_the_files_where_a_shell_sorted_them(epochs: list[str], typed: Typed, steps: str) -> None:
    assert epochs == ["epoch1.safetensors", "epoch10.safetensors", "epoch2.safetensors"]
    typed("trajectory", "pack", *epochs, "--steps", steps, "-o", "run.trajectory")
    assert Trajectory.open("run.trajectory").steps == (100, 200, 1000)
    assert weights("run.trajectory") == [1, 2, 10]


@pytest.mark.parametrize("steps", ["1 2 3", "1,2,", "a", "1.5,2,3"])
def test_steps_that_are_no_numbers_are_refused_with_an_example(epochs: list[str], typed: Typed, steps: str) -> None:
    said = typed.refused("trajectory", "pack", *epochs, "--steps", steps, "-o", "run.trajectory")
    assert said.endswith(f"expected whole numbers separated by commas, such as 100,200,300, got {steps!r}")
