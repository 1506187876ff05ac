"""A pretend accelerator of two devices: torch's backend for other makers, on which the CPU does the work, but late.

What a real one does and a CPU does not is done here, too:

* Each stream is a queue with a thread of its own and random delays. Only ``item``, ``cpu`` and their like wait.
* Memory that is freed goes back to the stream that took it, and is taken again at once, while work that is queued on
  other streams may still read it. ``record_stream`` prevents that.
* Copies from and to pinned memory take place when the stream comes to them, with what is there by then.
* Operations that mix devices are refused. Memory has a limit.

``COUNTS`` has the launches, allocations, copies from and to the host with their bytes, how many of these take place
meanwhile, and waits of the host.
"""
# mypy: ignore-errors

from __future__ import annotations

import collections
import contextlib
import functools
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
DEVICES = 2
COUNTS: collections.Counter[str] = collections.Counter()


def _count_waits(count: int = 1) -> None:
    COUNTS["waits"] += count
    if threading.current_thread() is threading.main_thread():
        COUNTS["waits of the main thread"] += count


ATEN = torch.ops.aten


class Options:
    """What a test changes."""

    memory = 2**30  # bytes of each device
    float64 = True
    halves = True  # whether half types are multiplied into float32
    delay = 0.002  # the longest of an operation's, in seconds
    late = 0.02  # the share of operations that begin late; copies that the host does not wait for always do


@contextlib.contextmanager
def slow(seconds: float) -> Iterator[None]:
    """What is queued while this is open takes up to so long."""
    before = Options.delay, Options.late
    Options.delay, Options.late = seconds, 1.0
    try:
        yield
    finally:
        Options.delay, Options.late = before


class _Queue:
    """What a stream has to do, and the thread that does it."""

    def __init__(self, index: int, seed: int) -> None:
        self.index, self._random, self._tasks = index, random.Random(seed), queue.SimpleQueue[Any]()
        self.queued, self.done, self._changed, self._error = 0, 0, threading.Condition(), None
        threading.Thread(target=self._work, daemon=True).start()

    def put(self, task: Any, *, copies: bool = False) -> int:
        """Queue it; its number."""
        with self._changed:
            self.queued += 1
            late = copies or self._random.random() < Options.late
            self._tasks.put((task, self._random.random() * Options.delay if late else 0.0))
            return self.queued

    def wait(self, number: int) -> None:
        """Until that task is done."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.done >= number, timeout=60)
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            task, delay = self._tasks.get()
            if delay:
                time.sleep(delay)
            try:
                with torch.no_grad():
                    task()
            except BaseException as error:  # as on a real device, whoever waits next is told
                self._error = error
            del task
            with self._changed:
                self.done += 1
                self._changed.notify_all()


_queues: list[_Queue] = []  # by the number of their stream; the first ones are the devices' default streams
_thread = threading.local()
_RealStream, _RealGenerator, _real_empty = torch.Stream, torch.Generator, torch.empty


class Stream(_RealStream):
    """Torch's, of one of our queues."""

    def __new__(cls, device: Any = None) -> Any:
        _queues.append(_Queue(torch.device(device).index or 0, seed=len(_queues)))
        return _stream(len(_queues) - 1)

    def __enter__(self) -> Any:  # what to return to is kept in the stream, as torch does
        self.before = torch.accelerator.current_stream(self.device)
        torch.accelerator.set_stream(self)

    def __exit__(self, *_: Any) -> None:
        torch.accelerator.set_stream(self.before)


def _stream(number: int) -> Any:
    kind = int(torch._C._autograd.DeviceType.PrivateUse1)
    return _RealStream.__new__(Stream, stream_id=number, device_index=_queues[number].index, device_type=kind)


def _current(index: int) -> int:
    """The number of this thread's stream on a device."""
    return getattr(_thread, "streams", {}).get(index, index)


class Event:
    """Torch's, after what a queue has to do."""

    def __init__(self, device: Any = None) -> None:
        self._at: tuple[_Queue, int] | None = None
        self._asked = False

    def record(self, stream: Any) -> None:
        mine = _queues[stream.stream_id]
        self._at = mine, mine.queued

    def query(self) -> bool:
        if self._at is None:
            return True
        if not self._asked:
            _count_waits()
        self._asked = True
        mine, number = self._at
        return mine.done >= number


def _read(readers: dict[int, int]) -> bool:
    """Whether these queues have come so far."""
    return all(_queues[number].done >= last for number, last in readers.items())


