"""The folders that trainers leave: every file of weights is used, an average, or left out with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.finding import find_checkpoints, find_run
from lcsc_opt.checkpoints.names import CHECKPOINT_SUFFIXES
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.trajectory.packing import open_or_pack
from tests.checkpoints.checkpoint_examples import saved

STEPS = (100, 200, 300)


def weights(number: float) -> dict[str, torch.Tensor]:
    return {"net.weight": torch.full((3, 2), float(number)), "net.bias": torch.full((3,), float(number))}


class Layout(NamedTuple):
    """A folder of a trainer: what each file of a step holds, what lies beside, and what must come of it."""

    of_step: Mapping[str, Any]
    beside: Mapping[str, Any]
    used: int
    average: bool = False
    pattern: str = ""


def torch_ema(step: int) -> dict[str, Any]:
    return {"decay": 0.999, "num_updates": step, "shadow_params": [*weights(step + 0.5).values()]}


def state(step: int) -> dict[str, Any]:
    return {"state": {0: {"exp_avg": torch.ones(2)}}, "step": step}


def raw(step: int) -> dict[str, torch.Tensor]:
    return weights(step)


def averaged(step: int) -> dict[str, torch.Tensor]:
    return weights(step + 0.5)


LAYOUTS = {
    "Accelerate with torch-ema": Layout(
        {
            "checkpoint-{}/pytorch_model.bin": raw,
            "checkpoint-{}/optimizer.bin": state,
            "checkpoint-{}/scheduler.bin": state,
            "checkpoint-{}/custom_checkpoint_0.pkl": torch_ema,
        },
        {},
        used=3,
        average=True,
    ),
    "diffusers' folders with the pipeline beside": Layout(
        {
            "checkpoint-{}/unet/diffusion_pytorch_model.safetensors": raw,
            "checkpoint-{}/unet_ema/diffusion_pytorch_model.safetensors": averaged,
            "checkpoint-{}/optimizer.bin": state,
            "checkpoint-{}/random_states_0.pkl": state,
        },
        {
            "unet/diffusion_pytorch_model.safetensors": weights(300),
            "vae/diffusion_pytorch_model.safetensors": {"decoder": torch.ones(2)},
        },
        used=3,
        average=True,
    ),
    "transformers, whose last model lies in the root": Layout(
        {
            "checkpoint-{}/model.safetensors": raw,
            "checkpoint-{}/optimizer.pt": state,
            "checkpoint-{}/trainer_state.json": lambda step: {"global_step": step, "epoch": step / 100},
            "checkpoint-{}/training_args.bin": state,
        },
        {"model.safetensors": weights(300), "training_args.bin": state(0)},
        used=3,
    ),
    "transformers, with a later last model": Layout(
        {
            "checkpoint-{}/model.safetensors": raw,
            "checkpoint-{}/trainer_state.json": lambda step: {"global_step": step, "epoch": 1.0},
        },
        {"final/model.safetensors": weights(350), "final/trainer_state.json": {"global_step": 350}},
        used=4,
    ),
    "Lightning, with last and best": Layout(
        {"checkpoints/epoch=0-step={}.ckpt": lambda step: {"state_dict": weights(step), "global_step": step}},
        {
            "checkpoints/last.ckpt": {"state_dict": weights(300), "global_step": 300},
            "hparams.bin": {"lr": 0.1},
        },
        used=3,
    ),
    "litgpt": Layout({"step-{:08}/lit_model.pth": raw}, {"final/lit_model.pth": weights(400)}, used=3),
    "openai's code bases, raw weights chosen": Layout(
        {
            "model{:06}.pt": raw,
            "ema_0.999_{:06}.pt": raw,
            "ema_0.9999_{:06}.pt": averaged,
            "ema_0.99_{:06}.pt": raw,
            "opt{:06}.pt": state,
        },
        {},
        used=3,
        average=True,
        pattern="model*.pt",
    ),
    "torchtune": Layout(
        {"epoch_{}/model.safetensors": raw, "epoch_{}/recipe_state.pt": lambda step: {"epochs_run": step}},
        {"recipe_state/recipe_state.pt": {"epochs_run": 3}, "torchtune_config.yaml": None},
        used=3,
    ),
    "pythae": Layout(
        {"checkpoint_epoch_{}/model.pt": lambda step: {"model": weights(step)}, "checkpoint_epoch_{}/optim.pt": state},
        {"sample-1.png": None},
        used=3,
    ),
    "kohya's LoRA with its states": Layout(
        {"hat-{:06}.safetensors": raw, "hat-{:06}-state/optimizer.bin": state},
        {"hat.safetensors": weights(300), "sample/hat_000.png": None},
        used=3,
    ),
}


def write(root: Path, layout: Layout) -> None:
    contents = dict(layout.beside)
    for name, content in layout.of_step.items():
        contents |= {name.format(step): content(step) for step in STEPS}
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.write_text("")
        elif name.endswith(".json"):
            path.write_text(json.dumps(content))
        else:
            saved(path, content)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_file_of_weights_is_accounted_for(tmp_path, name):
    layout = LAYOUTS[name]
    root = tmp_path / "run"
    write(root, layout)
    place = root / layout.pattern
    found = find_run(place)
    assert len(found.checkpoints) == layout.used
    if place.is_dir():  # who writes a glob has chosen
        accounted = {*found.checkpoints, *found.left_out}
        for file in place.rglob("*"):
            if file.name.endswith(CHECKPOINT_SUFFIXES):
                assert not accounted.isdisjoint([file, *file.parents]), file
    trajectory = open_or_pack([place], folder=tmp_path / "files")
    average = trajectory.trainer_ema()
    assert (average is not None) == layout.average
    if average is not None:
        assert average["net.weight"].unique().tolist() == [STEPS[-1] + 0.5]
    last = trajectory.steps[-1]
    assert trajectory.checkpoint(-1)["net.weight"].unique().tolist() == [float(last)]


@pytest.mark.parametrize("is_told_apart", [True, False])
def test_averages_in_a_list_are_named_though_safetensors_sorts_names(tmp_path, caplog, is_told_apart):
    """As Accelerate saves diffusers' ``EMAModel``: its list is in the order of ``parameters()``."""
    caplog.set_level("INFO", logger="lcsc_opt")
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (4, 4), "down": (4, 4), "scale": (4,), "bias": (4,)}  # in the network's order
    last = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if not is_told_apart:
        last["up"] = last["down"] + 0.02  # between which the average of the latter lies
    for step in STEPS:
        moved = {name: tensor + (300 - step) / 1000 for name, tensor in last.items()}
        saved(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors", moved)
        averages = [tensor + 0.01 for tensor in moved.values()]
        saved(tmp_path / "run" / f"checkpoint-{step}" / "custom_checkpoint_0.pkl", {"shadow_params": averages})
    average = open_or_pack([tmp_path / "run"], folder=tmp_path / "files").trainer_ema()
    if is_told_apart:
        assert average is not None
        for name, tensor in last.items():
            torch.testing.assert_close(average[name], tensor + 0.01)
    else:
        assert average is None
    assert ("cannot be told apart: give" in caplog.text) == (not is_told_apart)


def test_one_line_names_what_is_left_out_and_why(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    write(tmp_path, LAYOUTS["Lightning, with last and best"])
    write(tmp_path, LAYOUTS["Accelerate with torch-ema"])
    find_checkpoints(tmp_path)
    (line,) = caplog.messages
    assert "3 checkpoints" in line
    assert "3 checkpoint-*/optimizer.bin" in line
    assert "checkpoints/last.ckpt" in line


@pytest.mark.parametrize("key", [None, "model", "model.net"])
def test_an_average_is_found_by_an_outer_key_of_the_weights_too(tmp_path, key):
    for step in STEPS:
        average = {name: tensor + 1 for name, tensor in weights(step).items()}
        saved(tmp_path / f"run/{step}.pt", {"model": {"net": weights(step)}, "ema": {"shadow": average}})
    trajectory = open_or_pack([tmp_path / "run"], folder=tmp_path / "files", key=key)
    last = trajectory.checkpoint(-1)
    kept = trajectory.trainer_ema()
    assert kept is not None
    assert kept.keys() == last.keys()
    for name, tensor in last.items():
        torch.testing.assert_close(kept[name], tensor + 1)


def test_of_raw_weights_and_an_average_the_average_is_left_out(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    write(tmp_path, LAYOUTS["diffusers' folders with the pipeline beside"])
    find_checkpoints(tmp_path)
    (line,) = caplog.messages
    assert "3 checkpoint-*/unet_ema/diffusion_pytorch_model.safetensors" in line
    assert "checkpoint-*/unet/" not in line


def test_an_average_of_another_model_is_none(tmp_path):
    layout = LAYOUTS["Accelerate with torch-ema"]
    write(tmp_path / "run", layout)
    for step in STEPS:
        other = {"shadow_params": [torch.ones(7), torch.ones(2)]}
        saved(tmp_path / "run" / f"checkpoint-{step}/custom_checkpoint_0.pkl", other)
    assert open_or_pack([tmp_path / "run"], folder=tmp_path / "files").trainer_ema() is None


def test_an_average_beside_the_file_that_a_key_names_is_found(tmp_path):
    for step in STEPS:
        folder = tmp_path / "run" / f"checkpoint-{step}"
        saved(folder / "net.pt", raw(step))
        saved(folder / "net_ema.pt", averaged(step))
    average = open_or_pack([tmp_path / "run"], folder=tmp_path / "files", key="net").trainer_ema()
    assert average is not None
    assert average["net.weight"].unique().tolist() == [STEPS[-1] + 0.5]


def test_a_broken_average_is_named_once(tmp_path, caplog):
    caplog.set_level("INFO", logger="lcsc_opt")
    for step in STEPS:
        saved(tmp_path / "run" / f"net-{step}.pt", raw(step))
        (tmp_path / "run" / f"net_ema-{step}.safetensors").write_bytes(b"no header of safetensors")
    open_or_pack([str(tmp_path / "run" / "net-*.pt")], folder=tmp_path / "files")
    (line,) = [message for message in caplog.messages if "EMA is left out" in message]
    assert line.count(f"net_ema-{STEPS[-1]}.safetensors") == 1


def test_of_averages_of_several_rates_the_slowest_is_the_trainers(tmp_path):
    rates = {"0.999": 0.1, "0.9999": 0.5}
    for step in STEPS:
        saved(tmp_path / "run" / f"net-0.5b-{step}.pt", raw(step))
        for rate, lag in rates.items():
            saved(tmp_path / "run" / f"net-0.5b_ema_{rate}_{step}.pt", weights(step - lag))
    average = open_or_pack([str(tmp_path / "run" / "net-0.5b-*.pt")], folder=tmp_path / "files").trainer_ema()
    assert average is not None
    assert average["net.weight"].unique().tolist() == [STEPS[-1] - 0.5]


def test_an_average_beside_weights_in_several_files_is_accounted_for(tmp_path):
    folder = tmp_path / "run" / "checkpoint-7"
    file = "model-00001-of-00001.safetensors"
    saved(folder / file, raw(7))
    saved(folder / "model_ema.safetensors", averaged(7))
    index = {"weight_map": dict.fromkeys(raw(7), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_run(tmp_path / "run").left_out == {folder / "model_ema.safetensors": "averages of the weights"}


@pytest.mark.parametrize("content", [b"", b"a part of a file"], ids=["empty", "truncated"])
def test_the_message_names_the_damaged_one_of_several_files(tmp_path, content):
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    part, index = folder / "model-00001-of-00001.safetensors", folder / "model.safetensors.index.json"
    part.write_bytes(content)
    index.write_text(json.dumps({"weight_map": {"weight": part.name}}))
    with pytest.raises(TrajectoryError, match=f"^{re.escape(str(part))} is (empty|truncated)"):
        read_checkpoint(folder)
