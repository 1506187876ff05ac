"""A trainer's file with other weights, which holds what else the trainer's own loader asks for."""

from __future__ import annotations

import argparse
import datetime
import decimal
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.checkpoints.rewriting import Document, with_weights

WEIGHTS = {"layer.weight": torch.full((2, 2), 7.0), "layer.bias": torch.full((2,), 8.0)}


def filled(value: float, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}": torch.full_like(tensor, value) for name, tensor in WEIGHTS.items()}


def zeros(prefix: str = "") -> dict[str, Tensor]:
    return filled(0, prefix)


def rewritten(path: Path, content: Any) -> Document:
    """The content with ``WEIGHTS``, in a file at ``path``, and as it is loaded from there."""
    last = path.with_name(f"last-{path.name}")
    torch.save(content, last)
    document = with_weights(last, read_checkpoint(last).key, WEIGHTS)
    with path.open("wb") as file:
        document.write(file)
    return document._replace(entries=torch.load(path, weights_only=False))


def assert_replaced(loaded: dict[str, Tensor], prefix: str = "") -> None:
    expected = {f"{prefix}{name}": tensor for name, tensor in WEIGHTS.items()}
    torch.testing.assert_close({name: loaded[name] for name in expected}, expected)


def test_lightning(tmp_path: Path) -> None:
    """What ``load_from_checkpoint`` reads, and the state of Adam, which ``fit(ckpt_path=…)`` reads."""
    adam = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 2)}},
        "param_groups": [{"betas": (0.9, 1)}],
    }
    content = {
        "epoch": 3,
        "global_step": 30,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": zeros("net."),
        "hyper_parameters": {"lr": 0.01, "path": Path("data")},
        "optimizer_states": [adam],
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5)}},
    }
    torch.save(content, tmp_path / "last.ckpt")
    weights = {f"net.{name}": tensor for name, tensor in WEIGHTS.items()}
    document = with_weights(tmp_path / "last.ckpt", "state_dict", weights)
    with (tmp_path / "best.ckpt").open("wb") as file:
        document.write(file)
    loaded = torch.load(tmp_path / "best.ckpt", weights_only=False)
    assert_replaced(loaded["state_dict"], "net.")
    assert loaded["hyper_parameters"] == content["hyper_parameters"], "with the path, which is no plain data"
    torch.testing.assert_close(loaded["optimizer_states"], [adam])
    rest = ("epoch", "global_step", "pytorch-lightning_version", "callbacks")
    assert {name: loaded[name] for name in rest} == {name: content[name] for name in rest}


def test_timm_has_the_weights_in_the_model_and_in_its_average(tmp_path: Path) -> None:
    content = {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": zeros("module."),
        "state_dict_ema": zeros(),
        "args": argparse.Namespace(lr=0.1),
        "metric": 71.5,
    }
    document = rewritten(tmp_path / "best.pth.tar", content)
    assert not document.left_out
    assert document.entries.keys() == content.keys()
    assert document.entries["args"] == content["args"]
    assert_replaced(document.entries["state_dict"], "module.")
    assert_replaced(document.entries["state_dict_ema"])


