"""README and docs/start.md: every block runs, but those behind ``<!-- fragment: reason -->``; every command exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from lcsc_opt.base.settings import parse_yaml
from lcsc_opt.base.study_file import parse_studies
from lcsc_opt.cli import app
from lcsc_opt.cli import run as lcsc
from tests.objectives.image_objectives import PIXELS
from tests.processes import script_process
from tests.unet_examples import unet

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/start.md")
BLOCK = re.compile(r"(?:<!-- fragment: (?P<reason>[^\n]+?) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
SHORT: dict[str, Any] = {"loss": PIXELS, "images": 40, "sampler": {"name": "dpm-solver++", "steps": 1}, "device": "cpu"}


class Block(NamedTuple):
    """One block of a page; ``reason`` is why it is a fragment, which is not run."""

    kind: str
    text: str
    reason: str | None


def blocks(page: str) -> list[Block]:
    """In the order of the page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(found["kind"], found["text"], found["reason"]) for found in BLOCK.finditer(text)]


def commands(block: Block) -> list[list[str]]:
    """The words of each ``lcsc`` command of a console block, without comments."""
    found = []
    for line in block.text.splitlines():
        for command in line.partition("  #")[0].split(" ; "):
            words = shlex.split(command)
            if words[:1] == ["lcsc"]:
                found.append(words[1:])
    return found


def shortened(content: Any) -> Any:
    """A study file whose searches are short, in features that need no download."""
    content["objective"]["settings"] |= SHORT
    content["budget"] = {"evaluations": 13}
    content["held_out"] = {"images": 40, "top": 1}
    return content


@pytest.fixture
def checkpoints(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages call ``runs/``, ``ddpm-output`` and ``photographs/``."""
    monkeypatch.setattr("lcsc_opt.exports.images.PAIRS", 40)
    for folder in ("runs", "ddpm-output"):
        for step in (100, 200, 300):
            unet(step).save_pretrained(workplace / folder / f"checkpoint-{step}" / "unet_ema")
        unet().save_config(workplace / folder / "unet")
        scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
        (workplace / folder / "scheduler").mkdir()
        (workplace / folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (workplace / "photographs").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(workplace / "photographs" / f"{index}.png")
    return workplace


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(checkpoints: Path, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"network": unet()}
    ran = 0
    for kind, text, reason in blocks(page):
        if reason is not None:
            continue
        ran += 1
        if kind == "yaml":
            content = parse_yaml(text)
            parse_studies(content, source=page)
            (checkpoints / f"{content['name']}.yaml").write_text(yaml.safe_dump(shortened(content)))
        elif kind == "python":
            exec(compile(text, page, "exec"), names)
        else:
            assert kind == "console"
            for words in commands(Block(kind, text, None)):
                status = lcsc(words)
                assert status == 0, f"{words}: {capsys.readouterr().err}"
                if words[0] == "init":
                    written = checkpoints / "study.yaml"
                    content = parse_yaml(written.read_text(encoding="utf-8"))
                    written.write_text(yaml.safe_dump(shortened(content)))
    assert ran >= 3


def test_readme_begins_with_ten_lines_that_run_twice_as_a_script(workplace: Path) -> None:
    """The second run cannot know that its closures are the first one's: it searches again, and finds the same."""
    code = next(block.text for block in blocks("README.md") if block.kind == "python")
    assert sum(bool(line.strip()) for line in code.splitlines()) == 10
    (workplace / "first.py").write_text(code)
    first = script_process(workplace / "first.py")
    assert first.status == 0, first.err
    sentence = re.match(r"LCSCGradient is ahead: held-out score \S+, (\d+) % below EMA\*", first.out)
    assert sentence is not None
    assert int(sentence[1]) >= 5
    again = script_process(workplace / "first.py")
    assert re.sub(r"\d\.\d s", "", again.out) == re.sub(r"\d\.\d s", "", first.out)
    assert "search-2: a new search" in again.err
    assert "`lcsc export search/LCSCGradient/0 -o best.safetensors`" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert lcsc(["export", "search/LCSCGradient/0", "-o", "best.safetensors"]) == 0


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_exists(page: str) -> None:
    """Also those of fragments: arguments are parsed, and nothing is run."""
    group: Any = typer.main.get_command(app)
    parsed = 0
    for block in blocks(page):
        for words in commands(block):
            command = group
            arguments = words
            while hasattr(command, "commands"):
                assert arguments[0] in command.commands, words
                command = command.commands[arguments[0]]
                arguments = arguments[1:]
            command.make_context(words[0], list(arguments))
            parsed += 1
    assert parsed >= 3


def test_only_fragments_with_a_reason_are_left_out() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(blocks(page)), "every fence belongs to a block"
        assert text.count("<!-- fragment") == sum(block.reason is not None for block in blocks(page))
        for block in blocks(page):
            installs = re.search(r"\b(pip|make|docker)\b", block.text)
            if block.kind == "console" and block.reason is None:
                assert installs is None, block.text


def test_the_notebook_installs_the_repository_of_the_package() -> None:
    address = re.findall(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[0]
    notebook = (ROOT / "docs/tutorials/letters.ipynb").read_text(encoding="utf-8")
    assert f'REPOSITORY = \\"{address}\\"' in notebook
