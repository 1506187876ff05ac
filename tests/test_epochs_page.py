"""``docs/tutorials/lora_epochs.md``: its study and its commands, on a small pipeline."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lcsc_opt
from lcsc_opt.base.labelled_grid import bands_of
from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.exports.grid import REAL_ROW
from tests import tiny_pipelines
from tests.commands import Typed
from tests.lora_files import KOHYA_EPOCHS, save_kohya_epochs
from tests.metrics.examples import pixels, write_folder

if not (find_spec("peft") and find_spec("transformers")):
    pytest.skip("needs peft and transformers", allow_module_level=True)

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "lora_epochs.md"


@pytest.fixture
def place(workplace: Path, few_pairs: None, few_of_average: None) -> Path:
    """The pipeline, the epochs of a LoRA as kohya names them, prompts and photographs."""
    tiny_pipelines.stable_diffusion(workplace / "words").save_pretrained(workplace / "sdxl")
    save_kohya_epochs(workplace / "runs" / "lora")
    (workplace / "prompts.txt").write_text("a cat\na red house\n")
    write_folder(workplace / "photographs", pixels(16, 16, 16))
    return workplace


def test_the_commands_of_the_page_look_at_epochs_and_choose_one(place: Path, typed: Typed) -> None:
    text = PAGE.read_text(encoding="utf-8")
    [(_, study), (_, commands)] = re.findall(r"^```(yaml|console)\n(.*?)^```$", text, re.M | re.S)
    content: dict[str, Any] = parse_yaml(study)
    small = {"sampler": {"name": "lcm", "steps": 1}, "images": 4, "dtype": "fp32", "device": "cpu"}
    content["objective"]["settings"] |= {**small, "loss": "fid@tests.tiny_pipelines:Colours", "held_out_metrics": []}
    content["held_out"] = {"images": 4, "top": 1}
    (place / "epochs.yaml").write_text(yaml.safe_dump(content))
    lines = [shlex.split(line.partition("  #")[0]) for line in commands.splitlines()]
    order = ("images", "run", "compare", "report", "images", "export")
    assert [words[:2] for words in lines] == [["lcsc", name] for name in order]
    typed_lines = [typed(*words[1:]) for words in lines]
    said = [one.out for one in typed_lines]
    assert "next: lcsc report epochs (one page about it), lcsc export epochs -o best" in typed_lines[1].err
    assert "load it as you load your checkpoints, with a weight of 1" in typed_lines[-1].err
    assert re.search(
        r"Grid, trial \d \(step \d+, hat-\d+\)|last checkpoint (= Grid|\))|best of the grid \(", said[2]
    ), "the epoch is named, and its file"
    epochs, with_answer = (
        [row.title for row in bands_of((place / name).read_bytes())]
        for name in ("lora-images.png", "epochs-models.png")
    )
    assert with_answer[-1] == REAL_ROW
    assert epochs == ["base, no LoRA", *(f"step {step}, {name[:-12]}" for step, name in KOHYA_EPOCHS.items())]
    assert sum("answer" in title for title in with_answer) == 1
    page = (place / "epochs.html").read_text()
    assert "data:image/png" in page
    for text in (page, typed("show", "epochs/Grid/0").out):
        assert "As searched, the best first" in text
        assert all(f"step {step}, {name[:-12]}" in text for step, name in [*KOHYA_EPOCHS.items()][:-1])
    assert load_file(place / "best.safetensors").keys() == load_file(place / "runs" / "lora" / "hat.safetensors").keys()
    typed("export", "epochs/Grid/0", "-o", "epoch.safetensors")
    study = lcsc_opt.load_study("epochs/Grid/0")
    exported = load_file(place / "epoch.safetensors")
    epoch = load_file(place / "runs" / "lora" / KOHYA_EPOCHS[study.steps[study.coefficients.argmax()]])
    assert exported.keys() == epoch.keys()
    assert all(torch.equal(tensor, epoch[name]) for name, tensor in exported.items())
