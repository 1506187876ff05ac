"""A file that is cut while its tensors are read from a map."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints import watched
from lcsc_opt.checkpoints.reading import read_checkpoint
from lcsc_opt.checkpoints.watched import FileState


def test_a_large_tensor_is_copied_in_pieces_and_the_file_is_looked_at_before_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.pt"
    tensors = {"w": torch.randn(100, 7), "turned": torch.randn(5, 3).t(), "empty": torch.empty(0)}
    torch.save(tensors, path)
    monkeypatch.setattr(watched, "PIECE", 64)
    mapped = read_checkpoint(path).tensors
    copies = {name: torch.empty(tensor.shape) for name, tensor in mapped.items()}
    file = FileState(path)
    for name, tensor in mapped.items():
        file.copy(copies[name], tensor)
    torch.testing.assert_close(copies, tensors)
    looks = []

    class Cut(FileState):
        def check(self) -> None:
            looks.append(path.stat().st_size)
            super().check()
            if len(looks) == 3:
                os.truncate(path, 1)

    with pytest.raises(TrajectoryError, match="was written over while it was read"):
        Cut(path).copy(copies["w"], mapped["w"])
    assert len(looks) == 4
