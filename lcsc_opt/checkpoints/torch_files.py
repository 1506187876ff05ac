"""Files of ``torch.save``, old and new, of ``torch.jit.save``, and bare pickles: their content without the tensors."""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.modules import script_weights
from lcsc_opt.checkpoints.pickles import MALFORMED, InertUnpickler, Span, Stream, TensorRef

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in files of torch < 1.6
_ZIP_SIGNATURE = b"PK\x03\x04"


def read_content(path: Path) -> Any:
    """Everything in a file except the bytes of its tensors: plain data, :class:`TensorRef` and :class:`Record`.

    Raises:
        TrajectoryError: truncated, not weights, or made to harm.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if data[:4] == _ZIP_SIGNATURE:
            return _read_zip(data, file)
    stream, nested = Stream(data), {}

    def read_nested(span: Span) -> Any:
        if span.start not in nested:
            inner = Stream(data[: span.start + span.size], span.start)
            nested[span.start] = _read_legacy(inner) if _load(inner) == _LEGACY_MAGIC else None
        return nested[span.start]

    content = InertUnpickler(stream, nested=read_nested).load()
    return _read_legacy(stream) if type(content) is int and content == _LEGACY_MAGIC else content


def _load(stream: Stream) -> Any:
    return InertUnpickler(stream).load()


def _read_zip(data: memoryview, file: BinaryIO) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OSError) as error:
        raise TrajectoryError(MALFORMED) from error
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise TrajectoryError("is a zip, but not one of torch.save: save model.state_dict().")
    folder = pickles[0].removesuffix("data.pkl")

    def member(name: str, dtype: torch.dtype, size: int | None = None) -> Span:
        info = entries.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED or (size or 0) > info.file_size:
            raise TrajectoryError(MALFORMED)
        return Span(info.header_offset, info.file_size if size is None else size, dtype, in_zip=True)

    pickled = member(pickles[0], torch.uint8)
    start = _content_start(data, pickled)
    stream = Stream(data[: start + pickled.size], start)
    load = InertUnpickler(stream, storage=lambda dtype, key, size: member(f"{folder}data/{key}", dtype, size)).load
    return script_weights(load()) if f"{folder}constants.pkl" in entries else load()


def _content_start(data: memoryview, span: Span) -> int:
    """Where the bytes of a span begin; in a zip they follow a header, which alone tells its length."""
    if not span.in_zip:
        return span.start
    header = bytes(data[span.start : span.start + 30]) if span.start >= 0 else b""
    if len(header) < 30 or not header.startswith(_ZIP_SIGNATURE):
        raise TrajectoryError(MALFORMED)
    name, extra = struct.unpack_from("<HH", header, 26)
    start: int = span.start + 30 + name + extra
    return start


def _read_legacy(stream: Stream) -> Any:
    """After the magic number: protocol, machine, object and keys; then each storage: its length, its bytes."""
    storages: dict[str, Span] = {}
    _load(stream), _load(stream)
    content = InertUnpickler(
        stream, storage=lambda dtype, key, size: storages.setdefault(key, Span(-1, size, dtype))
    ).load()
    for key in _load(stream):
        storage = storages[key] if type(key) is str and key in storages else None
        count = struct.unpack("<q", stream.read(8))[0]
        if storage is None or count * storage.dtype.itemsize < storage.size:
            raise TrajectoryError(MALFORMED)
        storage.start = stream.skip(count * storage.dtype.itemsize).start
    return content


class MappedTensors:
    """Makes tensors of :class:`TensorRef`, mapped from the file they are in."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        self._file = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        with path.open("rb") as file:
            self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._made: dict[tuple[int, int, int], torch.UntypedStorage] = {}

    def tensor(self, ref: TensorRef) -> Tensor:
        """Map one tensor; it is copied where its bytes are not aligned.

        Raises:
            TrajectoryError: it reaches out of its storage, or the storage out of the file.
        """
        numbers = (ref.offset, *ref.shape, *ref.stride)
        possible = len(ref.shape) == len(ref.stride) and all(type(n) is int and 0 <= n < 2**48 for n in numbers)
        if not possible or math.prod(ref.shape) >= 2**48:
            raise TrajectoryError("holds a tensor with an impossible shape: leave it out.")
        last = ref.offset + sum((n - 1) * stride for n, stride in zip(ref.shape, ref.stride, strict=True))
        if 0 not in ref.shape and (last + 1) * ref.dtype.itemsize > ref.storage.size:
            raise TrajectoryError("holds a tensor that reaches out of its storage: save or copy it again.")
        storage: Any = self._storage(ref.storage, ref.dtype.itemsize)
        return torch.empty(0, dtype=ref.dtype).set_(storage, ref.offset, ref.shape, ref.stride)

    def _storage(self, span: Span, itemsize: int) -> torch.UntypedStorage:
        known = (span.start, span.size, itemsize)
        if known not in self._made:
            start = _content_start(self._data, span)
            if not 0 <= start <= start + span.size <= len(self._data):
                raise TrajectoryError(MALFORMED)
            mapped = self._file[start : start + span.size]
            self._made[known] = mapped.clone() if start % itemsize else mapped
        return self._made[known]