@pytest.mark.parametrize(
    "content",
    [
        {"model": zeros(), "ema": {"shadow_params": [*zeros().values()], "decay": 0.999}, "step": 3},
        {
            "epoch": 1,
            "state_dict": {**zeros("model."), **zeros("model_ema."), "model_ema.num_updates": torch.tensor(3)},
        },
        {"step": 1, "ema": {**zeros("online_model."), **zeros("ema_model."), "initted": torch.tensor(True)}},
        {"step": 1, "model": {"layer": {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, "rest": {"x": {}}}},
        {"step": 1, "model": {name.replace("layer", "layer._orig_mod"): tensor for name, tensor in zeros().items()}},
    ],
    ids=["list", "prefixes", "wrappers", "nested", "compiled"],
)
def test_wherever_the_weights_are_they_are_read_again(tmp_path: Path, content: Any) -> None:
    document = rewritten(tmp_path / "best.pt", content)
    torch.testing.assert_close(read_checkpoint(tmp_path / "best.pt").tensors, WEIGHTS)
    assert not document.left_out
    for key in {"model", "state_dict"} & content.keys():
        assert all(tensor.min() > 6 for name, tensor in content_tensors(document.entries[key]) if "layer" in name)


def content_tensors(entries: Any, name: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(entries, Tensor):
        return [(name, entries)]
    return [found for key, value in entries.items() for found in content_tensors(value, f"{name}.{key}")]


def test_nothing_but_the_chosen_weights_and_their_averages_is_replaced(tmp_path: Path) -> None:
    """Not Adam's moments by name, nor a teacher, a Fisher matrix or a constant average of another step."""
    for step in (1, 2):
        content = {
            "model": filled(step),
            "ema": {"decay": torch.tensor(0.9), "shadow": filled(step + 0.5)},
            "optimizer": {"exp_avg": filled(0.1), "exp_avg_sq": filled(0.2)},
            "teacher": filled(-7),
            "fisher": filled(7),
            "ema_frozen": filled(3),
        }
        torch.save(content, tmp_path / f"{step}.pt")
    for key in ("model", "ema.shadow", "ema"):
        document = with_weights(tmp_path / "2.pt", key, WEIGHTS, earlier=tmp_path / "1.pt")
        assert sorted(name.partition(".")[0] for name in document.replaced) == ["ema", "model"]
        assert_replaced(document.entries["model"])
        assert_replaced(document.entries["ema"]["shadow"])
        for name in ("optimizer", "teacher", "fisher", "ema_frozen"):
            torch.testing.assert_close(document.entries[name], content[name])


def test_an_average_in_a_list_is_replaced_whatever_its_name_is(tmp_path: Path) -> None:
    torch.save({"model": filled(1), "ema_params": [*filled(2).values()], "log": [torch.ones(2)]}, tmp_path / "m.pt")
    document = with_weights(tmp_path / "m.pt", "model", WEIGHTS)
    torch.testing.assert_close(document.entries["ema_params"], [*WEIGHTS.values()])
    torch.testing.assert_close(document.entries["log"], [torch.ones(2)])


@pytest.mark.parametrize(
    ("sign", "raw_key", "raw"),
    [
        ("message_hub", "ema_state_dict", {**filled(2, "module."), "steps": torch.tensor(580)}),  # mmengine's EMAHook
        ("current_model_state", "current_model_state", filled(2, "module.")),  # Lightning's WeightAveraging
    ],
)
def test_a_trainer_that_saves_its_average_as_the_model(tmp_path: Path, sign: str, raw_key: str, raw: Any) -> None:
    document = rewritten(tmp_path / "best.pt", {sign: {}, "state_dict": filled(1), raw_key: raw})
    assert sorted(document.replaced) == sorted(["state_dict", raw_key])
    assert_replaced(document.entries["state_dict"])
    rewritten_raw = document.entries[raw_key]
    assert_replaced(rewritten_raw, "module.")
    assert list(rewritten_raw) == list(raw)  # with mmengine's counter
    assert "steps" not in raw or int(rewritten_raw["steps"]) == 580


def test_where_a_part_of_the_weights_is_merged_that_part_of_their_average_is_replaced(tmp_path: Path) -> None:
    """As of a network in a Lightning module, beside a discriminator of the same shapes."""
    for key, average in (("model", "ema"), ("current_model_state", "state_dict")):
        content = {
            key: {**filled(1, "disc."), **filled(1, "net.")},
            average: {**filled(2, "disc."), **filled(2, "net.")},
        }
        torch.save(content, tmp_path / "last.pt")
        for chosen, other in ((key, average), (average, key)):
            document = with_weights(tmp_path / "last.pt", f"{chosen}.net", WEIGHTS)
            assert document.replaced == [f"{chosen}.net", f"{other}.net"]
            for name in (key, average):
                assert_replaced(document.entries[name], "net.")
                assert float(document.entries[name]["disc.layer.bias"][0]) == float(content[name]["disc.layer.bias"][0])


def test_a_key_around_the_weights_replaces_them_and_their_average(tmp_path: Path) -> None:
    torch.save({"model": {"net": filled(1)}, "ema": {"net": filled(2)}, "epoch": 3}, tmp_path / "last.pt")
    weights = {f"net.{name}": tensor for name, tensor in WEIGHTS.items()}
    document = with_weights(tmp_path / "last.pt", "model", weights)
    for name in ("model", "ema"):
        assert_replaced(document.entries[name]["net"])


def test_what_is_more_than_plain_data_stays_bit_for_bit(tmp_path: Path) -> None:
    """As scvi-tools' names and registries, ultralytics' network, and weights that are views of one storage."""
    both = torch.zeros(6)
    contents: dict[str, dict[str, Any]] = {
        "arrays": {"model_state_dict": {**zeros(), "store": {}}, "names": np.array(["a", "b"], dtype=object)},
        "network": {"model": torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2)}), "date": datetime.date(2026, 1, 1)},
        "views": {
            "model": {"layer.weight": both[:4].view(2, 2).t(), "layer.bias": both[4:]},
            "rate": decimal.Decimal("0.1"),
        },
    }
    for name, content in contents.items():
        document = rewritten(tmp_path / f"{name}.pt", content)
        assert not document.left_out
        loaded = document.entries
        model = loaded.get("model", loaded.get("model_state_dict"))
        assert_replaced(dict(getattr(model, "state_dict", lambda model=model: model)()))
        for other in content.keys() - {"model", "model_state_dict"}:
            assert np.array_equal(loaded[other], content[other])
        with zipfile.ZipFile(tmp_path / f"{name}.pt") as archive:
            assert archive.testzip() is None, "its checksums are those of the new weights"


