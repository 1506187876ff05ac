"""The snippets of docs/training.md, each in a new process, so that its own imports have to suffice."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lcsc_opt.trajectory import Trajectory

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
SETUP = """
import torch
from torch import nn


class Scored(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(3, 1)

    def forward(self, inputs, labels):
        return {"loss": (self.network(inputs) - labels).square().mean()}


model = Scored()
dataset = [{"inputs": torch.ones(3), "labels": torch.zeros(1)}] * 64
network = nn.Linear(3, 1)
optimizer = torch.optim.Adam(network.parameters())
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(32, 3)), batch_size=4)
"""


@pytest.mark.parametrize("library", ["transformers", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_a_snippet_runs_with_its_imports_in_their_order(library: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    [block] = [block for block in BLOCKS if f'"{library}.trajectory"' in block]
    script = tmp_path / "script.py"
    script.write_text(SETUP + block)
    ended = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert Trajectory.open(tmp_path / f"{library}.trajectory").steps == (2, 4, 6, 8)
