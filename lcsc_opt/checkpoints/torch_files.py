"""Files of ``torch.save``, old and new, of ``torch.jit.save``, and bare pickles: their content without the tensors.

Nothing that a pickle names is run. Plain data comes back as it is, and tensors as :class:`TensorRef`, which are not
read yet. Every class or function that the pickle names is a :class:`Record`, and so is whatever it would have made of
it. ``torch.load(weights_only=True)`` is not used, since it refuses the classes of Lightning, argparse and NVlabs that
are stored with the weights, reads the optimizer's tensors, too, and can be made to hash or to allocate without end.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcsc_opt.base.errors import TrajectoryError

MALFORMED = "is truncated or is not weights: save or copy it again, or leave it out."
_TOO_LARGE = "holds too much apart from the weights: save model.state_dict() alone."
_MOST_OPCODES = 1_000_000  # a network of 5,000 tensors with its average and Adam has 600,000
_MOST_BYTES = 64 * 2**20  # read, which the weights are not
_LONGEST_NAME = 512
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in files of torch < 1.6
_ZIP_SIGNATURE = b"PK\x03\x04"
_STORAGES = {
    **{name: getattr(torch, name.lower()) for name in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short")},
    **{"Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool, "Untyped": torch.uint8},
    **{"ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
}


@dataclasses.dataclass(slots=True, eq=False)
class Record:
    """What a pickle says about a class or function, an object, or the result of a call; none of them is ever made.

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

    def append(self, value: Any) -> None:
        """Called by the unpickler, as on a list."""
        self.extend([value])

    def extend(self, values: list[Any]) -> None:
        """Called by the unpickler, as on a list."""
        self.elements = self.elements or []
        self.elements.extend(values)


@dataclasses.dataclass(slots=True, eq=False)
class _Span:
    """``size`` bytes of the file from ``start``, which were not read; those of a storage have a ``dtype``.

    In files of torch < 1.6, ``start`` is known at the end.
    """

    start: int
    size: int
    dtype: torch.dtype = torch.uint8


@dataclasses.dataclass(slots=True, eq=False)
class TensorRef:
    """A tensor that was not read yet; ``offset`` and ``stride`` count elements."""

    storage: _Span
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Stream:
    """The bytes of a file from ``position`` on. What is read is counted, so that the cost of a hostile file is bounded.

    Raises:
        TrajectoryError: in reading, beyond the end or more than any checkpoint needs.
    """

    def __init__(self, data: memoryview, position: int = 0, most_opcodes: int = _MOST_OPCODES) -> None:
        self.data, self.position, self._most_opcodes = data, position, most_opcodes
        self._opcodes, self._bytes = 0, 0

    def opcode(self) -> int:
        """The next byte, counted as an opcode."""
        self.spend(1)
        code: int = self.data[self.position]
        self.position += 1
        return code

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        start = self.position
        end = self.position = start + size
        self._bytes += size
        if size < 0 or end > len(self.data):
            raise TrajectoryError(MALFORMED)
        if self._bytes > _MOST_BYTES:
            raise TrajectoryError(_TOO_LARGE)
        return bytes(self.data[start:end])

    def readline(self) -> bytes:
        """The next line, which is a name in all pickles since protocol 2."""
        line, end, _ = bytes(self.data[self.position : self.position + _LONGEST_NAME]).partition(b"\n")
        if not end:
            raise TrajectoryError(MALFORMED)
        return self.read(len(line) + 1)

    def skip(self, size: int) -> _Span:
        """The next ``size`` bytes, not read."""
        if not 0 <= size <= len(self.data) - self.position:
            raise TrajectoryError(MALFORMED)
        self.position += size
        return _Span(self.position - size, size)

    def spend(self, opcodes: int) -> None:
        """Count work that is as much as this many opcodes."""
        self._opcodes += opcodes
        if self._opcodes > self._most_opcodes:
            raise TrajectoryError(_TOO_LARGE)


_Reader: Any = pickle._Unpickler


