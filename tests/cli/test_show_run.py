"""``lcsc trajectory show`` of a run that is not packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints.checkpoint_examples import saved
from tests.commands import Typed


@pytest.fixture(autouse=True)
def place(workplace: Path) -> Path:
    return workplace


def state(number: float) -> dict[str, torch.Tensor]:
    return {"net.w": torch.full((2, 2), number), "net.b": torch.full((2,), number)}


def test_what_lies_in_a_run_is_shown_with_its_use(typed: Typed) -> None:
    for step in (1, 2, 3):
        averages = {0.9: state(step + 0.1), 0.99: state(step + 0.5)}
        saved(Path("run") / f"step_{step}.pt", {"net": state(step), "ema": averages, "best": state(-1)})
        saved(Path("run") / f"optim_{step}.pt", {"state": {}})
    said = typed("trajectory", "show", "run").out
    assert "run: 3 checkpoints, steps 1 to 3" in said
    assert "left out: 3 optim_*.pt (states of the training)" in said
    table = typed.json("trajectory", "show", "run")
    assert [*table["checkpoints"]] == ["1", "2", "3"]
    uses = {held["key"]: (held["what"], held["rate"], held["use"]) for held in table["held"]}
    assert uses == {
        "net": ("weights", "", "combined"),
        "ema.0.9": ("an average of net", "0.9", "row of the report: trainer's EMA 0.9"),
        "ema.0.99": ("an average of net", "0.99", "row of the report: trainer's EMA 0.99"),
        "best": ("of the model's names and shapes, but called no average", "", "–"),
    }
    assert not Path("run.trajectory").exists()


def test_one_checkpoint_and_averages_beside_it_are_shown(typed: Typed) -> None:
    for step in (1, 2):
        saved(Path("run") / f"net-{step}.safetensors", state(step))
        saved(Path("run") / f"net_ema_0.999-{step}.safetensors", state(step + 0.5))
    table = typed.json("trajectory", "show", "run/net-*.safetensors")
    rows = [(held["file"], held["use"]) for held in table["held"]]
    assert rows == [
        ("net-2.safetensors", "combined"),
        ("net_ema_0.999-2.safetensors", "row of the report: trainer's EMA"),
    ]
    assert "1 checkpoint, step 2" in typed("trajectory", "show", "run/net-2.safetensors").out


@pytest.mark.parametrize("name", ["nothing", "notes"])
def test_what_holds_no_checkpoint_is_refused(typed: Typed, name: str) -> None:
    saved(Path("notes") / "optimizer.pt", {})
    assert name in typed.refused("trajectory", "show", name)
