"""``lcsc images``, and the first look of ``init`` and the dry run: a labelled row for each model."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lcsc_opt.base.labelled_grid import GridRow, band, bands_of, labelled_grid
from lcsc_opt.exports.grid import REAL_ROW, Shown, default_columns, each_once
from tests import tiny_pipelines
from tests.commands import Typed

TASK = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.level = torch.nn.Parameter(torch.zeros(1))

def sample(net, noise):
    return (0.01 * noise + net.level).clamp(-1, 1)
"""
STEPS = (100, 200, 300, 400, 500)


def titles(path: Path | str) -> list[str]:
    return [row.title for row in bands_of(Path(path).read_bytes())]


def levels(path: Path | str) -> list[float]:
    """The mean grey level of each row, in [-1, 1]."""
    content = Path(path).read_bytes()
    rows = [band(content, number) for number in range(len(bands_of(content)))]
    return [float(np.asarray(Image.open(io.BytesIO(row or b"")))[:96, :96].mean() / 127.5 - 1) for row in rows]


@pytest.fixture
def levelled(workplace: Path) -> Path:
    """Checkpoints whose images are of one level each, a tenth for each hundred steps; real ones, and a study file."""
    (workplace / "levels.py").write_text(TASK)
    (workplace / "ck").mkdir()
    for step in STEPS:
        torch.save({"level": torch.tensor([step / 1000])}, workplace / f"ck/m-{step}.pt")
    rng = np.random.default_rng(0)
    np.savez("real.npz", rng.integers(150, 180, (40, 8, 8, 1), dtype=np.uint8))
    settings = {
        **{"checkpoints": "ck", "model": "levels:Net", "sampler": "levels:sample", "image_shape": [1, 8, 8]},
        **{"reference": "real.npz", "loss": "fid@pixels", "images": 20},
    }
    study = {
        **{"name": "levels", "objective": {"file": "torch_module.py", "settings": settings}},
        **{"optimizers": ["EMAGrid", "LCSC"], "budget": {"evaluations": 4}, "held_out": {"images": 20, "top": 1}},
    }
    (workplace / "study.yaml").write_text(yaml.safe_dump(study))
    return workplace


def test_a_study_files_checkpoints_have_a_row_each_with_its_real_images_or_without(
    levelled: Path, typed: Typed
) -> None:
    typed("images", "study.yaml")
    assert titles("levels-images.png") == [*(f"step {step}" for step in STEPS), REAL_ROW]
    assert levels("levels-images.png")[-1] == pytest.approx(165 / 127.5 - 1, abs=0.05)
    (levelled / "real.npz").unlink()
    said = typed("images", "study.yaml").err
    assert "no real images beside the models: " in said
    assert "real.npz" in said
    assert "levels-images.png: 5 models" in typed("images", "study.yaml").err
    assert titles("levels-images.png") == [f"step {step}" for step in STEPS]
    assert levels("levels-images.png") == pytest.approx([step / 1000 for step in STEPS], abs=0.02)
    typed("images", "study.yaml", "--model", "uniform", "--model", "step:200", "-o", "two.png")
    assert titles("two.png") == ["average of all 5", "step 200"]
    assert levels("two.png") == pytest.approx([0.3, 0.2], abs=0.02)
    assert "expected a file that ends in .png" in typed.refused("images", "study.yaml", "-o", "two.jpg")
    assert "there is no checkpoint of this step" in typed.refused("images", "study.yaml", "--model", "step:7")


def test_a_stored_experiment_shows_what_its_report_has_and_each_model_once(levelled: Path, typed: Typed) -> None:
    typed("run", "study.yaml")
    typed("images", "levels")
    *shown, real = titles("levels-models.png")
    assert real == REAL_ROW
    assert shown[:4] == [f"step {step}" for step in STEPS[:4]]
    assert sum("last checkpoint" in title for title in shown) == 1
    assert [title for title in shown if "answer · " in title]
    assert len(set(levels("levels-models.png")[:-1])) == len(shown)
    typed("images", "levels", "--model", "answer", "-o", "answer.png")
    assert len(titles("answer.png")) == 2
    refused = typed.refused("images", "levels", "sampler={steps: 3}")
    assert "write ./levels, for the experiment leave out everything" in refused, "nothing that is given is ignored"


def test_a_dry_run_shows_the_first_the_middle_and_the_last_checkpoint(levelled: Path, typed: Typed) -> None:
    said = typed("run", "study.yaml", "--dry-run").err
    assert "as they do in your own script: studies.files/levels-checkpoints.png" in said
    assert titles("studies.files/levels-checkpoints.png") == ["step 100", "step 300", "step 500", REAL_ROW]


def test_what_samples_no_images_is_said(workplace: Path, typed: Typed) -> None:
    study = {"name": "f", "objective": {"file": "function.py", "settings": {"callable": "g:h", "steps": [1, 2]}}}
    (workplace / "g.py").write_text("def h(coefficients):\n    return 1.0\n")
    (workplace / "f.yaml").write_text(yaml.safe_dump(study))
    assert "scores models without images" in typed.refused("images", "f.yaml")


