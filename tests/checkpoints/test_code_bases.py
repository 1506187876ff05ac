"""Where public code bases keep their weights, beyond the one example of each in ``docs/reference.md``."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.order import checkpoint_steps
from lcsc_opt.checkpoints.reading import read_checkpoint
from tests.checkpoints.checkpoint_examples import net, optimizer_state, saved, weights
from tests.trajectory.trajectory_examples import same_bits

MODEL, EMA = weights(1), weights(2)


def test_ddim_without_an_average(tmp_path):
    path = saved(tmp_path / "ckpt.pth", [MODEL, optimizer_state(), 3, 4000])
    assert read_checkpoint(path).key == "model"
    assert same_bits(read_checkpoint(path).tensors, MODEL)
    assert checkpoint_steps([path])[0] == 4000


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), net(1)])
def test_averages_without_names_get_those_of_the_model_and_its_buffers(tmp_path, model):
    shadow = [parameter.detach() + 1 for parameter in model.parameters()]
    state = {"sigmas": torch.ones(7), **model.state_dict()}  # score_sde's models begin with a buffer
    content = {"model": state, "ema": {"decay": 0.9, "num_updates": 1, "shadow_params": shadow}}
    found = read_checkpoint(saved(tmp_path / "m.pth", content)).tensors
    expected = {name: parameter.detach() + 1 for name, parameter in model.named_parameters()}
    assert same_bits(found, {**state, **expected})


@pytest.mark.parametrize(
    "shadow",
    [
        [torch.ones(2), torch.ones(2)],  # one of three entries is left out, but which?
        [torch.ones(2), torch.ones(3)],  # fits nothing
        [torch.ones(2)] * 4,  # more than the model has
        [torch.ones(2), "x", torch.ones(2)],
    ],
)
def test_averages_that_do_not_fit_in_one_way_are_refused(tmp_path, shadow):
    model = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    path = saved(tmp_path / "m.pth", {"model": model, "ema": {"shadow_params": shadow}})
    with pytest.raises(TrajectoryError, match=r"exactly one way.*--key model"):
        read_checkpoint(path)
    assert same_bits(read_checkpoint(path, key="model").tensors, model)


def test_accelerate_folder_by_key(tmp_path):
    folder = tmp_path / "checkpoint_7"
    saved(folder / "model.safetensors", MODEL)
    saved(folder / "model_1.safetensors", EMA)
    saved(folder / "custom_checkpoint_0.pkl", {"step": 3, "model": EMA, "ema": MODEL})
    saved(folder / "optimizer.bin", optimizer_state())
    custom = "custom_checkpoint_0"
    for key, found, expected in (
        (None, "", MODEL),
        ("model_1", "model_1", EMA),
        (custom, f"{custom}.ema", MODEL),
        (f"{custom}.ema", f"{custom}.ema", MODEL),
        (f"{custom}.model", f"{custom}.model", EMA),
    ):
        assert read_checkpoint(folder, key=key).key == found
        assert same_bits(read_checkpoint(folder, key=key).tensors, expected)
    assert checkpoint_steps([folder])[0] == 7
    for key in ("model_2", "../checkpoint_7", "model_1.x.y", "optimizer"):
        with pytest.raises(TrajectoryError, match="checkpoint_7"):
            read_checkpoint(folder, key=key)


@pytest.mark.parametrize(
    ("suffix", "wrapper"), [("safetensors", ""), ("bin", ""), ("safetensors", "_orig_mod."), ("safetensors", "module.")]
)
def test_weights_in_several_files(tmp_path, suffix, wrapper):
    stem = "pytorch_model" if suffix == "bin" else "model"
    names = list(MODEL)
    parts = {f"{stem}-00001-of-00002.{suffix}": names[:3], f"{stem}-00002-of-00002.{suffix}": names[3:]}
    for file, part in parts.items():
        saved(tmp_path / "checkpoint-3" / file, {wrapper + name: MODEL[name] for name in part})
    where = {wrapper + name: file for file, part in parts.items() for name in part}
    path = tmp_path / "checkpoint-3" / f"{stem}.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for source in (tmp_path / "checkpoint-3", path):
        assert same_bits(read_checkpoint(source).tensors, MODEL)
    path.write_text(json.dumps({"weight_map": {**where, "more": f"{stem}-00001-of-00002.{suffix}"}}))
    with pytest.raises(TrajectoryError, match="'more', which is not in"):
        read_checkpoint(path)