class _Memory:
    """A device's: blocks that were freed are taken again by the stream that had them, as torch's allocators do."""

    def __init__(self) -> None:
        self.used, self.peak, self.free, self.lock = 0, 0, collections.defaultdict(list), threading.RLock()

    def unused(self) -> int:
        return sum(len(raw) for blocks in self.free.values() for raw, _ in blocks)

    def take(self, size: int, stream: int) -> torch.Tensor:
        with self.lock:
            COUNTS["allocations"] += 1
            there = self.free[stream, size]
            at = next((n for n, (_, readers) in enumerate(there) if _read(readers)), None)
            if at is not None:
                raw, _ = there.pop(at)
            else:
                if self.used + self.unused() + size > Options.memory:
                    self.free.clear()
                if self.used + size > Options.memory:
                    COUNTS["out_of_memory"] += 1
                    raise torch.OutOfMemoryError(f"{NAME}: {self.used} bytes are used, {size} are wanted")
                with torch.inference_mode(mode=False):
                    raw = _real_empty(size, dtype=torch.uint8).fill_(0x7F)
            self.used += size
            self.peak = max(self.peak, self.used)
            return raw

    def give_back(self, raw: torch.Tensor, stream: int, readers: set[int]) -> None:
        with self.lock:
            self.used -= len(raw)
            self.free[stream, len(raw)].append((raw, {number: _queues[number].queued for number in readers}))


_memories = collections.defaultdict(_Memory)


def used(index: int) -> int:
    """Bytes that tensors take there."""
    return _memories[index].used


class _Block:
    """Memory that tensors share until the last one is freed by the host."""

    def __init__(self, index: int, size: int) -> None:
        self.raw, self.readers = _memories[index].take(size, _current(index)), set[int]()
        weakref.finalize(self, _memories[index].give_back, self.raw, _current(index), self.readers).atexit = False


class Pretend(torch.Tensor):
    """A tensor there. ``raw`` is its memory, which only queues read and write; ``block`` keeps it."""

    raw: torch.Tensor
    block: _Block
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, block: _Block, index: int) -> Any:
        device, layout = torch.device(NAME, index), {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, raw.size(), dtype=raw.dtype, device=device, **layout)
        made.raw, made.block = raw, block
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _SPECIAL.get(func, functools.partial(_launch, func))(*args, **(kwargs or {}))


def _allocate(like: Any, index: int) -> Pretend:
    """Uninitialized, in the shape, strides and dtype of a tensor on torch's meta device."""
    if like.dtype == torch.float64 and not Options.float64:
        raise TypeError(f"{NAME} does not support float64")
    count = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    block = _Block(index, count * like.dtype.itemsize)
    with torch.inference_mode(mode=False):
        return Pretend(block.raw.view(like.dtype).as_strided(like.shape, like.stride()), block, index)


def _meta(value: Any) -> Any:
    if isinstance(value, Pretend):
        return _real_empty(0, dtype=value.dtype, device="meta").as_strided(value.shape, value.stride())
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Pretend) else value


@functools.cache
def _nature(func: Any) -> tuple[bool, tuple[int, ...], tuple[str, ...]]:
    """Whether it makes a view; which of its arguments it writes, by place and by name."""
    infos = [result.alias_info for result in func._schema.returns]
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments]
    named = tuple(a.name for a, yes in zip(func._schema.arguments, written, strict=True) if yes and a.kwarg_only)
    places = tuple(n for n, (a, yes) in enumerate(zip(func._schema.arguments, written, strict=True)) if yes)
    return any(info is not None and not info.is_write for info in infos), places, named


def _leaves(value: Any) -> list[Any]:
    """What arguments or results consist of. Torch's pytree, which is for any class, takes much longer."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for part in value for leaf in _leaves(part)]


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Arguments or results with each of their leaves changed."""
    if isinstance(value, dict):
        return {name: _mapped(function, part) for name, part in value.items()}
    if isinstance(value, list):
        return [_mapped(function, part) for part in value]
    if isinstance(value, tuple):
        return tuple(_mapped(function, part) for part in value)
    return function(value)


def _mapped_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    return _mapped(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)


