from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lcsc_opt.base.catalog import load_file
from tests.objectives.image_objectives import build, check

TEMPLATE = Path(__file__).parents[2] / "objectives" / "template.py"


def test_a_copy_of_the_template_searches_its_model(folder: Path) -> None:
    shutil.copy(TEMPLATE, folder / "my_model.py")
    network = load_file(folder / "my_model.py").network
    for step in (1000, 2000, 3000):
        torch.manual_seed(step)
        torch.save(network(5).state_dict(), folder / f"model{step:06d}.pt")
    objective = build("my_model.py", folder, checkpoints="model*.pt", width=5)
    assert objective.steps == (1000, 2000, 3000)
    check(objective)


def test_the_template_fits_on_a_screen() -> None:
    assert len(TEMPLATE.read_text(encoding="utf-8").splitlines()) < 60
