"""The short tuning of ``docs/tutorials/tuning.md``: what it prints, run in order in an empty folder, but shorter."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from lcsc_opt.cli import run as lcsc
from lcsc_opt.trajectory import Trajectory

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "tuning.md"
SHORTER = {
    "--steps 4000 --checkpoint-every 20": "--steps 4 --checkpoint-every 2",
    "--steps 800": "--steps 8",
    "lcsc run paper/enhance": "lcsc run paper/enhance --budget 4 held_out.images=100 objective.settings.images=70",
    "images=10_000": "images=100",
}


def blocks() -> list[tuple[str, str]]:
    """The language and the text of each block, shortened."""
    text = PAGE.read_text()
    for long, short in SHORTER.items():
        assert long in text
        text = text.replace(long, short)
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_printed(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known: dict[str, Any] = {}
    assert {language for language, _ in blocks()} == {"console", "python"}
    for language, text in blocks():
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), known)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "lcsc"
            assert lcsc(arguments) == 0, capsys.readouterr().err
    assert len(known["images"]) == 16
    assert Trajectory.open("own_loop.trajectory").steps == (0, 4)
    said = capsys.readouterr().out
    assert all(f"\n{name} " in said for name in ("finished", "EMAGrid", "LCSC", "LCSCGradient"))
    tuning = Trajectory.open("tuning.trajectory")
    assert tuning.steps == (0, 4, 8)
    loaded = known["UNet2DModel"].from_pretrained("finished", subfolder="unet").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in tuning.checkpoint(0).items())
    again = known["ConsistencyModelPipeline"].from_pretrained("enhanced_pipeline").unet.state_dict()
    exported = known["UNet2DModel"].from_pretrained("enhanced").state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in again.items())
    assert (workplace / "enhanced" / "lcsc_recipe.json").is_file()
