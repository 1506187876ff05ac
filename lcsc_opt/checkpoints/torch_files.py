"""Files of ``torch.save``, old and new, and of ``torch.jit.save``, zips of them, and bare pickles: all but the tensors.

Nothing that a pickle names is run (:mod:`lcsc_opt.checkpoints.pickles`). Plain data comes back as it is, and tensors as
:class:`TensorRef`, which are not read yet: :func:`map_tensors` maps those that are needed from the file.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import mmap
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.checkpoints.names import weights_in_archive
from lcsc_opt.checkpoints.pickles import (
    MALFORMED,
    MAX_OPCODES,
    WRITTEN_OVER,
    InertUnpickler,
    PickleBytes,
    Record,
    Span,
    shown,
)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in files of torch < 1.6
_ZIP_SIGNATURE = b"PK\x03\x04"
_ZIP_HEADER_BYTES = 30  # before the name of an entry
_CHECKSUM_BEHIND = 8  # a flag: that of an entry stands behind its content
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # how files begin
_MAX_FILES = 64  # of weights in an archive
_MOST_SHOWN = 4  # names of its entries, in a message
_MAX_DIMENSIONS = 64
_MAX_NUMBER = 2**48  # of elements, and in shapes, strides and offsets
_STORAGE_DTYPES = {
    "DoubleStorage": torch.double,
    "FloatStorage": torch.float,
    "HalfStorage": torch.half,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.long,
    "IntStorage": torch.int,
    "ShortStorage": torch.short,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_REBUILD_TENSOR = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}
_OTHER_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "sparse tensor",
    "torch._utils._rebuild_qtensor": "quantized tensor",
    "torch._utils._rebuild_nested_tensor": "nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensor without data",
}
_RETURN_THEIR_ARGUMENT = {
    "builtins.set",
    "builtins.frozenset",
    "__builtin__.set",
    "__builtin__.frozenset",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
}


@dataclasses.dataclass(slots=True, eq=False)
class Storage:
    """``size`` bytes of the file from ``start``, which were not read, and the dtype of the tensors in them.

    In files of torch < 1.6, ``start`` is -1 until the end of the file is read.
    """

    start: int
    size: int
    dtype: torch.dtype


@dataclasses.dataclass(slots=True, eq=False)
class TensorRef:
    """A tensor that was not read yet; ``offset`` and ``stride`` count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_tensor(value: object) -> bool:
    """Whether this is a tensor, or a reference to one."""
    return isinstance(value, (Tensor, TensorRef))


def other_tensor(value: object) -> str:
    """What kind of tensor a record is that cannot be read, such as ``sparse tensor``; empty for anything else."""
    if not isinstance(value, Record):
        return ""
    if value.name == "torch._tensor._rebuild_from_type_v2" and len(value.args) > 1:
        return shown(getattr(value.args[1], "name", "tensor")).rpartition(".")[2]  # DTensor
    return _OTHER_TENSORS.get(value.name, "")


def kind(value: object) -> str:
    """The type of a value, in words for a message."""
    if isinstance(value, Record):
        return f"a {other_tensor(value) or shown(value.name)}"
    return "a Tensor" if is_tensor(value) else f"a {type(value).__name__}"


