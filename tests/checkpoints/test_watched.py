"""A file that is written over while its tensors are read from a map."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.checkpoints.watched import PIECE, FileState


def test_a_large_tensor_is_copied_in_pieces_and_the_file_is_looked_at_before_each(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    large = torch.arange(250, dtype=torch.uint8).repeat(9 * PIECE // 500)
    tensors = {"w": large, "turned": torch.randn(5, 3).t(), "empty": torch.empty(0)}
    torch.save(tensors, path)
    mapped = read_checkpoint(path).tensors
    copies = {name: torch.empty_like(tensor) for name, tensor in mapped.items()}
    file = FileState(path)
    for name, tensor in mapped.items():
        file.copy(copies[name], tensor)
    assert all(torch.equal(copies[name], tensor) for name, tensor in tensors.items())
    looks = []

    class WrittenOver(FileState):
        def check(self) -> None:
            looks.append(path.stat().st_size)
            super().check()
            if len(looks) == 2:
                os.truncate(path, looks[0] + 1)  # a shorter file could end this process

    copy = torch.zeros_like(large)
    with pytest.raises(TrajectoryError, match="was written over while it was read"):
        WrittenOver(path).copy(copy, mapped["w"])
    assert torch.equal(copy[: 2 * PIECE], large[: 2 * PIECE])
    assert not copy[2 * PIECE :].any()
