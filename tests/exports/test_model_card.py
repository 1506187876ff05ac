"""The model card in an exported folder, read by the Hub's own client."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from lcsc_opt.base.records import ReportedMetrics
from lcsc_opt.cli import run
from lcsc_opt.database.measurement import Measurement, Model
from lcsc_opt.exports import Recipe
from lcsc_opt.exports.model_card import model_card
from lcsc_opt.trajectory import Trajectory
from tests.commands import Typed
from tests.history_examples import measured, report_of
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
    results = dict(re.findall(r"^\| `(fid|kid)` \| \S* \| (\S+) \|$", card.text, re.MULTILINE))
    assert results == {metric: f"{recipe['held_out']['metrics'][metric]:.6g}" for metric in ("fid", "kid")}
    assert f"| `loss` | {recipe['loss']:.6g} | {recipe['held_out']['loss']:.6g} |" in card.text
    assert "of the experiment\n`small`" in card.text
    assert "| metric | LCSC, trial " in card.text
    assert "no search was better than EMA*" not in card.text, "a warning about the answer, which is another model"
    table = re.findall(r"^\| (\d+) \| (\S+) \| `(\w+)` \|$", card.text, re.MULTILINE)
    assert [int(step) for step, _, _ in table] == recipe["steps"]
    assert [float(value) for _, value, _ in table] == recipe["coefficients"]
    assert str(finished) not in str(card), "no paths of this machine"
    _, card = exported(typed, finished, "--trial", "3")
    assert "trial 3 of" in card.text
    assert "On held-out noise" not in card.text, "it was not measured"


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
    values = {"loss": (2.5,), "kid": (2.0,)}
    report = report_of(
        {STUDY: Measurement(Model("", np.ones(1), trial=3), 2000, (0,), values, {"kid": ((1.9, 2.1) * 5,)})},
        Measurement(Model("EMA*", np.ones(1)), 2000, (0,), {"loss": (4.5,), "kid": (4.5,)}, {"kid": ((4.4, 4.6) * 5,)}),
        warnings=("precision is lost",),
        metrics=ReportedMetrics(signs={"kid": 1}, cross_check="kid", cross_check_text="kid in other features"),
    )
    chosen: Any = SimpleNamespace(model=report.of_answer.model, experiment="small", report=report)
    text = model_card("best", chosen, objective, recipe.model_copy(update=in_rows), library="diffusers")
    card = huggingface_hub.ModelCard(text)
    assert (card.data.license, card.data.base_model) == (None, None)
    assert "| step | `conv` | `norm` | SHA-256 |" in card.text
    assert f"| {recipe.steps[0]} | {one[0]!r} | {other[0]!r} |" in card.text
    assert "| metric | answer: LCSC, trial 3 [95 %] | EMA* [95 %] | gain [95 %] |" in card.text
    assert "| kid ↓ | 2 [1.321, 2.679] | 4.5 [3.821, 5.179] | +2.5 [+2.5, +2.5] |" in card.text
    assert "On held-out noise, 2,000 images; brackets" in card.text
    assert "precision is lost.\n\nThe cross-check is kid in other features.\n" in card.text
    chosen.report = report_of({STUDY: measured(2.5, trial=3)})
    text = model_card("best", chosen, objective, recipe.model_copy(update=in_rows), library="diffusers")
    assert "On held-out noise; brackets" in text, "a score samples no images"