def read_content(path: Path, *, start: int = 0, stop: int = 0, max_opcodes: int = MAX_OPCODES) -> Any:
    """Everything in a file except the bytes of its tensors: plain data, :class:`TensorRef` and :class:`Record`.

    Args:
        path: the file.
        start: where the file of ``torch.save`` begins that lies inside of this one, in bytes.
        stop: where it ends; 0 is the end of the file.
        max_opcodes: the limit for a bare pickle; other files have the usual limit.

    Raises:
        TrajectoryError: truncated, not weights, or made to harm.
        OSError, ValueError: it cannot be opened, or is shorter.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), stop, access=mmap.ACCESS_READ)
    data = memoryview(mapped)
    if data[start : start + 4] == _ZIP_SIGNATURE:
        entries = _entries(mapped)
        if start == 0 and not _pickles(entries):  # an archive in an archive could be this one
            return {
                name: read_content(path, start=span.start, stop=span.start + span.size)
                for name, span in _weights_in(data, entries).items()
            }
        return _read_zip(data, entries)
    for beginning, program in _COMPRESSED.items():
        if data[start : start + len(beginning)] == beginning:
            raise TrajectoryError(f"was compressed by {program}, so its weights cannot be mapped: unpack it first.")
    source = PickleBytes(data, start, max_opcodes=max_opcodes)
    content = InertUnpickler(source, call=_Calls(data)).load()
    if content == _LEGACY_MAGIC:
        return _read_legacy(source)
    return content


def patched(path: Path, tensors: Sequence[tuple[TensorRef, Tensor]]) -> bytes:
    """The bytes of a file with other numbers in some of its tensors; all else stays, whatever it is, and is not read.

    Args:
        path: a file of torch since 1.6, or a zip of them.
        tensors: what stands for a tensor in :func:`read_content`, and what is written in its place.

    Raises:
        TrajectoryError: it is no zip, a tensor would have another dtype or shape, or the file is damaged.
        OSError: it cannot be read.
    """
    before = path.read_bytes()
    content = bytearray(before)
    if content[: len(_ZIP_SIGNATURE)] != _ZIP_SIGNATURE:
        raise TrajectoryError("was written by torch before 1.6, so its bytes cannot be replaced")
    whole = torch.frombuffer(content, dtype=torch.uint8)
    storages: dict[tuple[int, int], Tensor] = {}  # start and size → aligned copy of the bytes
    for ref, tensor in tensors:
        # 0 in the stride: one number stands for several
        if (ref.dtype, ref.shape) != (tensor.dtype, tuple(tensor.shape)) or 0 in ref.stride:
            raise TrajectoryError("has weights of another dtype or form, so its bytes cannot be replaced")
        _check_bounds(ref, len(content))
        start, size = ref.storage.start, ref.storage.size
        if (start, size) not in storages:
            storages[start, size] = whole[start : start + size].clone()
        view: Any = storages[start, size].untyped_storage()
        replaced = torch.empty(0, dtype=ref.dtype, device="cpu").set_(view, ref.offset, ref.shape, ref.stride)
        replaced.copy_(tensor)
    for (start, size), storage in storages.items():
        whole[start : start + size] = storage
    return bytes(_with_checksums(content, before))


def _with_checksums(content: bytearray, before: bytes) -> bytearray:
    """A zip in which bytes were replaced, with the checksums of the entries that differ from ``before``."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        position = archive.start_dir
        entries = archive.infolist()  # in the order of the directory
    for entry in entries:
        span = _stored_entry(memoryview(before), entry)
        stop = span.start + span.size
        inner, inner_before = content[span.start : stop], before[span.start : stop]
        if inner != inner_before:
            if inner.startswith(_ZIP_SIGNATURE):  # a file of torch in an archive
                inner = _with_checksums(inner, inner_before)
                content[span.start : stop] = inner
            places = [position + 16, entry.header_offset + 14]
            if entry.flag_bits & _CHECKSUM_BEHIND:
                has_signature = content[stop : stop + 4] == b"PK\x07\x08"
                places[1] = stop + 4 if has_signature else stop
            for place in places:
                struct.pack_into("<L", content, place, zlib.crc32(inner))
        position += 46 + sum(struct.unpack_from("<HHH", content, position + 28))  # with name, extra field and comment
    return content


def map_tensors(path: Path, refs: Mapping[str, TensorRef | Tensor], *, in_memory: bool = False) -> dict[str, Tensor]:
    """The tensors of these references, mapped from the file; those whose bytes are not aligned are copied.

    With ``in_memory``, all are read: a map of a file that is cut meanwhile would end the process.

    Sizes are checked before anything is allocated. Tensors of one storage share its memory.

    Raises:
        TrajectoryError: one reaches beyond its storage, or its storage out of the file.
    """
    with path.open("rb") as opened:  # whose name need not be UTF-8, as torch would have it
        whole = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        file = torch.frombuffer(whole, dtype=torch.uint8).untyped_storage()
        storages: dict[tuple[int, int, int], torch.UntypedStorage] = {}
        tensors: dict[str, Tensor] = {}
        for name, ref in refs.items():
            if isinstance(ref, Tensor):
                tensors[name] = ref
                continue
            _check_bounds(ref, len(whole))
            start = ref.storage.start
            stop = start + ref.storage.size
            place = (start, stop, ref.dtype.itemsize)  # with the size of elements, which decides what is aligned
            if place not in storages:
                if in_memory:
                    storages[place] = _read(opened, ref.storage)
                elif start % ref.dtype.itemsize == 0:
                    storages[place] = file[start:stop]
                else:
                    storages[place] = file[start:stop].clone()
            storage: Any = storages[place]
            empty = torch.empty(0, dtype=ref.dtype, device="cpu")
            tensors[name] = empty.set_(storage, ref.offset, ref.shape, ref.stride)
    return tensors


def _read(file: BinaryIO, storage: Storage) -> torch.UntypedStorage:
    """The bytes of a storage in memory of its own, which stays whole when the file is cut."""
    content = torch.empty(storage.size, dtype=torch.uint8, device="cpu")
    file.seek(storage.start)
    if file.readinto(content.numpy()) < storage.size:  # type: ignore[attr-defined]
        raise TrajectoryError(WRITTEN_OVER)
    return content.untyped_storage()


