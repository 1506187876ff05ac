"""Tensors that are mapped from files, read while the files are looked at again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.pickles import WRITTEN_OVER

PIECE = 2**22  # scalars that are read between two looks at the file


def size_and_time(path: Path) -> tuple[int, int]:
    """The bytes of a checkpoint's files, and the latest of their times in nanoseconds.

    Raises:
        TrajectoryError: one cannot be read.
    """
    try:
        states = [file.stat() for file in (path, *path.rglob("*")) if file.is_file()]
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read: {error.strerror}.") from error
    return sum(state.st_size for state in states), max((state.st_mtime_ns for state in states), default=0)


class FileState:
    """The size and time of a checkpoint's files, as they were before it was read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = size_and_time(path)

    def check(self) -> None:
        """Refuse files that are not as they were.

        Raises:
            TrajectoryError: one was written over, cut or removed.
        """
        if size_and_time(self._path) != self._before:
            raise TrajectoryError(WRITTEN_OVER)


class Watched(Mapping[str, Tensor]):
    """Copies of mapped tensors, each made when it is asked for, a piece after the other.

    To read a page of a map behind the end of its file, which was cut meanwhile, ends the process. So the file is looked
    at before each piece; nothing in Python can do more.
    """

    def __init__(self, tensors: Mapping[str, Tensor], file: FileState) -> None:
        self._tensors = tensors
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        mapped = self._tensors[name]
        self._file.check()
        if mapped.numel() <= PIECE or not mapped.is_contiguous():
            return mapped.clone()
        copied = torch.empty_like(mapped)
        for start in range(0, mapped.numel(), PIECE):
            self._file.check()
            copied.view(-1)[start : start + PIECE] = mapped.view(-1)[start : start + PIECE]
        return copied

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