def test_an_archive_keeps_its_other_files(tmp_path: Path) -> None:
    """As of stable-baselines3."""
    for name, value in (("first.zip", 1.0), ("last.zip", 2.0)):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("data", '{"gamma": 0.9}')
            for member, content in (("policy.pth", filled(value)), ("policy.optimizer.pth", {"state": filled(value)})):
                with archive.open(member, "w") as file:
                    torch.save(content, file)
    document = with_weights(tmp_path / "last.zip", "policy", WEIGHTS, earlier=tmp_path / "first.zip")
    with (tmp_path / "best.zip").open("wb") as file:
        document.write(file)
    with zipfile.ZipFile(tmp_path / "best.zip") as archive:
        assert archive.testzip() is None
        assert archive.read("data") == b'{"gamma": 0.9}'
        assert_replaced(torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True))
        optimizer = torch.load(io.BytesIO(archive.read("policy.optimizer.pth")), weights_only=True)
    torch.testing.assert_close(optimizer, {"state": filled(2)})
    torch.testing.assert_close(read_checkpoint(tmp_path / "best.zip").tensors, WEIGHTS)


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    """A network in another dtype; and a file that was replaced since it was packed."""
    half = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2)}).half()
    torch.save({"epoch": 3, "model": half}, tmp_path / "last.pt")
    with pytest.raises(TrajectoryError, match=r"last\.pt has weights of another dtype"):
        with_weights(tmp_path / "last.pt", "model", WEIGHTS)
    torch.save({"epoch": 3, "model": {"other": torch.ones(3)}}, tmp_path / "last.pt")
    with pytest.raises(TrajectoryError, match="the weights of another model"):
        with_weights(tmp_path / "last.pt", "model", WEIGHTS)
    with pytest.raises(TrajectoryError, match="does not exist"):
        with_weights(tmp_path / "first.pt", "model", WEIGHTS)