def _check_bounds(ref: TensorRef, file_bytes: int) -> None:
    """Refuse a tensor that is not within its storage, or whose storage is not within the file of ``file_bytes``."""
    numbers = (ref.offset, *ref.shape, *ref.stride)
    are_possible = all(type(number) is int and 0 <= number < _MAX_NUMBER for number in numbers)
    if not are_possible or len(ref.shape) != len(ref.stride) or math.prod(ref.shape) >= _MAX_NUMBER:
        raise TrajectoryError("holds a tensor with an impossible shape: leave it out.")
    last_element = ref.offset  # counted from the start of the storage, as strides are not negative
    for size, stride in zip(ref.shape, ref.stride, strict=True):
        last_element += (size - 1) * stride
    is_empty = 0 in ref.shape
    if not is_empty and (last_element + 1) * ref.dtype.itemsize > ref.storage.size:
        raise TrajectoryError("holds a tensor that reaches beyond its storage: save or copy it again.")
    start = ref.storage.start
    if not 0 <= start <= start + ref.storage.size <= file_bytes:
        raise TrajectoryError(MALFORMED)


class _Calls:
    """The stand-in for the result of a call: its record, except for dicts, tensors and their wrappers."""

    def __init__(self, file: memoryview | None = None) -> None:
        """``file``: that of a bare pickle, whose bytes may be files of torch: NVlabs' hold one for each tensor."""
        self._file = file
        self._nested: dict[int, Any] = {}  # where such a file of torch begins → its content

    def __call__(self, call: Record) -> Any:
        """What stands for the result of a call, of which nothing is run."""
        if call.name == "collections.OrderedDict" and not call.args:
            return {}
        if call.name in _REBUILD_TENSOR:
            return _tensor(call)
        if call.name in _RETURN_THEIR_ARGUMENT and call.args:
            return call.args[0]
        if call.name == "torch._tensor._rebuild_from_type_v2":
            return self._tensor_with_attributes(call)
        if call.name == "torch.storage._load_from_bytes" and self._file is not None:
            return self._nested_file(call, self._file)
        return call

    def _tensor_with_attributes(self, call: Record) -> Any:
        """The plain tensor in ``_rebuild_from_type_v2(function, type, arguments, attributes)``, or the call itself."""
        function = call.args[0]
        if isinstance(function, Record) and function.name in _REBUILD_TENSOR:
            return _tensor(Record(function.name, call.args[2]))
        return call

    def _nested_file(self, call: Record, file: memoryview) -> Any:
        """The content of a file of torch inside of the pickle: ``_load_from_bytes`` was to be called with its bytes.

        Torch writes these in its old format only.
        """
        span = call.args[0]
        if not isinstance(span, Span):
            return call
        if span.start not in self._nested:  # read once: a hostile pickle may load the same bytes very often
            inner = PickleBytes(file[: span.start + span.size], span.start)
            is_legacy = InertUnpickler(inner).load() == _LEGACY_MAGIC
            self._nested[span.start] = _read_legacy(inner) if is_legacy else None
        return self._nested[span.start]


