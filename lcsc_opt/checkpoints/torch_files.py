"""Files of ``torch.save``, old and new, of ``torch.jit.save``, and bare pickles: their content without the tensors."""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
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
            nested[span.start] = _read_legacy(inner) if InertUnpickler(inner).load() == _LEGACY_MAGIC else None
        return nested[span.start]

    content = InertUnpickler(stream, nested=read_nested).load()
    return _read_legacy(stream) if type(content) is int and content == _LEGACY_MAGIC else content


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
        header = bytes(data[info.header_offset : info.header_offset + 30])  # which alone tells its length
        if len(header) < 30 or not header.startswith(_ZIP_SIGNATURE):
            raise TrajectoryError(MALFORMED)
        start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        return Span(start, info.file_size if size is None else size, dtype)

    pickled = member(pickles[0], torch.uint8)
    stream = Stream(data[: pickled.start + pickled.size], pickled.start)
    return InertUnpickler(stream, storage=lambda dtype, key, size: member(f"{folder}data/{key}", dtype, size)).load()


def _read_legacy(stream: Stream) -> Any:
    """After the magic number: protocol, machine, object and keys; then each storage: its length, its bytes."""
    storages: dict[str, Span] = {}
    InertUnpickler(stream).load(), InertUnpickler(stream).load()
    content = InertUnpickler(
        stream, storage=lambda dtype, key, size: storages.setdefault(key, Span(-1, size, dtype))
    ).load()
    for key in InertUnpickler(stream).load():
        storage = storages[key] if type(key) is str and key in storages else None
        count = struct.unpack("<q", stream.read(8))[0]
        if storage is None or count * storage.dtype.itemsize < storage.size:
            raise TrajectoryError(MALFORMED)
        storage.start = stream.skip(count * storage.dtype.itemsize).start
    return content


def map_tensors(path: Path, refs: Mapping[str, TensorRef | Tensor]) -> dict[str, Tensor]:
    """The tensors of these references, mapped from the file; those whose bytes are not aligned are copied.

    Raises:
        TrajectoryError: one reaches out of its storage, or its storage out of the file.
    """
    size = path.stat().st_size
    file = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    made: dict[tuple[int, int, int], torch.UntypedStorage] = {}
    tensors = {}
    for name, ref in refs.items():
        if isinstance(ref, Tensor):
            tensors[name] = ref
            continue
        start, length, itemsize = known = (ref.storage.start, ref.storage.size, ref.dtype.itemsize)
        _check_ref(ref)
        if not 0 <= start <= start + length <= size:
            raise TrajectoryError(MALFORMED)
        if known not in made:
            mapped = file[start : start + length]
            made[known] = mapped.clone() if start % itemsize else mapped
        source: Any = made[known]
        tensors[name] = torch.empty(0, dtype=ref.dtype).set_(source, ref.offset, ref.shape, ref.stride)
    return tensors


def _check_ref(ref: TensorRef) -> None:
    numbers = (ref.offset, *ref.shape, *ref.stride)
    possible = len(ref.shape) == len(ref.stride) and all(type(n) is int and 0 <= n < 2**48 for n in numbers)
    if not possible or math.prod(ref.shape) >= 2**48:
        raise TrajectoryError("holds a tensor with an impossible shape: leave it out.")
    last = ref.offset + sum((n - 1) * stride for n, stride in zip(ref.shape, ref.stride, strict=True))
    if 0 not in ref.shape and (last + 1) * ref.dtype.itemsize > ref.storage.size:
        raise TrajectoryError("holds a tensor that reaches out of its storage: save or copy it again.")