@pytest.mark.skipif(not (find_spec("peft") and find_spec("transformers")), reason="needs peft and transformers")
def test_a_folder_of_loras_needs_a_pipeline_and_prompts_and_no_study_file(workplace: Path, typed: Typed) -> None:
    tiny_pipelines.stable_diffusion(workplace).save_pretrained(workplace / "pipeline")
    for step in STEPS[:3]:
        network = tiny_pipelines.adapted_unet(step, ["to_q", "to_out.0"])
        tiny_pipelines.save_lora(network, workplace / "lora" / f"checkpoint-{step}")
    missing = typed.refused("images", "lora/")
    assert "give pipeline=… prompts=… guidance_scale=…" in missing
    given = ["pipeline=pipeline", "prompts=[a fox, an owl]", "guidance_scale=1", "sampler={name: lcm, steps: 2}"]
    typed("images", "lora/", *given)
    assert titles("lora-images.png") == ["base, no LoRA", "step 100", "step 200", "step 300"]
    made = typed("init", "lora", *given).err
    assert "lora-checkpoints.png" in made, "that they are LoRAs need not be said"
    assert "reference: FILL IN" in made
    with_base = ["base, no LoRA", "step 100", "step 200", "step 300"]
    assert titles("studies.files/lora-checkpoints.png") == with_base
    (workplace / "real").mkdir()
    for number in range(16):
        Image.new("RGB", (16, 16), (16 * number, 0, 0)).save(workplace / "real" / f"{number}.png")
    scores = ["loss=fid@tests.tiny_pipelines:Colours", "reference=real", "images=16"]
    settings = [f"objective.settings.{score}" for score in scores]
    typed("run", "study.yaml", "--dry-run", "held_out.images=16", *settings)
    assert titles("studies.files/lora-checkpoints.png") == [*with_base, REAL_ROW], "metrics are loaded, too"


def test_quarters_are_drawn_in_letters_that_the_font_has() -> None:
    images = np.zeros((1, 3, 8, 8), np.float32)
    drawn = [Image.open(io.BytesIO(labelled_grid([GridRow(title, images)], ["x"]))) for title in ("¾ of", "3/4 of")]
    assert drawn[0].tobytes() == drawn[1].tobytes(), "an empty box stood there"


@pytest.mark.parametrize(("prompts", "columns"), [(1, 4), (3, 6), (10, 10), (40, 12), (0, 8)])
def test_as_many_columns_as_show_each_prompt(prompts: int, columns: int) -> None:
    sampler: Any = SimpleNamespace(fewest_report_images=prompts)
    assert default_columns(sampler) == columns


def test_a_grid_has_readable_labels_beside_rows_of_one_size_and_says_where_they_are() -> None:
    images = np.linspace(-1, 1, 3 * 2 * 700 * 500, dtype=np.float32).reshape(2, 3, 700, 500)
    content = labelled_grid([GridRow("a long title " * 30, images), GridRow("b", images)], ["x " * 200, "y"])
    picture = Image.open(io.BytesIO(content))
    first, second = bands_of(content)
    assert (first.title, second.title) == ("a long title " * 30, "b")
    assert (first.box[2] - first.box[0], first.box[3] - first.box[1]) == (2 * 229 + 3, 320), "large images are reduced"
    wide = GridRow("real", np.ones((2, 3, 20, 300), np.float32))
    assert Image.open(io.BytesIO(labelled_grid([GridRow("a", images), wide], ["x", "y"]))).size[1] == 2 * 323 + 26
    assert second.box[1] > first.box[3]
    assert picture.height >= second.box[3]
    above = np.asarray(picture.convert("L"))[: first.box[1], first.box[0] :]
    beside = np.asarray(picture.convert("L"))[first.box[1] :, : first.box[0]]
    assert above.min() < 100 > beside.min(), "there is text"
    assert bands_of(b"\x89PNG\r\n\x1a\n" + content[8:]) == bands_of(content)
    with_caption = Image.open(io.BytesIO(labelled_grid([GridRow("b", images)], ["x", "y"], "by a sampler " * 20)))
    without = Image.open(io.BytesIO(labelled_grid([GridRow("b", images)], ["x", "y"])))
    assert with_caption.height > without.height + 30, "in several lines"
    assert np.asarray(with_caption.convert("L"))[without.height :].min() < 100
    plain = io.BytesIO()
    picture.convert("L").save(plain, format="PNG")
    assert (bands_of(plain.getvalue()), band(content, 2), band(content, -1)) == ((), None, None)


def test_a_model_that_a_grid_found_has_the_name_of_its_checkpoint_once() -> None:
    step, other = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    shown = [
        Shown("step 300", step),
        Shown("last checkpoint", step),
        Shown("answer · Grid, trial 10 (step 300)", step),
        Shown("EMAGrid, trial 2 (EMA 0.5)", other),
    ]
    titles = [model.title for model in each_once(shown)]
    assert titles == ["step 300 = last checkpoint = answer · Grid, trial 10", "EMAGrid, trial 2 (EMA 0.5)"]
