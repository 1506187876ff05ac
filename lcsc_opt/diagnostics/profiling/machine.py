"""What this machine can do at best, measured: reading a store, and arithmetic of one dtype."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

READ_SECONDS = 2.0  # after this, reading stops: a store that does not fit into memory is not read to its end
BLOCK_BYTES = 64 * 2**20
LARGEST_READ = 2 * 2**30  # bytes of a device's memory; a network needs the rest
TASK_SECONDS = 1.0  # for all passes of one task
PASSES = 5  # the fastest counts: others may use the machine, too
MATRIX = {"cpu": 2048, "cuda": 8192, "mps": 2048}  # rows and columns
CONVOLUTION = {"cpu": (8, 64, 32), "cuda": (64, 256, 32), "mps": (32, 128, 32)}  # images, channels, pixels a side


def read_rate(file: Path) -> float:
    """Bytes per second of a plain read of a file through a mapping, by all of torch's threads.

    As in a merge, parts of the file that are in memory already are read from there. Sums of 64-bit integers are as fast
    as reading.
    """
    words = file.stat().st_size // 8
    mapped = torch.from_file(str(file), shared=False, size=words, dtype=torch.int64)
    best = 0.0
    deadline = time.perf_counter() + READ_SECONDS
    for _ in range(PASSES):
        start, done = time.perf_counter(), 0
        for first in range(0, words, BLOCK_BYTES // 8):
            block = mapped[first : first + BLOCK_BYTES // 8]
            block.sum()
            done += block.nbytes
            if time.perf_counter() > deadline:
                break
        best = max(best, done / (time.perf_counter() - start))
        if time.perf_counter() > deadline:
            break
    return best


def memory_rate(device: torch.device, size: int) -> float:
    """Bytes per second of a plain read of a device's own memory, measured on ``size`` bytes or fewer."""
    words = torch.zeros(max(min(size, LARGEST_READ) // 8, 1), dtype=torch.int64, device=device)
    return words.nbytes / _fastest(words.sum, device)


@torch.no_grad()
def arithmetic_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of large matrix products, or of convolutions where these are faster.

    By default, a GPU rounds float32 more coarsely in one of the two, and is faster there.
    """
    return max(operations / _fastest(task, device) for task, operations in _tasks(dtype, device))


def _tasks(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Callable[[], Tensor], int]]:
    """Tasks, each with its number of operations; a multiplication and an addition count as two."""
    size = MATRIX[device.type]
    matrix = torch.rand(size, size, device=device).to(dtype)
    yield (lambda: matrix @ matrix), 2 * size**3
    images, channels, pixels = CONVOLUTION[device.type]
    x = torch.rand(images, channels, pixels, pixels, device=device).to(dtype, memory_format=torch.channels_last)
    kernel = torch.rand(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    yield (lambda: F.conv2d(x, kernel, padding=1)), 2 * images * pixels**2 * channels**2 * 9


def _fastest(task: Callable[[], Tensor], device: torch.device) -> float:
    """The seconds of the fastest pass."""
    task()  # chooses kernels
    best, spent = float("inf"), 0.0
    for _ in range(PASSES):
        wait_for(device)
        start = time.perf_counter()
        task()
        wait_for(device)
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
        if spent > TASK_SECONDS:
            break
    return best


def wait_for(device: torch.device) -> None:
    """Wait until everything that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_bytes() -> int:
    """The most memory that this process had so far, including the parts of a store that it mapped and read."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_peak_bytes(device: torch.device) -> int | None:
    """The most memory that torch had on a GPU so far; ``None`` where there is no GPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
