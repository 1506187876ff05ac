"""Tensors that are mapped from files, copied while the files are looked at again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.pickles import WRITTEN_OVER

PIECE = 2**22  # scalars that are read between two looks at the file


def size_and_time(path: Path) -> tuple[int, int]:
    """The size of a checkpoint, a file or a folder, in bytes, and the time of its latest change in nanoseconds.

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
        self._copied = PIECE  # scalars since the last look at the files; so many that the first copy looks again

    def check(self) -> None:
        """Refuse files that are not as they were.

        Raises:
            TrajectoryError: one was written over, cut or removed.
        """
        self._copied = 0
        if size_and_time(self._path) != self._before:
            raise TrajectoryError(WRITTEN_OVER)

    def copy(self, place: Tensor, mapped: Tensor) -> None:
        """Copy ``mapped``, a tensor out of these files, into ``place`` of the same shape, a piece after the other.

        To read a page of a map behind the end of its file, which was cut meanwhile, ends the process. So the files are
        looked at between pieces; nothing in Python can do more.

        Raises:
            TrajectoryError: as :meth:`check`.
        """
        if mapped.numel() <= PIECE or not mapped.is_contiguous():  # the latter has no flat view to be cut
            pieces = [(place, mapped)]
        else:
            pieces = list(zip(torch.split(place.view(-1), PIECE), torch.split(mapped.view(-1), PIECE), strict=True))
        for to, piece in pieces:
            if self._copied + piece.numel() > PIECE:
                self.check()
            to.copy_(piece)
            self._copied += piece.numel()
