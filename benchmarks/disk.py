"""How fast a trajectory that does not fit into memory is merged, beside a plain read of the same file.

    python benchmarks/disk.py [--parameters 20000000] [--checkpoints 50] [--dtype float16] [--rounds 3] [--quick]
    python benchmarks/disk.py --trajectory run.trajectory

Makes a trajectory in the working directory, and removes it at the end: about parameters × checkpoints × 2 bytes for
float16. In each round everything is measured in turns, each after the system was told to drop the file from its cache.
``read`` reads the file from its first byte to its last, 4 MiB at a time; ``direct`` does so around the system's cache.
A merge is compared with the faster one. ``streamed`` merges as ``Trajectory.on`` does if the file is larger than
memory, ``mapped`` as it does otherwise. Peak memory is what the process holds besides the pages of files, in units of
one model.

It sets no memory limit. To set one, run it as
``systemd-run --scope -p MemoryMax=1G python benchmarks/disk.py``, or in a container that has one.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, write_json

from lcsc_opt.trajectory import Trajectory, TrajectoryWriter
from lcsc_opt.trajectory.merge.memory import available_bytes

AT_ONCE = 4 * 2**20
SPREAD = 0.01  # standard deviation of a weight between checkpoints
TENSOR = 2**22  # scalars of the largest tensors
LEAST_SHARE, MOST_MODELS = 0.9, 2.0  # our own targets


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    print(machine())
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        path = arguments.trajectory or make(Path(folder) / "large.trajectory", arguments)
        result = measure(path, arguments.rounds)
    if not arguments.quick:
        print(write_json("disk", result))
        _judge(result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=20_000_000)
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--dtype", default="float16", help="exact, float16, bfloat16 or int8")
    parser.add_argument("--trajectory", type=Path, help="one that is there already, instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a million parameters, one round, nothing written")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.parameters, arguments.rounds = 1_000_000, 1
    return arguments


def make(path: Path, arguments: argparse.Namespace) -> Path:
    """A trajectory of random weights, which differ a little from one checkpoint to the next."""
    generator = torch.Generator().manual_seed(0)
    sizes = [min(TENSOR, arguments.parameters - first) for first in range(0, arguments.parameters, TENSOR)]
    weights = {f"layer.{index}": torch.randn(size, generator=generator) for index, size in enumerate(sizes)}
    noise = SPREAD * torch.randn(TENSOR, generator=generator)
    with TrajectoryWriter(path, dtype=arguments.dtype) as writer:
        for step in range(arguments.checkpoints):
            for index, tensor in enumerate(weights.values()):
                tensor += noise.roll(step + index)[: len(tensor)]
            writer.append(step, weights)
            print(f"\rcheckpoint {step + 1} of {arguments.checkpoints}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return path


def measure(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each way, and peaks of memory."""
    trajectory = Trajectory.open(path)
    coefficients = np.random.default_rng(0).normal(size=len(trajectory))
    coefficients -= (coefficients.sum() - 1) / len(trajectory)
    weights, model = path / "weights.bin", 4 * trajectory.parameters
    described: dict[str, Any] = {
        "parameters": trajectory.parameters,
        "checkpoints": len(trajectory),
        "dtype": trajectory.stored or "exact",
        "bytes": weights.stat().st_blocks * 512,  # without holes
        "available": available_bytes(),
    }
    print(f"{described['bytes'] / 1e9:.2f} GB, {(described['available'] or 0) / 1e9:.2f} GB of memory available")
    streamed = trajectory.on("cpu", how="streamed")
    tasks: dict[str, Callable[[], object]] = {
        "read": lambda: read(weights),
        "direct": lambda: read_direct(weights),
        "streamed": lambda: streamed.merge(coefficients),
        "mapped": lambda: Trajectory.open(path).merge(coefficients),  # opened anew: mapped pages stay in memory
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    peaks: dict[str, float] = dict.fromkeys(tasks, 0.0)
    for _ in range(rounds):
        for name, task in tasks.items():
            forget(path)
            with peak_memory() as peak:
                start = time.perf_counter()
                task()
                seconds[name].append(time.perf_counter() - start)
            peaks[name] = max(peaks[name], peak[0] / model)
    return described | _result(described["bytes"], seconds, peaks)


def _result(size: int, seconds: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, Any]:
    medians = {name: statistics.median(some) for name, some in seconds.items()}
    plain = min(medians["read"], medians["direct"])
    for name, median in medians.items():
        print(
            f"{name:9s} {size / median / 1e9:5.2f} GB/s (from {size / max(seconds[name]) / 1e9:.2f} "
            f"to {size / min(seconds[name]) / 1e9:.2f})  {plain / median:.2f} of a plain read  "
            f"peak {peaks[name]:.2f} models",
            flush=True,
        )
    return {
        "seconds": seconds,
        "peak_models": {name: round(peak, 3) for name, peak in peaks.items()},
        "share_of_read": {name: round(plain / medians[name], 3) for name in ("streamed", "mapped")},
    }


def read(path: Path) -> int:
    """Read a file from its first byte to its last; gives its size."""
    total, buffer = 0, bytearray(AT_ONCE)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def read_direct(path: Path) -> int:
    """:func:`read` around the system's cache, if the system allows it."""
    if not hasattr(os, "O_DIRECT"):
        return read(path)
    total, buffer = 0, mmap.mmap(-1, AT_ONCE)  # direct reads need an aligned buffer
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        while count := os.preadv(descriptor, [buffer], total):
            total += count
    finally:
        os.close(descriptor)
    return total


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """``[bytes]``: the peak memory besides pages of files, above that at the beginning."""
    peak, start, done = [0], _anonymous(), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _anonymous() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _judge(result: dict[str, Any]) -> None:
    share, peak = result["share_of_read"]["streamed"], result["peak_models"]["streamed"]
    if share < LEAST_SHARE or peak > MOST_MODELS:
        sys.exit(f"missed: {LEAST_SHARE:.0%} of a plain read, at most {MOST_MODELS} models of memory")


if __name__ == "__main__":
    main()
