"""The snippets of docs/training.md, as scripts, so that their own imports have to suffice."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from lcsc_opt.trajectory import Trajectory
from tests.processes import script_process

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
SETUP = """
import torch
from torch import nn

network = nn.Linear(3, 1)
optimizer = torch.optim.Adam(network.parameters())
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(32, 3)), batch_size=4)
"""


def written(library: str, folder: Path) -> Path:
    """A script with the library's snippet."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    [block] = [block for block in BLOCKS if f'"{library}.trajectory"' in block]
    script = folder / "script.py"
    script.write_text(SETUP + block)
    return script


def test_the_snippet_for_accelerate_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = script_process(written("accelerate", tmp_path))
    assert ended.status == 0, ended.err
    assert Trajectory.open(tmp_path / "accelerate.trajectory").steps == (2, 4, 6, 8)
