"""Every block of every page runs, but those behind ``<!-- fragment: reason -->``; every command and key exists.

A block of YAML without a name is part of a study file; it has to be read.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
import yaml

from lcsc_opt.base.catalog import find, load_file
from lcsc_opt.base.settings import parse_settings, parse_yaml
from lcsc_opt.base.study_file import StudyFile, parse_study_file
from lcsc_opt.cli import app
from lcsc_opt.cli import run as lcsc
from tests.commands import Typed
from tests.metrics.examples import pixels, write_folder
from tests.objectives.image_objectives import PIXELS
from tests.processes import run_script
from tests.unet_examples import unet

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```\w", re.M)  # those of Sphinx have a brace
PAGES = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if FENCE.search(path.read_text(encoding="utf-8"))
]
RUN_BY = {  # pages whose blocks other tests run
    "CONTRIBUTING.md": "tests/test_recipes.py",
    "docs/api.md": "tests/test_face.py",
    "docs/first_model.md": "tests/test_first_model_page.py",
    "docs/training.md": "tests/trajectory/test_callbacks.py",  # and tests/training/test_page.py
}
BLOCK = re.compile(
    r"(?:<!-- fragment: (?P<reason>[^\n]+?) -->\n)?(?:^`(?P<file>\w+\.py)`[^\n]*\n\n)?"
    r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
README_SHORTER = {
    "images=500, held_out=2000, budget=40": (
        "images=65, held_out=65, budget=2, settings={'select': {'last': 3}, 'held_out_metrics': []}"
    ),
    "set_timesteps(8)": "set_timesteps(1)",
}
SHORT: dict[str, Any] = {"loss": PIXELS, "images": 40, "sampler": {"name": "dpm-solver++", "steps": 1}, "device": "cpu"}


class Block(NamedTuple):
    """One block of a page; ``reason`` is why it is a fragment, which is not run, ``file`` what the page calls it."""

    kind: str
    text: str
    reason: str | None
    file: str | None


def blocks(page: str) -> list[Block]:
    """In the order of the page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(found["kind"], found["text"], found["reason"], found["file"]) for found in BLOCK.finditer(text)]


def commands(block: Block) -> list[list[str]]:
    """The words of each ``lcsc`` command of a console block, without comments."""
    found = []
    for line in block.text.splitlines():
        for command in re.split(" ; | && ", line.partition("  #")[0]):
            called = re.fullmatch(r"(?:\$ |\w+=\S+ )?lcsc (.*)", command)
            if called is not None:
                found.append(shlex.split(called[1]))
    return found


def runs(block: Block) -> bool:
    """Whether it is more than a fragment, or a part of a study file, which has no name."""
    return block.reason is None and (block.kind != "yaml" or "name" in parse_yaml(block.text))


def shortened(content: Any) -> Any:
    """A study file whose searches are short, in features that need no download."""
    if "reference" in content["objective"]["settings"]:
        content["objective"]["settings"] |= SHORT
    content["budget"] = {"evaluations": 4}
    if "images" in content["held_out"]:
        content["held_out"] = {"images": 40, "top": 1}
    return content


@pytest.fixture
def checkpoints(workplace: Path, few_pairs: None) -> Path:
    """What the pages call ``runs/``, ``ddpm-output`` and ``photographs/``."""
    for folder in ("runs", "ddpm-output"):
        for step in (100, 200, 300):
            unet(step).save_pretrained(workplace / folder / f"checkpoint-{step}" / "unet_ema")
        unet().save_config(workplace / folder / "unet")
        scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
        (workplace / folder / "scheduler").mkdir()
        (workplace / folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    write_folder(workplace / "photographs", pixels(12, 8, 8)[..., 0])
    return workplace


def study_with(content: dict[str, Any]) -> dict[str, Any]:
    """A study of photographs with the keys of a block in it: those of a study file, or settings of its objective."""
    if not content.keys() & StudyFile.model_fields.keys():
        content = {"objective": {"settings": content}}
    objective = {"file": "diffusers_unconditional.py", **content.get("objective", {})}
    photographs = {"checkpoints": "runs", "model": "ddpm-output", "sampler": {"steps": 1}, "reference": "photographs"}
    settings = {**photographs, **objective.get("settings", {})}
    if "pipeline" in settings:
        objective["file"] = "latent_diffusion.py"
        del settings["model"]
    study = {"name": "page", "optimizers": ["LCSC"], "budget": {"evaluations": 10}}
    return {**study, **content, "objective": {**objective, "settings": settings}}


CLASSIFIERS = """
import torch

Classifier = lambda: torch.nn.Linear(4, 3)
TEST, VALIDATION, SELECTION = 1, 2, 3


def batches(data, *, seed, size):
    generator = torch.Generator().manual_seed(data)
    for _ in range(2):
        yield torch.randn(20, 4, generator=generator), torch.randint(3, (20,), generator=generator)
"""


def write_classifiers(folder: Path) -> None:
    """What docs/score.md calls ``my_project``, and its checkpoints."""
    (folder / "my_project.py").write_text(CLASSIFIERS)
    shutil.rmtree(folder / "runs")
    (folder / "runs").mkdir()
    for step in (100, 200, 300, 400):
        torch.manual_seed(step)
        torch.save(torch.nn.Linear(4, 3).state_dict(), folder / "runs" / f"model{step}.pt")


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.kind == "yaml" for block in blocks(page))])
def test_every_key_of_a_study_file_exists(page: str) -> None:
    """Parsing refuses an unknown key."""
    for block in blocks(page):
        if block.kind != "yaml":
            continue
        content = parse_yaml(block.text)
        if "name" not in content:
            content = study_with(content)
        study = parse_study_file(content, source=page)
        module: Any = load_file(find("objectives", study.objective.file))
        settings = dict(study.objective.settings)
        parse_settings(module.Settings, settings, source=page)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN_BY and any(map(runs, blocks(page)))])
