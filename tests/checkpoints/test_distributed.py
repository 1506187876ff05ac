"""Folders of torch.distributed.checkpoint that are whole, broken, or made to harm."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.finding import find_checkpoints
from lcsc_opt.checkpoints.reading import read_checkpoint
from tests.checkpoints.checkpoint_examples import weights, write_distributed
from tests.trajectory.trajectory_examples import same_bits

MODEL = {**weights(1), "bfloat": torch.arange(10.0).to(torch.bfloat16), "empty": torch.zeros(0, 3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_distributed(tmp_path / "step-7", {"state": {"model": MODEL}, "optim": {"a": torch.ones(3)}})
    return tmp_path / "step-7"


def test_tensors_in_parts_are_put_together_and_optimizers_left_out(folder: Path, tmp_path: Path) -> None:
    read = read_checkpoint(folder, key="state.model")
    assert same_bits(read.tensors, MODEL)
    assert read.key == "state.model"
    write_distributed(tmp_path / "flat", {**MODEL, "optimizer.state.exp_avg": torch.ones(3), "args": {"lr": 0.1}})
    assert same_bits(read_checkpoint(tmp_path / "flat").tensors, MODEL)  # as Megatron-LM and torchtitan name them


def test_parts_may_be_safetensors(tmp_path: Path) -> None:
    model = {name: tensor for name, tensor in MODEL.items() if tensor.ndim == 0}
    write_distributed(tmp_path / "a", {"model": model}, serialization_format=SerializationFormat.SAFETENSORS)
    assert same_bits(read_checkpoint(tmp_path / "a").tensors, model)


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def changed(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Replaces ``.metadata`` by what ``change`` makes of it."""

    def replace(folder: Path) -> None:
        metadata = folder / ".metadata"
        with metadata.open("rb") as file:
            known = pickle.load(file)
        made = change(known)
        metadata.write_bytes(pickle.dumps(known if made is None else made))

    return replace


def first(known: Any, **changes: Any) -> None:
    for at in known.storage_data.values():
        vars(at).update(changes)


def larger(known: Any) -> None:
    for tensor in known.state_dict_metadata.values():
        tensor.size = torch.Size([2**40])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), r"\.metadata does not exist"),
    "no file": (lambda folder: (folder / "__0_1.distcp").unlink(), "names __0_1.distcp, which does not exist"),
    "cut file": (lambda folder: os.truncate(folder / "__0_0.distcp", 900), "truncated"),
    "no parts": (changed(lambda known: known.storage_data.clear()), "does not say where"),
    "half": (changed(lambda known: known.state_dict_metadata["state.model.bfloat"].chunks.clear()), "lacks parts of"),
    "elsewhere": (changed(lambda known: first(known, relative_path="../secret")), "not weights"),
    "another part": (changed(lambda known: first(known, offset=0)), "not weights"),
    "too large": (changed(larger), "larger tensors than its files"),
    "code": (changed(lambda known: setattr(known, "storage_meta", Harm(Path("ran")))), ""),
    "code alone": (changed(lambda _: Harm(Path("ran"))), "not weights"),
    "code as a part": (
        lambda folder: (folder / "__0_0.distcp").write_bytes(pickle.dumps(Harm(Path("ran"))) + bytes(9000)),
        "not weights",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_or_made_to_harm_is_one_line_and_nothing_runs(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("secret").write_bytes(b"PK")
    harm, message = BROKEN[name]
    harm(folder)
    assert find_checkpoints(folder.parent) == [folder]
    if message:
        with pytest.raises(TrajectoryError, match=f"step-7.*{message}") as caught:
            read_checkpoint(folder, key="state.model")
        assert "\n" not in str(caught.value)
    else:
        assert same_bits(read_checkpoint(folder, key="state.model").tensors, MODEL)
    assert not Path("ran").exists()