def _launch(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Queue an operation on this thread's stream. Its results have their shapes at once and their numbers later."""
    flat = _leaves((args, kwargs))
    ours = [value for value in flat if isinstance(value, Pretend)]
    device = kwargs.get("device") or ours[0].device
    # as on real devices, indices may be on the host, but not what they index
    checked = args[:1] if func in (ATEN.index.Tensor, ATEN.index_put_.default) else flat
    for value in checked:
        if isinstance(value, torch.Tensor) and value.device != device and value.dim():
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {value.device} and {device}!")
    if func is ATEN.mm.dtype and not Options.halves:
        raise NotImplementedError(f"{NAME} does not support aten::mm.dtype")
    view, places, named = _nature(func)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    raw_args, raw_kwargs = _mapped(_raw, (args, kwargs))
    index, call = device.index or 0, functools.partial(_LACKING.get(func, func), *raw_args, **raw_kwargs)
    if view:
        made = call()
        return _mapped_tensors(lambda part: Pretend(part, ours[0].block, index), made)
    mine = _queues[_current(index)]
    COUNTS["launches"] += 1
    seeded = torch.Tag.nondeterministic_seeded in func.tags
    if seeded:  # the generator is the host's: its numbers are drawn in the order of the calls
        _wait(index, counted=False)
    if places:
        mine.put(call)
        if seeded:
            _wait(index, counted=False)
        written = [args[place] for place in places if place < len(args)] + [kwargs[n] for n in named if n in kwargs]
        return None if not func._schema.returns else written[0] if len(func._schema.returns) == 1 else tuple(written)
    try:
        shapes = _shapes(func, args, kwargs)
    except NotImplementedError:  # its shapes depend on the numbers
        _wait(index)
        return _mapped_tensors(lambda part: _uploaded(part, index), call())
    made = _mapped_tensors(lambda like: _allocate(like, index), shapes)
    rooms = [room.raw for room in _leaves(made) if isinstance(room, Pretend)]

    def run() -> None:
        found = [value for value in _leaves(call()) if isinstance(value, torch.Tensor)]
        for room, value in zip(rooms, found, strict=True):
            room.copy_(value) if value.numel() else None

    mine.put(run)
    if seeded:
        _wait(index, counted=False)
    return made


def _widened_product(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of half types, summed in float32."""
    return one.to(dtype) @ other.to(dtype)


_LACKING = {ATEN.mm.dtype: _widened_product}  # what devices have, and a CPU does not
_known_shapes: dict[Any, Any] = {}


def _shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """The results on torch's meta device; remembered, since a network repeats its operations with each batch."""
    key = func, _likeness(args), _likeness(list(kwargs.items()))
    if key not in _known_shapes:
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        _known_shapes[key] = func(*_mapped(_meta, args), **_mapped(_meta, kwargs))
    return _known_shapes[key]


def _likeness(value: Any) -> Any:
    """All of an argument that the shapes of results depend on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, (list, tuple)):
        return tuple(map(_likeness, value))
    return type(value), value


def _uploaded(values: torch.Tensor, index: int) -> Pretend:
    made = _allocate(values, index)
    _queues[_current(index)].put(functools.partial(made.raw.copy_, values))
    return made


def _wait(index: int, *, counted: bool = True) -> None:
    """Until this thread's stream has nothing to do."""
    _count_waits(counted)
    mine = _queues[_current(index)]
    mine.wait(mine.queued)


def _pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in _pinned_places


_pinned_places: dict[int, torch.Tensor] = {}  # never freed, so that nothing else comes to lie there


def _copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if isinstance(to, Pretend) and isinstance(source, Pretend):
        if to.device != source.device:
            _wait(source.device.index)
        COUNTS["launches"] += 1
        _queues[_current(to.device.index)].put(functools.partial(to.raw.copy_, source.raw))
        return to
    here, there = (source, to) if isinstance(to, Pretend) else (to, source)
    name, index = ("to_device" if here is source else "to_host"), there.device.index
    COUNTS[name] += 1
    COUNTS[f"{name}_bytes"] += here.nbytes
    late = non_blocking and _pinned(here)
    waited_for = not late and (not non_blocking or here is to)
    COUNTS["meanwhile"] += late
    if here is source and not late:
        source = source.clone()
    # nobody can look at a copy that the host waits for before it is made
    _queues[_current(index)].put(functools.partial(_raw(to).copy_, _raw(source)), copies=not waited_for)
    if waited_for:
        _wait(index)
    return to


def _to_copy(source: Pretend, **options: Any) -> torch.Tensor:
    device = options.pop("device", None) or source.device
    non_blocking, options["memory_format"] = options.pop("non_blocking", False), options.pop("memory_format", None)
    options.pop("pin_memory", None), options.pop("layout", None)
    if device.type == "cpu":
        likeness = {key: value for key, value in options.items() if value is not None}
        to = torch.empty_like(_meta(source), device="cpu", **likeness)
        return _copy(to, source, non_blocking)
    to = _allocate(
        torch.empty_like(_meta(source), **{k: v for k, v in options.items() if v is not None}), device.index or 0
    )
    return _copy(to, source, non_blocking)


def _scalar(tensor: Pretend) -> Any:
    COUNTS["to_host"] += 1
    COUNTS["to_host_bytes"] += tensor.nbytes
    _wait(tensor.device.index)
    return tensor.raw.item()


def _record_stream(tensor: Pretend, stream: Any) -> None:
    tensor.block.readers.add(stream.stream_id)


_SPECIAL = {
    ATEN.copy_.default: _copy,
    ATEN._to_copy.default: _to_copy,
    ATEN._local_scalar_dense.default: _scalar,
    ATEN.record_stream.default: _record_stream,
}


def _factory(func: Any) -> Any:
    """A kernel that makes a tensor from nothing."""

    def make(*args: Any, device: Any = None, pin_memory: Any = None, layout: Any = None, **kwargs: Any) -> Pretend:
        if func in (ATEN.empty.memory_format, ATEN.empty_strided.default):
            return _allocate(func(*args, device="meta", **kwargs), device.index or 0)
        return _uploaded(func(*args, device="cpu", **kwargs), device.index or 0)

    return make


class Generator(_RealGenerator):
    """Torch's, of the host; one for this device says that it is there."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, "cpu" if torch.device(device).type == NAME else device)
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> Any:
        return self.place


def _empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
    made = _real_empty(*size, **options)
    if pin_memory:
        _pinned_places[made.untyped_storage().data_ptr()] = made
    return made


def _number(device: Any = None) -> int:
    index = device if isinstance(device, int) else None if device is None else torch.device(device).index
    return getattr(_thread, "index", 0) if index is None else index


def _set_stream(stream: Any) -> None:
    _thread.streams = {**getattr(_thread, "streams", {}), stream.device_index: stream.stream_id}
    _thread.index = stream.device_index


def _synchronize(device: Any = None) -> None:
    _count_waits()
    for mine in [mine for mine in _queues if mine.index == _number(device)]:
        mine.wait(mine.queued)


class _Backend(ModuleType):
    """``torch.pretend``."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: DEVICES)
    current_device = staticmethod(_number)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda _seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    empty_cache = staticmethod(lambda: [memory.free.clear() for memory in _memories.values()])


def register() -> None:
    """Make it known to torch, for as long as the process lives."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend(NAME))
    _queues.extend(_Queue(index, seed=index) for index in range(DEVICES))
    library = torch.library.Library("aten", "IMPL")
    anything = torch.library.Library("_", "IMPL")
    anything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # it has no fewer bits to offer
    _thread.libraries = library, anything  # which end with it
    made = "empty.memory_format empty_strided arange arange.start arange.start_step linspace eye eye.m randperm"
    library.impl("_copy_from", lambda source, to, non_blocking=False: _copy(to, source, non_blocking), "PrivateUse1")
    for name in [*made.split(), "randperm.generator"]:
        func, _, overload = name.partition(".")
        library.impl(name, _factory(getattr(getattr(ATEN, func), overload or "default")), "PrivateUse1")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.empty, torch.Stream, torch.Event, torch.Generator = _empty, Stream, Event, Generator
    torch.Tensor.is_pinned = _pinned
    chosen = torch.accelerator
    chosen.current_stream = lambda device=None: _stream(_current(_number(device)))
    chosen.set_stream, chosen.current_device_index, chosen.synchronize = _set_stream, _number, _synchronize
    chosen.set_device_index = lambda index: setattr(_thread, "index", index)
    chosen.get_memory_info = lambda device: (
        Options.memory - _memories[_number(device)].used - _memories[_number(device)].unused(),
        Options.memory,
    )
    chosen.empty_cache = _Backend.empty_cache
    chosen.memory_allocated = lambda device: _memories[_number(device)].used
    chosen.max_memory_allocated = lambda device: _memories[_number(device)].peak
    chosen.reset_peak_memory_stats = lambda device: setattr(
        _memories[_number(device)], "peak", _memories[_number(device)].used
    )
    chosen.memory_reserved = lambda device: _memories[_number(device)].used + _memories[_number(device)].unused()
