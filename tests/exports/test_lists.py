"""``--as megatron`` and ``mergekit``: the merge as these programs take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lcsc_opt.cli import run as lcsc
from lcsc_opt.exports import Recipe
from lcsc_opt.trajectory import TrajectoryWriter
from tests.model_studies import STEPS, state_dict, write_checkpoints, write_model_study


def merged_as_mergekit(content: dict[str, Any]) -> dict[str, Tensor]:
    """What its ``linear`` and its ``evaluate_setting`` compute of a YAML for these checkpoints."""
    assert (content["merge_method"], content["parameters"], content["dtype"]) == (
        "linear",
        {"normalize": False},
        "float32",
    )
    result: dict[str, Tensor] = {}
    for model in content["models"]:
        step, weight = int(Path(model["model"]).stem.removeprefix("model")), model["parameters"]["weight"]
        for name, tensor in state_dict(step).items():
            matching = (
                (each["value"] for each in weight if each.get("filter", "") in name) if isinstance(weight, list) else ()
            )
            result[name] = result.get(name, 0) + tensor.float() * next(iter(matching), weight)
    return result


def assert_merges(content: dict[str, Any], model: Path) -> None:
    found, expected = merged_as_mergekit(content), load_file(model)
    for name in ("conv.weight", "norm.weight", "constant"):
        torch.testing.assert_close(found[name].to(expected[name].dtype), expected[name])


def test_a_study_with_rows_becomes_a_yaml_for_mergekit_that_merges_the_same(workplace: Path) -> None:
    write_model_study(workplace, optimizers=["LCSC"], budget={"evaluations": 8}, space={"rows": "layers"})
    assert lcsc(["run", "small.yaml"]) == 0
    assert lcsc(["export", "small/LCSC/0", "-o", "merge.yaml", "--as", "mergekit", "--dtype", "bf16"]) == 0
    assert lcsc(["export", "small/LCSC/0", "-o", "best.safetensors"]) == 0
    content = yaml.safe_load(Path("merge.yaml").read_text())
    assert content["out_dtype"] == "bfloat16"
    assert np.ndim(Recipe.read(Path("best.safetensors")).coefficients) == 2
    assert_merges(content, Path("best.safetensors"))
    assert lcsc(["export", "small/LCSC/0", "-o", "list.txt", "--as", "megatron"]) == 2


def test_a_recipe_becomes_a_list_with_every_digit_of_the_weights_that_count(workplace: Path) -> None:
    write_checkpoints(Path("runs"))
    Path("c.json").write_text(json.dumps([1.1, 0, 0, -0.1, 0]))
    assert lcsc(["apply", "c.json", "runs", "-o", "average.safetensors"]) == 0
    assert lcsc(["apply", "average.safetensors", "runs", "-o", "list.txt", "--as", "megatron"]) == 0
    assert lcsc(["apply", "average.safetensors", "runs", "-o", "merge.yaml", "--as", "mergekit"]) == 0
    assert_merges(yaml.safe_load(Path("merge.yaml").read_text()), Path("average.safetensors"))
    lines = [line.rsplit(":", 1) for line in Path("list.txt").read_text().splitlines()]
    assert [(Path(path), float(weight)) for path, weight in lines] == [
        (Path("runs").absolute() / f"model{STEPS[0]:06d}.safetensors", 1.1),
        (Path("runs").absolute() / f"model{STEPS[3]:06d}.safetensors", -0.1),
    ]


def test_what_these_programs_cannot_do_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrajectoryWriter("own.trajectory") as writer:
        for step in STEPS:
            writer.append(step, state_dict(step))
    assert lcsc(["apply", "ema:0.9", "own.trajectory", "-o", "list.txt", "--as", "megatron"]) == 2
    assert "step 10 has no file: a training loop wrote it" in capsys.readouterr().err
    assert not Path("list.txt").exists()
