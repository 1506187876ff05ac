"""The model card in an exported folder, read by the Hub's own client."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from lcsc_opt.cli import run
from lcsc_opt.database.report import HeldOutReport, MetricRow
from lcsc_opt.exports import Recipe
from lcsc_opt.exports.model_card import model_card
from lcsc_opt.trajectory import Trajectory
from tests.commands import Typed
from tests.history_examples import measured
from tests.model_studies import STUDY, like, write_model_study
from tests.unet_examples import unet

CARD = "---\nlicense: openrail++\nbase_model: owner/pretrained\npipeline_tag: image-to-image\n---\nA training.\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    network = unet()
    network.save_pretrained(folder / "model")
    file = write_model_study(
        folder,
        weights=lambda step: like(network.state_dict(), step),
        held_out={"images": 20, "top": 2},
        budget={"evaluations": 12},
    )
    assert run(["run", str(file), "--storage", f"sqlite:///{folder / 'studies.db'}"]) == 0
    return folder


@pytest.fixture
def typed(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> Typed:
    monkeypatch.setenv("LCSC_STORAGE", f"sqlite:///{finished / 'studies.db'}")
    return Typed(capsys)


def exported(typed: Typed, finished: Path, *options: str) -> tuple[dict[str, Any], huggingface_hub.ModelCard]:
    """The recipe and the card of an export."""
    typed("export", STUDY, "-o", "best", "--config", str(finished / "model"), "--overwrite", *options)
    return typed.json("show", "best"), huggingface_hub.ModelCard(Path("best/README.md").read_text())


def test_an_exported_folder_has_a_card_that_says_how_it_was_made(typed: Typed, finished: Path) -> None:
    (finished / "checkpoints" / "README.md").write_text(CARD)
    recipe, card = exported(typed, finished)
    assert (card.data.license, card.data.base_model) == ("openrail++", "owner/pretrained")
    assert (card.data.library_name, card.data.tags) == ("diffusers", ["lcsc", "merge"])
    assert card.text.startswith("\n# best\n")
    measured = dict(re.findall(r"^\| `(fid|kid)` \| \S* \| (\S+) \|$", card.text, re.MULTILINE))
    assert measured == {metric: f"{recipe['held_out']['metrics'][metric]:.6g}" for metric in ("fid", "kid")}
    assert f"| `loss` | {recipe['loss']:.6g} | {recipe['held_out']['loss']:.6g} |" in card.text
    table = re.findall(r"^\| (\d+) \| (\S+) \| `(\w+)` \|$", card.text, re.MULTILINE)
    assert [int(step) for step, _, _ in table] == recipe["steps"]
    assert [float(value) for _, value, _ in table] == recipe["coefficients"]
    assert str(finished) not in str(card), "no paths of this machine"
    _, card = exported(typed, finished, "--trial", "3")
    assert "trial 3 of" in card.text


def test_only_a_folder_has_a_card(typed: Typed) -> None:
    typed("export", STUDY, "-o", "best.safetensors")
    typed("export", STUDY, "-o", "recipe.json")
    assert not list(Path().rglob("README.md"))


def test_a_card_has_a_column_for_each_row_and_the_intervals_of_the_report(typed: Typed, finished: Path) -> None:
    typed("export", STUDY, "-o", "recipe.json")
    recipe = Recipe.read(Path("recipe.json"))
    one, other = recipe.coefficients, recipe.coefficients[::-1]
    in_rows = {"rows": {"conv": ("conv.weight",), "norm": ("norm.weight",)}, "coefficients": (one, other)}
    trajectory = Trajectory.open(finished / "run.trajectory")
    trajectory.sources = ("elsewhere/step-10",)
    objective: Any = SimpleNamespace(trajectory=trajectory, sampler=None)
    row = dataclasses.replace(
        MetricRow("kid", 1, 2.0, against="EMA*", baseline=4.5, gain=2.5),
        interval=(1.75, 2.25),
        baseline_interval=(4, 5),
        gain_interval=(2, 3),
    )
    report = HeldOutReport(measured(2.5, images=2000), rows=(row,), warning="precision is lost")
    study: Any = SimpleNamespace(
        attributes={
            "held_out": report.to_json(),
            "specification": {"objective": {"settings": {}}},
        }
    )
    text = model_card("best", study, objective, recipe.model_copy(update=in_rows), library="diffusers")
    card = huggingface_hub.ModelCard(text)
    assert (card.data.license, card.data.base_model) == (None, None)
    assert "| step | `conv` | `norm` | SHA-256 |" in card.text
    assert f"| {recipe.steps[0]} | {one[0]!r} | {other[0]!r} |" in card.text
    assert "| metric | found [95 %] | EMA* [95 %] | gain [95 %] |" in card.text
    assert "| kid ↓ | 2 [1.75, 2.25] | 4.5 [4, 5] | +2.5 [+2, +3] |" in card.text
    assert "on held-out noise, 2,000 images" in card.text
    assert "precision is lost" in card.text
    study.attributes["held_out"] = HeldOutReport(measured(2.5, images=0), rows=(row,)).to_json()
    text = model_card("best", study, objective, recipe.model_copy(update=in_rows), library="diffusers")
    assert "best trial on held-out noise; brackets" in text, "a score samples no images"
