"""Files of ``torch.save``, old and new, of ``torch.jit.save``, and bare pickles: their content without the tensors.

``torch.load(weights_only=True)`` is not used, for three reasons. It refuses files in which a class of Lightning,
argparse or NVlabs stands beside the weights. A few bytes can make it allocate or hash without end. It makes the
optimizer's tensors, too. Here :class:`~lcsc_opt.checkpoints.pickles.InertUnpickler` reads the pickle within bounds, and
only the tensors that are wanted are mapped from the file.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lcsc_opt.checkpoints.contents import Name, Refused, Span, StorageRef
from lcsc_opt.checkpoints.pickles import MALFORMED, Budget, InertUnpickler
from lcsc_opt.checkpoints.torch_objects import STORAGE_TYPES
from lcsc_opt.checkpoints.torchscript import script_weights

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in files of torch < 1.6
LEGACY_PROTOCOL = 1001
MAX_DIRECTORY = 8 * 2**20  # bytes of a zip's directory: some 100,000 tensors
MAX_KEY = 100  # characters of a storage's name, which is a number
ZIP_SIGNATURE = b"PK\x03\x04"


def read_content(path: Path, *, locate: bool = True) -> Any:
    """Everything in a file except the bytes of its tensors: plain data, :class:`TensorRef` and :class:`Record`.

    Args:
        path: the file.
        locate: also find where the bytes of each tensor are, which takes a read for each; not needed for the plain
            data alone.

    Raises:
        Refused: truncated, not weights, or made to harm.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if bytes(data[:4]) == ZIP_SIGNATURE:
            return _read_zip(data, _entries(data, file), locate=locate)
    return _read_stream(data)


class _SmallReads:
    """A file whose reads are limited: :mod:`zipfile` reads a zip's directory at once, whatever size it claims."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(min(size, MAX_DIRECTORY + 1) if size >= 0 else MAX_DIRECTORY + 1)
        if len(block) > MAX_DIRECTORY:
            raise Refused(MALFORMED)
        return block


def _entries(data: memoryview, file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The entries of a zip by name, without the program of ``torch.jit.save``.

    Torch stores all other entries without compression, so a compressed one is refused.
    """
    try:
        with zipfile.ZipFile(_SmallReads(file)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OSError) as error:
        raise Refused(MALFORMED) from error
    entries: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in infos:
        if info.filename.partition("/")[2].startswith("code/"):
            continue
        total += info.file_size
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if not stored or total > len(data) or info.filename in entries:
            raise Refused("is no file of torch.save: its entries are compressed, or claim more than the file holds.")
        entries[info.filename] = info
    return entries


def _span(data: memoryview, info: zipfile.ZipInfo) -> Span:
    """The bytes of one entry: they follow the entry's own header, which alone tells its length."""
    header = info.header_offset
    if header < 0 or bytes(data[header : header + 4]) != ZIP_SIGNATURE or header + 30 > len(data):
        raise Refused(MALFORMED)
    name, extra = struct.unpack_from("<HH", data, header + 26)
    start = header + 30 + name + extra
    if start + info.file_size > len(data):
        raise Refused(MALFORMED)
    return Span(start, start + info.file_size)


def _bytes(data: memoryview, span: Span) -> bytes:
    return bytes(data[span.start : span.stop])


def _read_zip(data: memoryview, entries: dict[str, zipfile.ZipInfo], *, locate: bool) -> Any:
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise Refused("is a zip, but not one of torch.save: save model.state_dict().")
    folder = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{folder}byteorder")
    if order and _bytes(data, _span(data, order)) != b"little":
        raise Refused("was saved on a big-endian machine: save it again on this one.")

    def storage(identity: tuple[Any, ...]) -> StorageRef:
        dtype, key, count = _storage_identity(identity)
        entry = entries.get(f"{folder}data/{key}")
        size = count * dtype.itemsize
        if entry is None or size > entry.file_size:
            raise Refused(MALFORMED)
        return StorageRef(dtype, size, _span(data, entry).start) if locate else StorageRef(dtype, size)

    span = _span(data, entries[pickles[0]])
    content = InertUnpickler(data[: span.stop], span.start, Budget(), storage=storage).load()
    return script_weights(content) if f"{folder}constants.pkl" in entries else content


def _storage_identity(identity: tuple[Any, ...]) -> tuple[torch.dtype, str, int]:
    """dtype, key and number of elements out of ``("storage", type, key, location, count, ...)``."""
    if len(identity) < 5 or identity[0] != "storage" or type(identity[1]) is not Name:
        raise Refused(MALFORMED)
    dtype, key, count = STORAGE_TYPES.get(identity[1].name), identity[2], identity[4]
    if dtype is None or type(key) is not str or len(key) > MAX_KEY or type(count) is not int or not 0 <= count < 2**48:
        raise Refused(MALFORMED)
    return dtype, key, count


def _read_stream(data: memoryview) -> Any:
    """A file that starts with a pickle: of torch < 1.6, or of ``pickle.dump``."""
    budget = Budget()
    nested: dict[int, StorageRef] = {}

    def read_nested(span: Span) -> StorageRef:
        if span.start not in nested:
            content = _read_legacy(data[: span.stop], span.start, budget)
            if type(content) is not StorageRef:
                raise Refused(MALFORMED)
            nested[span.start] = content
        return nested[span.start]

    content = InertUnpickler(data, 0, budget, nested=read_nested).load()
    if type(content) is int and content == LEGACY_MAGIC:
        return _read_legacy(data, 0, budget)
    return content


def _read_legacy(data: memoryview, start: int, budget: Budget) -> Any:
    """Five pickles (magic, protocol, machine, object, keys), then each storage: its length, its bytes."""
    storages: dict[str, StorageRef] = {}
    views: list[tuple[StorageRef, StorageRef, int]] = []

    def storage(identity: tuple[Any, ...]) -> StorageRef:
        dtype, key, count = _storage_identity(identity)
        root = storages.setdefault(key, StorageRef(dtype, count * dtype.itemsize))
        view = identity[5] if len(identity) > 5 else None
        if view is None:
            return root
        _, offset, length = view
        if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= count:
            raise Refused(MALFORMED)
        part = StorageRef(dtype, length * dtype.itemsize)
        views.append((part, root, offset * dtype.itemsize))
        return part

    values = []
    for _ in range(5):
        reader = InertUnpickler(data, start, budget, storage=storage)
        values.append(reader.load())
        start = reader.position
    magic, protocol, machine, content, keys = values
    little = isinstance(machine, dict) and machine.get("little_endian")
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not little or type(keys) is not list:
        raise Refused(MALFORMED)
    _place(data, start, keys, storages)
    for part, root, offset in views:
        part.start = root.start + offset
    return content


def _place(data: memoryview, start: int, keys: list[Any], storages: dict[str, StorageRef]) -> None:
    for key in keys:
        found = storages.get(key) if type(key) is str else None
        if found is None or found.start >= 0 or start + 8 > len(data):
            raise Refused(MALFORMED)
        size = struct.unpack_from("<q", data, start)[0] * found.dtype.itemsize
        if size < found.size or start + 8 + size > len(data):
            raise Refused(MALFORMED)
        found.start = start + 8
        start += 8 + size
