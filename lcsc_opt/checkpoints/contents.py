"""The types that a pickle is turned into: plain data, inert records of foreign objects, and tensors not yet read."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHOWN = 80  # characters of a text from a file that a message may repeat


class Refused(Exception):  # noqa: N818 (the caller knows the path and makes an error of it)
    """What is wrong with a file and what to do; the caller puts the path before it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(slots=True, eq=False)
class Record:
    """What a file says about an object of a class, or about the result of a call; neither is ever made.

    Attributes:
        name: the class or function.
        args: what it would have been called with.
        state: what its ``__setstate__`` would have got.
        items: what would have been put into it by key; ``elements``, by appending.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] | None = None
    elements: list[Any] | None = None


@dataclasses.dataclass(slots=True, eq=False)
class Span:
    """Bytes of the file that were not copied: ``[start, stop)``."""

    start: int
    stop: int


@dataclasses.dataclass(slots=True, eq=False)
class StorageRef:
    """A tensor's memory as it lies in the file: ``size`` bytes from ``start``, to be read as ``dtype``."""

    dtype: torch.dtype
    size: int
    start: int = -1  # not known yet: storages of old files come after the objects


@dataclasses.dataclass(slots=True, eq=False)
class TensorRef:
    """A tensor that was not read yet; ``offset`` and ``stride`` count elements."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class MappedTensors:
    """Makes tensors of :class:`TensorRef`, mapped from the file they are in."""

    def __init__(self, path: Path) -> None:
        self._size = path.stat().st_size
        self._file = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=self._size)
        self._made: dict[tuple[int, int, int], torch.UntypedStorage] = {}

    def tensor(self, ref: TensorRef) -> Tensor:
        """Map one tensor; it is copied where its bytes are not aligned.

        Raises:
            Refused: it reaches out of its storage, or the storage out of the file.
        """
        _check_layout(ref)
        tensor = torch.empty(0, dtype=ref.dtype)
        storage: Any = self._storage(ref.storage, ref.dtype.itemsize)
        return tensor.set_(storage, ref.offset, ref.shape, ref.stride)

    def _storage(self, ref: StorageRef, itemsize: int) -> torch.UntypedStorage:
        if ref.start < 0 or ref.start + ref.size > self._size:
            raise Refused("is truncated: save or copy it again, or leave it out.")
        found = self._made.get((ref.start, ref.size, itemsize))
        if found is None:
            found = self._file[ref.start : ref.start + ref.size]
            if ref.start % itemsize:
                found = found.clone()
            self._made[ref.start, ref.size, itemsize] = found
        return found


def _check_layout(ref: TensorRef) -> None:
    numbers = (ref.offset, *ref.shape, *ref.stride)
    if len(ref.shape) != len(ref.stride):
        raise Refused("holds a tensor whose shape and stride do not fit each other: leave it out.")
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise Refused("holds a tensor with an impossible shape: leave it out.")
    if 0 in ref.shape:
        reach = 0
    else:
        reach = 1 + ref.offset + sum((n - 1) * stride for n, stride in zip(ref.shape, ref.stride, strict=True))
    if reach * ref.dtype.itemsize > ref.storage.size:
        raise Refused("holds a tensor that reaches out of its storage: save or copy it again, or leave it out.")
    if math.prod(ref.shape) >= 2**48:
        raise Refused("holds a tensor with an impossible shape: leave it out.")


def is_tensor(value: object) -> bool:
    """Whether ``value`` is a tensor, or the reference to one."""
    return isinstance(value, (Tensor, TensorRef))


def shown(text: object) -> str:
    """A text out of a file, made fit for one line of a message."""
    line = str(text.name if isinstance(text, Record) else text)[: SHOWN + 1]
    line = line.encode("unicode_escape", "replace").decode("ascii")
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"


def kind(value: object) -> str:
    """What a value is, in words for a message."""
    if isinstance(value, Record):
        return f"a {shown(value.name)}"
    if is_tensor(value):
        return "a Tensor"
    names = {"dict": "dict", "Span": "bytes", "Name": "class"}
    return f"a {names.get(type(value).__name__, type(value).__name__)}"
