"""The checkpoints of every row of the table in ``docs/reference.md`` are packed, on files of that format."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from lcsc_opt.cli import run as lcsc
from lcsc_opt.trajectory import Trajectory
from tests.checkpoints import checkpoint_examples
from tests.trajectory.trajectory_examples import same_bits

RAW_BESIDE_AVERAGES = (  # formats whose raw weights are searched unless a user chooses
    "PyTorch, nested (DiT, SiT, your own loop)",
    "DDIM",
    "score_sde, torch-ema",
    "denoising-diffusion-pytorch, ema-pytorch",
    "imagen-pytorch",
    "JiT, RiT, JLT",
    "MONAI, ignite",
    "latent-diffusion (CompVis)",
    "rectified-flow",
    "diffusers training",
)
PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def rows() -> dict[str, str]:
    """Code base → its files in the column ``checkpoints``, of the first table under the heading ``Checkpoints``."""
    section = PAGE.read_text().split("\n## Checkpoints\n")[1].split("\n## ")[0].split("\n### ")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| ")]
    index = [cell.strip() for cell in cells[0]].index("checkpoints")
    return {row[0].strip(): row[index].strip().strip("`") for row in cells[1:]}


def as_a_shell_would(arguments: str) -> list[str]:
    """The arguments, with patterns replaced by the files that they match."""
    return [name for a in shlex.split(arguments) for name in (sorted(map(str, Path().glob(a))) if "*" in a else [a])]


def test_page_and_examples_name_the_same_formats():
    assert rows().keys() == set(checkpoint_examples.NAMES)


@pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning", "ignore::Warning:lightning_fabric")
@pytest.mark.parametrize("name", checkpoint_examples.NAMES)
def test_example_of_the_page_packs_these_weights(name, workplace, monkeypatch, capsys):
    written = checkpoint_examples.write(name, workplace / "run")
    monkeypatch.setattr(sys, "argv", ["lcsc"])
    checkpoints = as_a_shell_would(rows()[name])
    assert lcsc(["trajectory", "pack", *checkpoints, "-o", "run.trajectory"]) == 0, capsys.readouterr().err
    trajectory = Trajectory.open("run.trajectory")
    assert trajectory.steps == checkpoint_examples.STEPS
    average = trajectory.trainer_ema()
    assert (average is not None) == (name in RAW_BESIDE_AVERAGES)
    if average is not None:  # it is packed beside the raw weights
        assert same_bits(average, {**trajectory.checkpoint(-1), **written[trajectory.steps[-1]]})
        assert not trajectory.merges_averages
        return
    for index, step in enumerate(trajectory.steps):
        coefficients = [float(index == other) for other in range(3)]
        assert same_bits(trajectory.merge(coefficients), written[step])