class _InertUnpickler(_Reader):  # type: ignore[misc]
    """Reads one pickle of protocols 2 to 5 from a stream.

    Its base class is :mod:`pickle`'s own reader in Python, whose handlers of opcodes can be replaced. Those that would
    call, import or hash what the file names are replaced here; those that no writer of checkpoints uses are left out.

    Args:
        stream: where the pickle starts; after :meth:`load`, where it ended.
        storage: makes the :class:`_Span` of a storage from its dtype, its key and its size in bytes.
        nested: reads a file of torch that lies inside the file.
    """

    def __init__(
        self,
        stream: _Stream,
        *,
        storage: Callable[[torch.dtype, str, int], _Span] | None = None,
        nested: Callable[[_Span], Any] | None = None,
    ) -> None:
        super().__init__(stream, encoding="utf-8", errors="replace")
        self._stream, self._storage, self._nested = stream, storage, nested
        self.read, self.readline = stream.read, stream.readline
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append

    def load(self) -> Any:
        """The object of the pickle.

        Raises:
            TrajectoryError: malformed, too large, or made to harm.
        """
        try:
            opcode, dispatch, stop = self._stream.opcode, self.dispatch, pickle.STOP[0]
            while (code := opcode()) != stop:
                dispatch[code](self)
            return self.stack.pop()
        except TrajectoryError:
            raise
        except Exception as error:
            raise TrajectoryError(MALFORMED) from error

    def find_class(self, module: str, name: str) -> Record:
        """A record of what the pickle names."""
        if len(module) + len(name) > _LONGEST_NAME:
            raise TrajectoryError(MALFORMED)
        return Record(f"{module}.{name}")

    def persistent_load(self, identity: Any) -> Any:
        """A storage, which torch writes as ``("storage", type, key, location, count, …)``."""
        if identity[0] == "module":  # old files have the source of a class with it
            return identity[1]
        kind, key, count = identity[1].name.rpartition(".")[2].removesuffix("Storage"), identity[2], identity[4]
        if self._storage is None or type(key) is not str or type(count) is not int or not 0 <= count < 2**48:
            raise TrajectoryError(MALFORMED)
        if len(identity) > 5 and identity[5] is not None:  # a view of a storage, as torch 0.3 wrote them
            raise TrajectoryError(MALFORMED)
        return self._storage(_STORAGES[kind], key, count * _STORAGES[kind].itemsize)

    def _take_bytes(self, layout: str) -> None:
        size = struct.unpack(layout, self._stream.read(struct.calcsize(layout)))[0]
        self.append(self._stream.skip(size))

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Record:
            target.items = {} if target.items is None else target.items
            target = target.items
        if type(target) is not dict:
            raise TrajectoryError(MALFORMED)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Record:
            target.state = state
        elif type(target) not in (dict, TensorRef):  # attributes of ordered dicts and of tensors are not needed
            raise TrajectoryError(MALFORMED)

    def _new_object(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Record or type(args) is not tuple:
            raise TrajectoryError(MALFORMED)
        self.append(Record(function.name, args))

    def _reduce(self) -> None:
        self._new_object()
        self.append(self._made(self.stack.pop()))

    def _made(self, call: Record) -> Any:
        """What stands for the result of a call: the record of it, but for dicts, tensors and what is around them."""
        name, args = call.name, call.args
        if name == "collections.OrderedDict":
            pairs = args[0] if args else []  # Python 2 hands the entries over
            self._stream.spend(len(pairs))
            return {_key(key): value for key, value in pairs}
        if name in _REBUILD:
            return _tensor(call)
        if name in _FIRST and args:
            return args[0]
        if name == "torch._tensor._rebuild_from_type_v2" and type(args[0]) is Record:  # a tensor with attributes
            return self._made(Record(args[0].name, args[2])) if args[0].name in _REBUILD else call
        if name == "torch.storage._load_from_bytes" and self._nested and type(args[0]) is _Span:
            return self._nested(args[0])
        return call

    dispatch = {
        code: _Reader.dispatch[code]
        for code in b"".join((
            *(pickle.PROTO, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.NONE, pickle.NEWTRUE),
            *(pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.BINFLOAT, pickle.LONG1),
            *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINSTRING),
            *(pickle.SHORT_BINSTRING, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
            *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.BINPUT, pickle.LONG_BINPUT),
            *(pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
        ))
    } | {
        opcode[0]: handler
        for opcode, handler in (
            (pickle.FRAME, lambda reader: reader._stream.read(8)),
            (pickle.EMPTY_SET, lambda reader: reader.append([])),
            (pickle.ADDITEMS, _Reader.load_appends),
            (pickle.FROZENSET, lambda reader: reader.append(reader.pop_mark())),  # a list: nothing is hashed
            (pickle.SHORT_BINBYTES, lambda reader: reader._take_bytes("<B")),
            (pickle.BINBYTES, lambda reader: reader._take_bytes("<I")),
            (pickle.BINBYTES8, lambda reader: reader._take_bytes("<Q")),
            (pickle.BYTEARRAY8, lambda reader: reader._take_bytes("<Q")),
            (pickle.SETITEM, lambda reader: reader._set_items([reader.stack.pop(-2), reader.stack.pop()])),
            (pickle.SETITEMS, lambda reader: reader._set_items(reader.pop_mark())),
            (pickle.BUILD, _build),
            (pickle.NEWOBJ, _new_object),
            (pickle.NEWOBJ_EX, lambda reader: (reader.stack.pop(), reader._new_object())),
            (pickle.REDUCE, _reduce),
        )
    }  # fmt: skip


_REBUILD = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_FIRST = {
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset")),
    *("torch.Size", "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
}


def _tensor(call: Record) -> TensorRef | Record:
    """The tensor of ``_rebuild_tensor*(storage, offset, shape, stride, requires_grad, hooks, [dtype,] metadata)``."""
    args, typed = call.args, call.name.endswith("_v3")
    if not 4 + 3 * typed <= len(args) <= 8 or type(args[0]) is not _Span or any(args[6 + typed :]):
        return call
    storage, offset, shape, stride = args[:4]
    if not all(type(numbers) is tuple and len(numbers) <= 64 for numbers in (shape, stride)):
        return call
    dtype = getattr(torch, args[6].name.removeprefix("torch."), None) if typed else storage.dtype
    if not isinstance(dtype, torch.dtype):
        return call
    return TensorRef(storage, dtype, offset, shape, stride)


def _key(key: Any) -> Any:
    """``key``, or a stand-in where hashing it could take for ever; whole numbers up to 2^60 cannot collide."""
    return key if type(key) in (str, Record) or (type(key) is int and abs(key) < 2**60) else Record("key")


def read_content(path: Path, *, start: int = 0, stop: int = 0, most_opcodes: int = _MOST_OPCODES) -> Any:
    """Everything in a file except the bytes of its tensors: plain data, :class:`TensorRef` and :class:`Record`.

    A file of ``torch.save`` may be inside of another one, in its bytes from ``start`` to ``stop``. A bare pickle may
    have more opcodes than others.

    Raises:
        TrajectoryError: truncated, not weights, or made to harm.
        OSError, ValueError: it cannot be opened, or is shorter.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), stop, access=mmap.ACCESS_READ)
    data = memoryview(mapped)
    if data[start : start + 4] == _ZIP_SIGNATURE:
        return _read_zip(data, mapped)
    stream, nested = _Stream(data, start, most_opcodes), {}

    def read_nested(span: _Span) -> Any:
        if span.start not in nested:
            inner = _Stream(data[: span.start + span.size], span.start)
            nested[span.start] = _read_legacy(inner) if _InertUnpickler(inner).load() == _LEGACY_MAGIC else None
        return nested[span.start]

    content = _InertUnpickler(stream, nested=read_nested).load()
    return _read_legacy(stream) if type(content) is int and content == _LEGACY_MAGIC else content


def _read_zip(data: memoryview, file: Any) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OSError) as error:
        raise TrajectoryError(MALFORMED) from error
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise TrajectoryError("is a zip, but not one of torch.save: save model.state_dict().")
    folder = pickles[0].removesuffix("data.pkl")

    def member(name: str, dtype: torch.dtype, size: int | None = None) -> _Span:
        info = entries.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED or (size or 0) > info.file_size:
            raise TrajectoryError(MALFORMED)
        header = bytes(data[info.header_offset : info.header_offset + 30])  # which alone tells its length
        if len(header) < 30 or not header.startswith(_ZIP_SIGNATURE):
            raise TrajectoryError(MALFORMED)
        start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        return _Span(start, info.file_size if size is None else size, dtype)

    pickled = member(pickles[0], torch.uint8)
    stream = _Stream(data[: pickled.start + pickled.size], pickled.start)
    return _InertUnpickler(stream, storage=lambda dtype, key, size: member(f"{folder}data/{key}", dtype, size)).load()


def _read_legacy(stream: _Stream) -> Any:
    """After the magic number: protocol, machine, object and keys; then each storage: its length, its bytes."""
    storages: dict[str, _Span] = {}
    _InertUnpickler(stream).load(), _InertUnpickler(stream).load()
    content = _InertUnpickler(
        stream, storage=lambda dtype, key, size: storages.setdefault(key, _Span(-1, size, dtype))
    ).load()
    for key in _InertUnpickler(stream).load():
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
        numbers = (ref.offset, *ref.shape, *ref.stride)
        possible = len(ref.shape) == len(ref.stride) and all(type(n) is int and 0 <= n < 2**48 for n in numbers)
        if not possible or math.prod(ref.shape) >= 2**48:
            raise TrajectoryError("holds a tensor with an impossible shape: leave it out.")
        end = ref.offset + 1 + sum((n - 1) * stride for n, stride in zip(ref.shape, ref.stride, strict=True))
        if 0 not in ref.shape and end * itemsize > length:
            raise TrajectoryError("holds a tensor that reaches out of its storage: save or copy it again.")
        if not 0 <= start <= start + length <= size:
            raise TrajectoryError(MALFORMED)
        if known not in made:
            mapped = file[start : start + length]
            made[known] = mapped.clone() if start % itemsize else mapped
        source: Any = made[known]
        tensors[name] = torch.empty(0, dtype=ref.dtype).set_(source, ref.offset, ref.shape, ref.stride)
    return tensors