def _tensor(call: Record) -> TensorRef | Record:
    """The tensor of ``_rebuild_tensor*(storage, offset, shape, stride, requires_grad, hooks, [dtype,] metadata)``.

    Other arguments give the call itself, which the reader of a state dict refuses with the name of the tensor.
    """
    args = call.args
    has_dtype = call.name.endswith("_v3")
    metadata_index = 6
    shortest = 4  # as old files have it
    if has_dtype:
        metadata_index = 7
        shortest = 7
    if not shortest <= len(args) <= 8 or not isinstance(args[0], Storage):
        return call
    if any(args[metadata_index:]):  # a conjugated or negated view, say, which is not what its bytes are
        return call
    storage, offset, shape, stride = args[:4]
    for numbers in (shape, stride):
        if type(numbers) is not tuple or len(numbers) > _MAX_DIMENSIONS:
            return call
    dtype = storage.dtype
    if has_dtype:
        dtype = getattr(torch, args[6].name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        return call
    return TensorRef(storage, dtype, offset, shape, stride)


def _resolve(locate: Callable[[torch.dtype, str, int], Storage], identity: Any) -> Any:
    """The storage of a persistent identity: ``("storage", type, key, location, count, …)``.

    ``locate`` gives it by its dtype, its key in the file and its size in bytes.
    """
    if identity[0] == "module":  # ("module", class, source file, source code), as old files have it
        return identity[1]
    storage_type = identity[1].name.rpartition(".")[2]
    if storage_type.startswith(("QInt", "QUInt")):
        raise TrajectoryError(f"holds quantized tensors ({storage_type}): save the weights dequantized.")
    dtype = _STORAGE_DTYPES[storage_type]
    key = identity[2]
    count = identity[4]
    is_view = len(identity) > 5 and identity[5] is not None  # of another storage, as torch 0.3 wrote them
    if is_view or type(key) is not str or type(count) is not int or not 0 <= count < _MAX_NUMBER:
        raise TrajectoryError(MALFORMED)
    return locate(dtype, key, count * dtype.itemsize)


def _entries(file: Any) -> dict[str, zipfile.ZipInfo]:
    """Name → entry of the zip that ends with ``file``, a map, and may begin later than that."""
    try:
        with zipfile.ZipFile(file) as archive:
            return {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OSError) as error:
        raise TrajectoryError(MALFORMED) from error


def _pickles(entries: Iterable[str]) -> list[str]:
    """The names of what ``torch.save`` pickles into a zip."""
    return [name for name in entries if name.rpartition("/")[2] == "data.pkl"]


def _weights_in(data: memoryview, entries: Mapping[str, zipfile.ZipInfo]) -> dict[str, Span]:
    """Where in an archive its files of weights are, by their names without suffixes."""
    weights = weights_in_archive(entries)
    if not 0 < len(weights) <= _MAX_FILES:
        listed = ", ".join(shown(name) for name in [*entries][:_MOST_SHOWN])
        raise TrajectoryError(f"is a zip with {len(weights)} files of weights ({listed}): unpack it.")
    return {name: _stored_entry(data, entries[entry]) for name, entry in weights.items()}


def _read_zip(data: memoryview, entries: Mapping[str, zipfile.ZipInfo]) -> Any:
    """A file of torch since 1.6: a zip of ``NAME/data.pkl``, and ``NAME/data/KEY`` for each storage."""
    pickles = _pickles(entries)
    if len(pickles) != 1:
        raise TrajectoryError("is a zip, but not one of torch.save: save model.state_dict().")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in entries:
        order = _stored_entry(data, entries[f"{folder}byteorder"])
        if bytes(data[order.start : order.start + order.size]) != sys.byteorder.encode():
            raise TrajectoryError("was saved with the other byte order: load it with torch, and save it again.")

    def locate(dtype: torch.dtype, key: str, size: int) -> Storage:
        """The storage of this key, which is an entry of the zip that holds at least ``size`` bytes."""
        entry = _stored_entry(data, entries.get(f"{folder}data/{key}"))
        if size > entry.size:
            raise TrajectoryError(MALFORMED)
        return Storage(entry.start, size, dtype)

    pickled = _stored_entry(data, entries[pickles[0]])
    source = PickleBytes(data[: pickled.start + pickled.size], pickled.start)
    return InertUnpickler(source, resolve=functools.partial(_resolve, locate), call=_Calls()).load()


def _stored_entry(data: memoryview, entry: zipfile.ZipInfo | None) -> Span:
    """Where the content of an entry is, which must not be compressed."""
    if entry is None:
        raise TrajectoryError(MALFORMED)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise TrajectoryError(
            "is a compressed zip, whose weights cannot be mapped: load it, and save it with torch.save."
        )
    # the header before the content has its own lengths, which may differ from those of the directory
    header = bytes(data[entry.header_offset : entry.header_offset + _ZIP_HEADER_BYTES])
    if len(header) < _ZIP_HEADER_BYTES or not header.startswith(_ZIP_SIGNATURE):
        raise TrajectoryError(MALFORMED)
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)  # the lengths of the two fields behind the header
    start = entry.header_offset + _ZIP_HEADER_BYTES + name_bytes + extra_bytes
    return Span(start, entry.file_size)


def _read_legacy(source: PickleBytes) -> Any:
    """A file of torch before 1.6, behind its magic number.

    Four pickles (protocol, machine, object, keys of the storages); then each storage: its length, its bytes.
    """
    storages: dict[str, Storage] = {}

    def locate(dtype: torch.dtype, key: str, size: int) -> Storage:
        # its bytes come behind the pickle that names it: until then, it lies outside of the file
        return storages.setdefault(key, Storage(-1, size, dtype))

    InertUnpickler(source).load()  # the version of the protocol
    InertUnpickler(source).load()  # facts about the machine that wrote it, which torch ignores, too
    content = InertUnpickler(source, resolve=functools.partial(_resolve, locate), call=_Calls()).load()
    for key in InertUnpickler(source).load():
        storage = storages.get(key) if type(key) is str else None
        count = source.number("<q")
        if storage is None or count * storage.dtype.itemsize < storage.size:
            raise TrajectoryError(MALFORMED)
        storage.start = source.skip(count * storage.dtype.itemsize).start
    return content
