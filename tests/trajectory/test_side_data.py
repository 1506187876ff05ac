"""What lies beside checkpoints and differs between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.trajectory import pack


def written(run: Path, step: int, config: dict[str, Any] | None) -> None:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"w": torch.full((2,), float(step))}, folder / "diffusion_pytorch_model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("first", "second"),
    [({"scale": 1, "_diffusers_version": "0.1"}, {"scale": 1, "_diffusers_version": "0.2"}), ({"scale": 1}, None)],
)
def test_configurations_that_mean_the_same_are_packed(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any] | None
) -> None:
    written(tmp_path / "run", 1, first)
    written(tmp_path / "run", 2, second)
    assert pack(tmp_path / "run", tmp_path / "t").steps == (1, 2)


@pytest.mark.parametrize("second", [{"scale": 2}, {}, {"scale": 1, "prediction_type": "v_prediction"}])
def test_checkpoints_of_models_with_other_settings_are_refused(tmp_path: Path, second: dict[str, Any]) -> None:
    written(tmp_path / "run", 1, {"scale": 1})
    written(tmp_path / "run", 2, second)
    with pytest.raises(TrajectoryError, match=r"checkpoint-2: its config.json has (scale|predic).*first_step"):
        pack(tmp_path / "run", tmp_path / "t")