def test_every_block_runs(checkpoints: Path, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    if page == "docs/score.md":
        write_classifiers(checkpoints)
    names: dict[str, Any] = {"network": unet()}
    for block in filter(runs, blocks(page)):
        kind, text, _, file = block
        if (page, kind) == ("README.md", "python"):  # which another test runs
            continue
        if kind == "yaml":
            content = parse_yaml(text)
            (checkpoints / f"{content['name']}.yaml").write_text(yaml.safe_dump(shortened(content)))
        elif kind == "python":
            if file is not None:  # which the commands after it import
                (checkpoints / file).write_text(text)
                if "classifier.pt" in text:  # its weights, which a user has trained
                    exec(compile(text, file, "exec"), names)
                    torch.save(names["Features"]().state_dict(), checkpoints / "classifier.pt")
            else:
                exec(compile(text, page, "exec"), names)
        else:
            assert kind == "console"
            found = commands(block)
            assert found
            for words in found:
                status = lcsc(words)
                assert status == 0, f"{words}: {capsys.readouterr().err}"
                if words[0] == "init":
                    written = checkpoints / "study.yaml"
                    content = parse_yaml(written.read_text(encoding="utf-8"))
                    written.write_text(yaml.safe_dump(shortened(content)))


def test_readme_begins_with_a_search_that_runs_as_a_script(
    workplace: Path, few_pairs: None, typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "\n".join(block.text for block in blocks("README.md") if block.kind == "python")
    for setting, shorter in README_SHORTER.items():
        assert setting in code
        code = code.replace(setting, shorter)
    (workplace / "objectives").symlink_to(ROOT / "objectives")
    (workplace / "first.py").write_text(code)
    run_script(workplace / "first.py")
    said = capsys.readouterr().out
    for row in ("EMA\\* ", "last checkpoint ", "trainer's EMA "):
        assert re.search(f"^(answer · )?{row}", said, re.M), said  # a model stands once, with all that it is
    [command] = re.findall(r"`lcsc (export [^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    typed(*command.split())


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(commands, blocks(page)))])
def test_every_command_and_option_exists(page: str) -> None:
    """Also those of fragments: arguments are parsed, and nothing is run."""
    group: Any = typer.main.get_command(app)
    for block in blocks(page):
        for words in commands(block):
            command = group
            arguments = words
            while hasattr(command, "commands"):
                assert arguments[0] in command.commands, words
                command = command.commands[arguments[0]]
                arguments = arguments[1:]
            command.make_context(words[0], list(arguments))


def test_only_fragments_with_a_reason_are_left_out() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        fences = re.findall(r"^```(?!\{)", re.sub(r"^```\{.*?^```$", "", text, flags=re.M | re.S), re.M)
        assert len(fences) == 2 * len(blocks(page)), f"{page}: every fence belongs to a block"
        assert text.count("<!-- fragment") == sum(block.reason is not None for block in blocks(page))
        for block in blocks(page):
            installs = re.search(r"\b(pip|make|docker)\b", block.text)
            if block.kind == "console" and block.reason is None:
                assert installs is None, block.text


def test_the_notebook_installs_the_repository_of_the_package() -> None:
    address = re.findall(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[0]
    notebook = (ROOT / "docs/tutorials/mnist.ipynb").read_text(encoding="utf-8")
    assert f'REPOSITORY = \\"{address}\\"' in notebook
