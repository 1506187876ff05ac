"""``docs/first_model.md``: its files and commands, in order in an empty folder, but shorter."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.commands import Typed
from tests.processes import run_script

PAGE = (Path(__file__).parents[1] / "docs" / "first_model.md").read_text(encoding="utf-8")
SHORTER = {
    "steps=3200, every=100": "steps=6, every=2",
    "[1200:]": "[1200:1240]",
    'loss="fdr@digits"': 'loss="fid@pixels", settings={"held_out_metrics": []}',
    "images=1000": "images=40",
    "budget=60": "budget=3",
    "held_out=2000": "held_out=40",
    "loss=fdr@digits": "loss=fid@pixels held_out_metrics=[]",
    "budget.evaluations=60 held_out.images=2000": "budget.evaluations=3 held_out.images=40",
}


@pytest.mark.slow
def test_a_newcomer_types_the_page(workplace: Path, few_pairs: None, typed: Typed) -> None:
    page = PAGE
    for long, short in SHORTER.items():
        assert long in page
        page = page.replace(long, short)
    files = re.findall(r"^`(\w+\.py)`\n\n```python\n(.*?)^```$", page, re.M | re.S)
    assert [name for name, _ in files] == ["train.py", "real.py", "my.py", "search.py"]
    for name, code in files:
        Path(name).write_text(code, encoding="utf-8")
    for name in ("train.py", "real.py", "search.py"):
        run_script(workplace / name)
    assert torch.load("best.pt").keys() == torch.load("ckpts/step_6.pt")["model"].keys()
    lines = re.findall(r"^\$ lcsc (.*)$", page, re.M)
    assert len(lines) == 4
    for line in lines:
        typed(*shlex.split(line))
    assert Path("ckpts.html").is_file()
    assert Path("found.pt").is_file()
