"""Reading a pickle without running it: plain data, and a :class:`Record` of every object, class and call.

A pickle is a program for a small stack machine. :class:`InertUnpickler` is that machine, with the opcodes that writers
of checkpoints use, and without the two that matter: it imports nothing and calls nothing.

Neither of the standard readers is used, because what a file can make them do happens before any code of ours is asked:

* ``torch.load(weights_only=True)`` does not return from a pickle of 600 bytes (a tuple of tuples as a key of a dict,
  whose hash takes 2^60 steps), allocates whatever ``bytearray(n)`` asks for, reads the optimizer's tensors of files
  from before torch 1.6, and refuses the classes of Lightning, argparse and NVlabs that are stored with the weights.
* :class:`pickle.Unpickler` with a ``find_class`` of one's own hashes the same keys, allocates its memo up to the
  largest index that a file names (2^32 entries), and copies the weights inside NVlabs' pickles into memory.
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
from collections.abc import Callable
from typing import Any

from lcsc_opt.base.errors import TrajectoryError
from lcsc_opt.base.machine import collector_resting

MALFORMED = "is truncated or is not weights: save or copy it again, or leave it out."
WRITTEN_OVER = "was written over while it was read: read it again when it is complete."
_TOO_LARGE = "holds too much apart from the weights: save model.state_dict() alone."
MAX_OPCODES = 1_000_000  # a network of 5,000 tensors with its average and Adam has 600,000
_MAX_BYTES = 64 * 2**20  # read of one pickle; the bytes of tensors are skipped and do not count
_MAX_NAME_LENGTH = 512  # of a class or function, with its module
_SHOWN_CHARACTERS = 80  # of a text from a file that a message may repeat


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


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """``size`` bytes of the file from ``start``, which were not read."""

    start: int
    size: int


class PickleBytes:
    """The bytes of a file from ``position`` on. Reading is counted, which bounds the cost of a hostile file.

    ``opcodes_left`` is how many opcodes may still be followed. All methods raise :class:`TrajectoryError` at the end of
    the bytes, and beyond what any checkpoint needs.
    """

    def __init__(self, data: memoryview, position: int = 0, *, max_opcodes: int = MAX_OPCODES) -> None:
        self.data = data
        self.position = position
        self.opcodes_left = max_opcodes
        self._bytes_left = _MAX_BYTES

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        start = self.position
        self._advance(size)
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise TrajectoryError(_TOO_LARGE)
        return bytes(self.data[start : self.position])

    def number(self, layout: str) -> Any:
        """The next number, in a layout of :mod:`struct`."""
        try:
            (value,) = struct.unpack_from(layout, self.data, self.position)
        except struct.error as error:
            raise TrajectoryError(MALFORMED) from error
        self.position += struct.calcsize(layout)
        return value

    def line(self) -> str:
        """The next line, which is the name of a module, class or function."""
        start = bytes(self.data[self.position : self.position + _MAX_NAME_LENGTH])
        line, line_feed, _ = start.partition(b"\n")
        if not line_feed:
            raise TrajectoryError(MALFORMED)
        self.position += len(line) + 1
        return line.decode("utf-8")

    def skip(self, size: int) -> Span:
        """The next ``size`` bytes, not read."""
        start = self.position
        self._advance(size)
        return Span(start, size)

    def _advance(self, size: int) -> None:
        """Pass over ``size`` bytes, a number out of the file, which may be more than there are."""
        if not 0 <= size <= len(self.data) - self.position:
            raise TrajectoryError(MALFORMED)
        self.position += size


_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
# opcode → layout of the number that follows it
_NUMBERS = {pickle.BININT: "<i", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
_TUPLE_SIZES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
# opcode → layout of the size in bytes that follows it
_TEXTS = {pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I", pickle.BINUNICODE8: "<Q"}
_BYTES = {
    pickle.SHORT_BINBYTES: "<B",
    pickle.BINBYTES: "<I",
    pickle.BINBYTES8: "<Q",
    pickle.BYTEARRAY8: "<Q",
}


# the most frequent opcodes, as an element of a memoryview is one
_BINPUT = ord(pickle.BINPUT)
_LONG_BINPUT = ord(pickle.LONG_BINPUT)
_BINGET = ord(pickle.BINGET)
_LONG_BINGET = ord(pickle.LONG_BINGET)
_BININT1 = ord(pickle.BININT1)
_MARK = ord(pickle.MARK)
_TUPLE = ord(pickle.TUPLE)
_STOP = ord(pickle.STOP)
_read_uint32 = struct.Struct("<I").unpack_from


class InertUnpickler:
    """Reads one pickle of protocols 2 to 5. Sets are read as lists, whose elements need no hash.

    Args:
        source: where the pickle starts; after :meth:`load`, where it ended.
        resolve: makes an object of its persistent identity, which is a storage in files of torch; without it, there may
            be none.
        call: gives what stands for the result of a call; without it, that is the record of the call.
    """

    def __init__(
        self,
        source: PickleBytes,
        *,
        resolve: Callable[[Any], Any] | None = None,
        call: Callable[[Record], Any] | None = None,
    ) -> None:
        self._source = source
        self._resolve = resolve
        self._call = call or (lambda record: record)
        self._memo: dict[int, Any] = {}
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []  # from below each mark that is still open

    def load(self) -> Any:
        """The object of the pickle.

        Raises:
            TrajectoryError: malformed, too large, or made to harm.
        """
        try:
            with collector_resting():  # nothing becomes garbage here
                self._run()
            return self._stack.pop()
        except TrajectoryError:
            raise
        except Exception as error:  # a hostile file can raise anything
            raise TrajectoryError(MALFORMED) from error

    def _run(self) -> None:
        """Follow the opcodes to the end; the most frequent ones at once, since a call of a method costs more than they.

        For speed, the state is in local variables, which are put back for each opcode that a method follows. An index
        behind the end raises an ``IndexError``, a number there a ``struct.error``.
        """
        source = self._source
        memo = self._memo
        data = source.data
        position = source.position
        left = source.opcodes_left
        stack = self._stack
        while True:
            left -= 1
            if left < 0:
                raise TrajectoryError(_TOO_LARGE)
            code = data[position]
            position += 1
            if code == _BINPUT:
                memo[data[position]] = stack[-1]
                position += 1
            elif code == _LONG_BINPUT:
                (place,) = _read_uint32(data, position)
                memo[place] = stack[-1]
                position += 4
            elif code == _BINGET:
                stack.append(memo[data[position]])
                position += 1
            elif code == _LONG_BINGET:
                (place,) = _read_uint32(data, position)
                stack.append(memo[place])
                position += 4
            elif code == _BININT1:
                stack.append(data[position])
                position += 1
            elif code == _MARK:
                self._outer_stacks.append(stack)
                stack = []
            elif code == _TUPLE:
                values = tuple(stack)
                stack = self._outer_stacks.pop()
                stack.append(values)
            elif code == _STOP:
                break
            else:
                self._stack = stack
                source.position = position
                self._execute(bytes((code,)))
                stack = self._stack
                position = source.position
        self._stack = stack
        source.position = position
        source.opcodes_left = left

    def _execute(self, code: bytes) -> None:
        """Follow one of the other opcodes: those that push a value by a table here."""
        source = self._source
        if code in _TEXTS:
            text = source.read(source.number(_TEXTS[code]))
            self._push(text.decode("utf-8", "surrogatepass"))
        elif code in _NUMBERS:
            self._push(source.number(_NUMBERS[code]))
        elif code in _TUPLE_SIZES:
            self._push(self._pop_tuple(_TUPLE_SIZES[code]))
        elif code in _CONSTANTS:
            self._push(_CONSTANTS[code])
        elif code in _BYTES:
            self._push(source.skip(source.number(_BYTES[code])))
        else:
            self._execute_structure(code)

    def _execute_structure(self, code: bytes) -> None:
        """Follow one opcode that groups, fills, names or calls what is on the stack."""
        match code:
            case pickle.MEMOIZE:
                self._memo[len(self._memo)] = self._stack[-1]
            case pickle.BINPERSID if self._resolve is not None:
                self._push(self._resolve(self._stack.pop()))
            case pickle.REDUCE:
                call = self._pop_call()
                self._push(self._call(call))
            case pickle.GLOBAL:
                self._push_name(source_module=self._source.line(), name=self._source.line())
            case pickle.STACK_GLOBAL:
                name = self._stack.pop()
                self._push_name(source_module=self._stack.pop(), name=name)
            case pickle.EMPTY_DICT:
                self._push({})
            case pickle.EMPTY_LIST | pickle.EMPTY_SET:
                self._push([])
            case pickle.FROZENSET:
                self._push(self._pop_to_mark())
            case pickle.SETITEM:
                value = self._stack.pop()
                self._set_items([self._stack.pop(), value])
            case pickle.SETITEMS:
                self._set_items(self._pop_to_mark())
            case pickle.APPEND:
                self._append([self._stack.pop()])
            case pickle.APPENDS | pickle.ADDITEMS:
                self._append(self._pop_to_mark())
            case pickle.NEWOBJ:
                self._push(self._pop_call())
            case pickle.NEWOBJ_EX:
                self._stack.pop()  # the keyword arguments, which nothing here needs
                self._push(self._pop_call())
            case pickle.BUILD:
                state = self._stack.pop()
                if type(self._stack[-1]) is Record:  # the attributes of ordered dicts and of tensors are not needed
                    self._stack[-1].state = state
            case pickle.LONG1:
                digits = self._source.read(self._source.number("<B"))
                self._push(int.from_bytes(digits, "little", signed=True))
            case pickle.POP if self._stack:
                self._stack.pop()
            case pickle.POP | pickle.POP_MARK:  # an open mark counts as an object
                self._pop_to_mark()
            case pickle.PROTO:
                self._source.read(1)
            case pickle.FRAME:
                self._source.read(8)
            case _:
                raise TrajectoryError(MALFORMED)

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_tuple(self, size: int) -> tuple[Any, ...]:
        """The last values on the stack; a slice of too few would raise nothing."""
        if len(self._stack) < size:
            raise TrajectoryError(MALFORMED)
        values = tuple(self._stack[-size:])
        del self._stack[-size:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        """What was pushed since the last mark, which has a stack of its own."""
        values = self._stack
        self._stack = self._outer_stacks.pop()
        return values

    def _pop_call(self) -> Record:
        """A function or class, and its arguments."""
        args = self._stack.pop()
        function = self._stack.pop()
        if type(function) is not Record or type(args) is not tuple:
            raise TrajectoryError(MALFORMED)
        return Record(function.name, args)

    def _push_name(self, *, source_module: str, name: str) -> None:
        """Put a class or function on the stack: its name, by which nothing is imported."""
        if len(source_module) + len(name) > _MAX_NAME_LENGTH:
            raise TrajectoryError(MALFORMED)
        self._push(Record(f"{source_module}.{name}"))

    def _append(self, values: list[Any]) -> None:
        """Put values into the list on top of the stack, or into the elements of a record."""
        target = self._stack[-1]
        if type(target) is Record:
            if target.elements is None:
                target.elements = []
            target = target.elements
        if type(target) is not list:
            raise TrajectoryError(MALFORMED)
        target.extend(values)

    def _set_items(self, keys_and_values: list[Any]) -> None:
        """Put ``[key, value, key, value, …]`` into the dict on top of the stack, or into the items of a record."""
        target = self._stack[-1]
        if type(target) is Record:
            if target.items is None:
                target.items = {}
            target = target.items
        if type(target) is not dict:
            raise TrajectoryError(MALFORMED)
        for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
            target[_safe_key(key)] = value


class FloatKey(str):
    """A float that is a key of a dict, such as the rate of an average, by its text.

    Floats can be chosen so that all their hashes are equal; text is hashed with a secret.
    """

    __slots__ = ()


def _safe_key(key: Any) -> Any:
    """``key``, or a stand-in if hashing it could take for ever: a nested tuple, or keys that were made to collide.

    Text is hashed with a secret, records by their identity, and whole numbers below 2^60 have hashes of their own.
    """
    if type(key) in (str, Record):
        return key
    if type(key) is float:
        return FloatKey(key)
    if type(key) is int and abs(key) < 2**60:
        return key
    return Record("key")


def shown(text: object) -> str:
    """A text out of a file, which may be hostile, made fit for one line of a message: escaped and cut."""
    if isinstance(text, Record):
        text = text.name
    line = str(text)[: _SHOWN_CHARACTERS + 1]
    line = line.encode("unicode_escape", "replace").decode("ascii")
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 1]}…"
