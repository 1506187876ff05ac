"""Snapshots of EDM and EDM2: the weights that unpickling would give, without unpickling."""

from __future__ import annotations

import pytest
import torch

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.reading import raw_and_averages, read_checkpoint, read_init_arguments
from tests.checkpoints import nvlabs_examples
from tests.trajectory.trajectory_examples import same_bits


@pytest.fixture
def snapshot(tmp_path):
    path = tmp_path / "network-snapshot-000100.pkl"
    nvlabs_examples.write_snapshot(path, nvlabs_examples.network(1), net=nvlabs_examples.network(2))
    return path


def test_weights_are_those_of_the_unpickled_network(snapshot):
    unpickled = nvlabs_examples.unpickled_the_usual_way(snapshot)
    for key in ("ema", "net"):
        expected = unpickled[key].state_dict()
        found = read_checkpoint(snapshot, key=key).tensors
        assert list(found) == list(expected)  # the same names, in the same order
        assert same_bits(found, expected)
    assert "tied.weight" in found
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in found.values())  # wherever the pickle has them
    assert not any("scratch" in name or name == "bias" for name in found)  # what state_dict() leaves out


def test_training_states(tmp_path):
    """EDM's have the network in them; EDM2's plain dicts, and a list with the average of each width."""
    path = tmp_path / "training-state-000100.pt"
    written = nvlabs_examples.write_training_state(path, nvlabs_examples.network(1))
    assert read_checkpoint(path).key == "net"
    assert same_bits(read_checkpoint(path).tensors, written)
    net, first, second = (dict(nvlabs_examples.network(seed).state_dict()) for seed in (1, 2, 3))
    ema = {"stds": [0.05, 0.1], "emas": [first, second]}
    state = nvlabs_examples.EasyDict(cur_nimg=100_000, total_elapsed_time=1.0)
    path = tmp_path / "training-state-0000100.pt"
    with nvlabs_examples.nvlabs_modules():
        torch.save({"state": state, "net": net, "loss_fn": {}, "optimizer": None, "ema": ema}, path)
    with pytest.raises(TrajectoryError, match=r"several state dicts \(ema\.emas\.0, ema\.emas\.1\): choose one"):
        read_checkpoint(path)
    assert raw_and_averages(path) == ("net", ["ema.emas.0", "ema.emas.1"])
    assert same_bits(read_checkpoint(path, key="net").tensors, net)
    assert same_bits(read_checkpoint(path, key="ema.emas.1").tensors, second)


def test_init_arguments_are_plain_data_of_a_network(snapshot, tmp_path):
    assert read_init_arguments(snapshot) == {
        "class_name": "Precond",
        "init_args": [4],
        "init_kwargs": {"label_dim": 10, "channel_mult": [1, 2], "nested": {"rate": 0.5, "on": None}},
    }
    torch.save({"ema": {"w": torch.ones(2)}}, tmp_path / "m.pt")
    with pytest.raises(TrajectoryError, match=r"no network of NVlabs' code under 'ema'"):
        read_init_arguments(tmp_path / "m.pt")
