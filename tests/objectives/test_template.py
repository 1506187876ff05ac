from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lcsc_opt.base.catalog import load_file
from lcsc_opt.base.records import Candidate
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


def test_a_batch_that_was_found_is_no_larger_than_a_candidate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcsc_opt.objective.batch_size.MeasuredBatchSize.largest", lambda _: 64)
    shutil.copy(TEMPLATE, folder / "my_model.py")
    network = load_file(folder / "my_model.py").network
    for step in (1, 2):
        torch.save(network(8).state_dict(), folder / f"model{step}.pt")
    objective = build("my_model.py", folder, checkpoints="model*.pt", batch_size="auto", images=24)
    sizes: list[int] = []
    sample = objective.sampler.sample
    monkeypatch.setattr(
        objective.sampler, "sample", lambda noise, *span: (sizes.append(span[1] - span[0]), sample(noise, *span))[1]
    )
    objective.evaluate(Candidate(np.array([0.5, 0.5]), images=60))
    assert sizes == [24, 24, 12]
