"""Accelerators of every kind that torch knows: which exist here, what a kind cannot do, and what torch 2.10 lacks.

No other module names a vendor.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lcsc_opt.base.errors import ObjectiveError

CPU = torch.device("cpu")
VISIBLE = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
}
"""Kind → the variable that limits which devices a process sees. AMD's devices are of the kind ``cuda``, too."""

_POLL_SECONDS = 1e-4


def names() -> list[str]:
    """The accelerators that this process may use: ``cuda:0``, ``cuda:1``, …"""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return []
    return [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]


def find(name: str) -> torch.device:
    """The device of this name, such as ``cpu``, ``cuda`` or ``cuda:1``; ``auto``: the accelerator, else the CPU.

    Raises:
        ObjectiveError: torch or this machine has no such device.
    """
    accelerators = names()
    kinds = {accelerator.partition(":")[0] for accelerator in accelerators}  # at most one
    if name == "auto":
        return torch.device(next(iter(kinds), "cpu"))
    if name not in {"cpu", *kinds, *accelerators}:
        choices = ", ".join(["cpu", *accelerators])
        raise ObjectiveError(f"device: {name} is not available; expected auto or one of {choices}")
    return torch.device(name)


def environments(workers: int, devices: Sequence[str] = ()) -> list[dict[str, str]]:
    """The environment variables of worker processes, with which each sees its own device and no other.

    Args:
        workers: how many.
        devices: the device of each worker, such as ``cuda:0`` or ``cpu``; empty spreads workers evenly over the
            accelerators.

    Raises:
        ObjectiveError: there is no such device.
    """
    accelerators = names()
    devices_of_workers = [find(device) for device in devices]
    if not accelerators or (not devices_of_workers and len(accelerators) < 2):  # nothing to choose from
        return [{} for _ in range(workers)]
    if not devices_of_workers:
        devices_of_workers = [find(accelerators[worker % len(accelerators)]) for worker in range(workers)]
    kind = accelerators[0].partition(":")[0]
    variable = VISIBLE.get(kind, f"{kind.upper()}_VISIBLE_DEVICES")
    identifiers = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    if len(identifiers) < len(accelerators):  # the variable is not set, or does not list devices
        identifiers = [str(index) for index in range(len(accelerators))]
    # an empty text hides all devices; a device without an index is the first
    chosen = ["" if device.type == "cpu" else identifiers[device.index or 0] for device in devices_of_workers]
    return [{variable: identifier} for identifier in chosen]


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64, found by trying. Apple's do not, nor do some of Intel's.

    Raises:
        torch.OutOfMemoryError: the device has no memory left.
    """
    return _computes(lambda: torch.ones((), dtype=torch.float64, device=device).add_(1))


def _computes(compute: Callable[[], Tensor]) -> bool:
    """Whether a computation is not refused. That memory ran out says nothing about the device, and is raised."""
    try:
        compute()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return True


def asynchronous(device: torch.device) -> bool:
    """Whether merges run on the device, on a stream of their own, next to copies from and to pinned memory.

    Projections are summed in float64. For a device without it the CPU merges, and every copy waits.
    """
    return device.type != "cpu" and has_float64(device)


def free_bytes(device: torch.device) -> int:
    """An accelerator's free memory, plus memory that PyTorch has cached and not allocated."""
    free, _ = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)


@functools.cache
def measures_memory(device: torch.device) -> bool:
    """Whether torch can tell how much memory of the device is free, and how much was used at most."""
    if device.type == "cpu":
        return False
    try:
        free_bytes(device)
        torch.accelerator.max_memory_allocated(device)
    except (RuntimeError, AttributeError):  # NotImplementedError is among these
        return False
    return True


def synchronize(device: torch.device) -> None:
    """Wait until all that is queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def on(stream: torch.Stream) -> Iterator[None]:
    """Queue this thread's work on the stream. Unlike ``with stream:``, several threads may do so at once."""
    stream_before = torch.accelerator.current_stream(stream.device)
    index_before = torch.accelerator.current_device_index()  # set_stream changes the device, too
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(stream_before)
        torch.accelerator.set_device_index(index_before)


def recorded(device: torch.device) -> torch.Event:
    """An event at the end of the work that is queued on the device's current stream."""
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event


def wait_for(event: torch.Event) -> None:
    """Sleep until the device has reached the event; ``event.synchronize()`` would keep a core busy."""
    while not event.query():
        time.sleep(_POLL_SECONDS)


def sums_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of ``dtype``, a half type, and gives their sums in float32.

    Raises:
        torch.OutOfMemoryError: the device has no memory left.
    """
    if device.type == "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return False
    matmul = getattr(getattr(torch.backends, device.type, None), "matmul", None)
    sums_in_halves = bool(getattr(matmul, "allow_fp16_accumulation", False))  # the process may change it
    return not sums_in_halves and widens_products(device, dtype)


@functools.cache
def widens_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device gives the product of two matrices of a half type in float32; else they are widened first.

    Raises:
        torch.OutOfMemoryError: the device has no memory left.
    """
    ones = functools.partial(torch.ones, 8, 8, dtype=dtype, device=device)
    return _computes(lambda: torch.mm(ones(), ones(), out_dtype=torch.float32))


def rounds_float32(device: torch.device) -> bool:
    """Whether this process allows the device to multiply matrices of float32 in fewer bits."""
    backend = getattr(torch.backends, device.type, None)
    # the CPU and Intel's GPUs multiply by oneDNN
    matmul = getattr(backend, "matmul", torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    return matmul.fp32_precision in ("tf32", "bf16")


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """While this is open, torch's random numbers are those of a seed.

    Afterwards the CPU and a device of CUDA go on with the caller's sequence; on other devices it is lost.
    """
    devices = [device] if device.type == "cuda" else []  # fork_rng keeps the CPU's in any case
    with torch.random.fork_rng(devices):
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators, too
        else:
            torch.manual_seed(seed)
        yield
