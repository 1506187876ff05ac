"""Reading a pickle without running anything that it names.

:class:`InertUnpickler` follows the opcodes of protocols 2 to 5. Plain data comes back as it is; tensors become
:class:`~lcsc_opt.checkpoints.contents.TensorRef`; every other class or call becomes a
:class:`~lcsc_opt.checkpoints.contents.Record`. The cost of a hostile file is bounded: its opcodes, its text, and the
keys of dicts, which could take for ever to hash.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any

from lcsc_opt.checkpoints.contents import Name, Record, Refused, Span, StorageRef, TensorRef, shown
from lcsc_opt.checkpoints.torch_objects import MAKERS

MAX_OPCODES = 1_000_000  # a network of 5,000 tensors with its average and Adam's state has 600,000
MAX_NAME = 512  # characters of a module's or a class's name
MAX_TEXT = 64 * 2**20  # characters
MAX_KEY = 2**60  # integers up to here are their own hash, so they cannot be made to collide
MALFORMED = "is truncated or is not weights: save or copy it again, or leave it out."
DANGEROUS_MODULES = {
    *("os", "posix", "nt", "subprocess", "pty", "runpy", "shutil", "socket", "ctypes", "importlib", "webbrowser"),
    *("sys", "code", "_posixsubprocess", "multiprocessing", "pickle", "_pickle", "marshal", "requests", "urllib"),
}
DANGEROUS_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "breakpoint", "input"}
_scalars = (str, int, float, bool, bytes, type(None))


class Budget:
    """What one file may still cost; nested pickles share it."""

    def __init__(self) -> None:
        self.opcodes = MAX_OPCODES
        self.text = MAX_TEXT

    def spend_text(self, length: int) -> None:
        """Count ``length`` more characters.

        Raises:
            Refused: the file has spent all it may.
        """
        self.text -= length
        if self.text < 0:
            raise Refused("holds too much text beside the weights: save model.state_dict() alone.")


class InertUnpickler:
    """Reads one pickle from ``data`` at ``position``.

    Args:
        data: the file up to where the pickle must have ended.
        storage: makes a :class:`StorageRef` of a persistent id, as torch writes them.
        nested: makes a :class:`StorageRef` of the bytes of a file inside the file; ``None`` leaves a record.

    Attributes:
        position: where the next opcode is; after :meth:`load`, the end of the pickle.
    """

    def __init__(
        self,
        data: memoryview,
        position: int,
        budget: Budget,
        *,
        storage: Callable[[tuple[Any, ...]], Any] | None = None,
        nested: Callable[[Span], StorageRef] | None = None,
    ) -> None:
        self.position = position
        self._data, self._budget = data, budget
        self._storage, self._nested = storage, nested
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The object of the pickle.

        Raises:
            Refused: malformed, too large, or made to harm.
        """
        try:
            return self._run()
        except (LookupError, struct.error, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise Refused(MALFORMED) from error

    def _run(self) -> Any:
        data, budget, handlers, stop = self._data, self._budget, _HANDLERS, pickle.STOP[0]
        while True:
            code = data[self.position]
            self.position += 1
            if code == stop:
                return self._stack.pop()
            budget.opcodes -= 1
            if budget.opcodes < 0:
                raise Refused("holds too many objects beside the weights: save model.state_dict() alone.")
            handler = handlers.get(code)
            if handler is None:
                raise Refused(MALFORMED)
            handler(self)

    def _take(self, length: int) -> memoryview:
        start = self.position
        if length > len(self._data) - start:
            raise Refused(MALFORMED)
        self.position = start + length
        return self._data[start : self.position]

    def _number(self, layout: str) -> Any:
        value = struct.unpack_from(layout, self._data, self.position)[0]
        self.position += struct.calcsize(layout)
        return value

    def _text(self, length: int) -> None:
        encoded = self._take(length)
        self._budget.spend_text(length)
        self._stack.append(str(encoded, "utf-8", "surrogatepass"))

    def _old_text(self, length: int) -> None:
        """A string of Python 2: text where it is UTF-8, as torch reads it."""
        encoded = self._take(length)
        self._budget.spend_text(length)
        self._stack.append(str(encoded, "utf-8", "replace"))

    def _bytes(self, length: int) -> None:
        start = self.position
        self._take(length)
        self._stack.append(Span(start, start + length))

    def _line(self) -> str:
        line, end, _ = bytes(self._data[self.position : self.position + MAX_NAME]).partition(b"\n")
        if not end:
            raise Refused(MALFORMED)
        self.position += len(line) + 1
        return str(line, "utf-8")

    def _global(self) -> None:
        module = self._line()
        self._stack.append(Name(module, self._line()))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str or len(name) + len(module) > MAX_NAME:
            raise Refused(MALFORMED)
        self._stack.append(Name(module, name))

    def _marked_items(self) -> list[Any]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked_items()

    def _tuple(self) -> None:
        items = self._marked_items()  # this brings back the stack on which the tuple is put
        self._stack.append(tuple(items))

    def _top(self, count: int) -> None:
        if len(self._stack) < count:
            raise Refused(MALFORMED)
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is Record:
            if target.elements is None:
                target.elements = []
            target = target.elements
        if type(target) is not list:
            raise Refused(MALFORMED)
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is Record:
            if target.items is None:
                target.items = {}
            target = target.items
        if type(target) is not dict or len(items) % 2:
            raise Refused(MALFORMED)
        for index in range(0, len(items), 2):
            target[self._key(items[index])] = items[index + 1]

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _key(self, key: Any) -> Any:
        """``key``, or a stand-in where hashing it could take for ever."""
        if isinstance(key, int) and not -MAX_KEY < key < MAX_KEY:
            return Record("key")
        if isinstance(key, (*_scalars, Record, Name, Span)):
            return key
        if type(key) is tuple and len(key) <= 8 and all(isinstance(part, _scalars) for part in key):
            return tuple(self._key(part) for part in key)
        return Record("key")

    def _add_items(self) -> None:
        items = self._marked_items()
        self._append(items)

    def _frozenset(self) -> None:
        items = self._marked_items()
        self._stack.append(items)

    def _persistent(self) -> None:
        identity = self._stack.pop()
        if type(identity) is not tuple or not identity or self._storage is None:
            raise Refused(MALFORMED)
        if identity[0] == "module":  # old files store the source of a class beside it
            self._stack.append(identity[1])
        else:
            self._stack.append(self._storage(identity))

    def _reduce(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Name or type(args) is not tuple:
            raise Refused(MALFORMED)
        self._stack.append(self._call(function, args))

    def _new_object(self) -> None:
        args, cls = self._stack.pop(), self._stack.pop()
        if type(cls) is not Name or type(args) is not tuple:
            raise Refused(MALFORMED)
        self._stack.append(Record(str(cls), args))

    def _new_object_with_keywords(self) -> None:
        keywords = self._stack.pop()
        args, cls = self._stack.pop(), self._stack.pop()
        if type(cls) is not Name or type(args) is not tuple:
            raise Refused(MALFORMED)
        self._stack.append(Record(str(cls), (*args, keywords)))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is Record:
            target.state = state
        elif type(target) not in (dict, TensorRef):  # attributes of ordered dicts and of tensors are not needed
            raise Refused(MALFORMED)

    def _ordered_dict(self, pairs: list[Any] | None = None) -> dict[Any, Any]:
        """Python 2 hands the entries over as a list of pairs."""
        self._budget.opcodes -= len(pairs or ())
        return {self._key(key): value for key, value in pairs or ()} if self._budget.opcodes >= 0 else {}

    def _call(self, function: Name, args: tuple[Any, ...]) -> Any:
        if function.module.split(".")[0] in DANGEROUS_MODULES or (
            function.module in ("builtins", "__builtin__") and function.name in DANGEROUS_BUILTINS
        ):
            raise Refused(
                f"would run code when loaded ({shown(function)}): it is no ordinary checkpoint; leave it out."
            )
        name = str(function)
        if name == "torch.storage._load_from_bytes" and self._nested and type(args[0]) is Span:
            return self._nested(args[0])
        if name == "torch._tensor._rebuild_from_type_v2" and type(args[0]) is Name:  # a tensor with attributes
            return self._call(args[0], args[2])
        if name == "collections.OrderedDict":
            return self._ordered_dict(*args)
        maker = MAKERS.get(name)
        made = None if maker is None else maker(args)
        return Record(name, args) if made is None else made


_Handler = Callable[[InertUnpickler], None]


def _constant(value: Any) -> _Handler:
    return lambda reader: reader._stack.append(value)


def _number(layout: str) -> _Handler:
    return lambda reader: reader._stack.append(reader._number(layout))


def _sized(read: Callable[[InertUnpickler, int], None], layout: str) -> _Handler:
    return lambda reader: read(reader, reader._number(layout))


def _remember(layout: str) -> _Handler:
    def handler(reader: InertUnpickler) -> None:
        reader._memo[reader._number(layout)] = reader._stack[-1]

    return handler


def _recall(layout: str) -> _Handler:
    return lambda reader: reader._stack.append(reader._memo[reader._number(layout)])


def _memoize(reader: InertUnpickler) -> None:
    reader._memo[len(reader._memo)] = reader._stack[-1]


def _long(reader: InertUnpickler) -> None:
    reader._stack.append(int.from_bytes(reader._take(reader._number("<B")), "little", signed=True))


_U = InertUnpickler
_HANDLERS: dict[int, _Handler] = {
    opcode[0]: handler
    for opcode, handler in (
        (pickle.PROTO, lambda reader: reader._number("<B")),
        (pickle.FRAME, lambda reader: reader._number("<Q")),
        (pickle.MARK, _U._mark),
        (pickle.POP, _U._pop),
        (pickle.POP_MARK, lambda reader: reader._marked_items()),
        (pickle.NONE, _constant(None)),
        (pickle.NEWTRUE, _constant(True)),
        (pickle.NEWFALSE, _constant(False)),
        (pickle.BININT, _number("<i")),
        (pickle.BININT1, _number("<B")),
        (pickle.BININT2, _number("<H")),
        (pickle.BINFLOAT, _number(">d")),
        (pickle.LONG1, _long),
        (pickle.BINUNICODE, _sized(_U._text, "<I")),
        (pickle.SHORT_BINUNICODE, _sized(_U._text, "<B")),
        (pickle.BINUNICODE8, _sized(_U._text, "<Q")),
        (pickle.BINSTRING, _sized(_U._old_text, "<I")),
        (pickle.SHORT_BINSTRING, _sized(_U._old_text, "<B")),
        (pickle.BINBYTES, _sized(_U._bytes, "<I")),
        (pickle.SHORT_BINBYTES, _sized(_U._bytes, "<B")),
        (pickle.BINBYTES8, _sized(_U._bytes, "<Q")),
        (pickle.BYTEARRAY8, _sized(_U._bytes, "<Q")),
        (pickle.EMPTY_TUPLE, _constant(())),
        (pickle.TUPLE, _U._tuple),
        (pickle.TUPLE1, lambda reader: reader._top(1)),
        (pickle.TUPLE2, lambda reader: reader._top(2)),
        (pickle.TUPLE3, lambda reader: reader._top(3)),
        (pickle.EMPTY_LIST, lambda reader: reader._stack.append([])),
        (pickle.APPEND, lambda reader: reader._append([reader._stack.pop()])),
        (pickle.APPENDS, lambda reader: reader._append(reader._marked_items())),
        (pickle.EMPTY_DICT, lambda reader: reader._stack.append({})),
        (pickle.SETITEM, _U._set_item),
        (pickle.SETITEMS, lambda reader: reader._set_items(reader._marked_items())),
        (pickle.EMPTY_SET, lambda reader: reader._stack.append([])),
        (pickle.ADDITEMS, _U._add_items),
        (pickle.FROZENSET, _U._frozenset),
        (pickle.BINPUT, _remember("<B")),
        (pickle.LONG_BINPUT, _remember("<I")),
        (pickle.MEMOIZE, _memoize),
        (pickle.BINGET, _recall("<B")),
        (pickle.LONG_BINGET, _recall("<I")),
        (pickle.GLOBAL, _U._global),
        (pickle.STACK_GLOBAL, _U._stack_global),
        (pickle.REDUCE, _U._reduce),
        (pickle.NEWOBJ, _U._new_object),
        (pickle.NEWOBJ_EX, _U._new_object_with_keywords),
        (pickle.BUILD, _U._build),
        (pickle.BINPERSID, _U._persistent),
    )
}
