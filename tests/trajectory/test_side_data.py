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
from tests.unet_examples import unet


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


def test_averages_of_diffusers_are_packed_though_their_configurations_count_the_steps(tmp_path: Path) -> None:
    from diffusers.training_utils import EMAModel

    model = unet()
    average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    for step in (1, 2, 3):
        average.step(model.parameters())
        average.save_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "unet_ema")
    counted = json.loads((tmp_path / "run/checkpoint-2/unet_ema/config.json").read_text())["optimization_step"]
    assert counted == 2
    assert pack(tmp_path / "run", tmp_path / "t", key="unet_ema").steps == (1, 2, 3)


def test_the_message_names_the_checkpoint_that_it_compares_with(tmp_path: Path) -> None:
    for step, config in ((1, None), (2, {"scale": 1}), (3, {"scale": 2})):
        written(tmp_path / "run", step, config)
    with pytest.raises(TrajectoryError, match=r"checkpoint-3: its config.json has scale 2, and that of .*checkpoint-2"):
        pack(tmp_path / "run", tmp_path / "t")


@pytest.mark.parametrize("second", [{"scale": 2}, {}, {"scale": 1, "prediction_type": "v_prediction"}])
def test_checkpoints_of_models_with_other_settings_are_refused(tmp_path: Path, second: dict[str, Any]) -> None:
    written(tmp_path / "run", 1, {"scale": 1})
    written(tmp_path / "run", 2, second)
    with pytest.raises(TrajectoryError, match=r"checkpoint-2: its config.json has (scale|predic).*first_step"):
        pack(tmp_path / "run", tmp_path / "t")
