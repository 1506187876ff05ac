"""Packing checkpoints against the least that it could do: mapping each file, writing its weights and ``fsync``.

    python benchmarks/packing.py [--files 47] [--megabytes 42] [--turns 5]

Both are done in turns, each when the disk has nothing left to do; what is printed is the median of the ratios, with
their range.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import RESULTS, machine, markdown, parse, watched

from lcsc_opt.trajectory.packing import pack

TENSORS = 270


def write_checkpoints(folder: Path, files: int, megabytes: float) -> list[Path]:
    """State dicts of :data:`TENSORS` tensors, a walk."""
    paths = []
    scalars = int(megabytes * 1e6 / 4 / (TENSORS // 2))
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(TENSORS // 2):
        weights[f"blocks.{layer}.weight"] = torch.randn(scalars - 64, generator=generator)
        weights[f"blocks.{layer}.bias"] = torch.randn(64, generator=generator)
    for step in range(1, files + 1):
        for tensor in weights.values():
            tensor += 0.001 * torch.randn(tensor.shape, generator=generator)
        path = folder / f"step_{step:06d}.pt"
        torch.save(weights, path)
        paths.append(path)
    return paths


def write_plainly(paths: Sequence[Path], out: Path) -> None:
    """Map, write, sync."""
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for path in paths:
        for tensor in torch.load(path, weights_only=True, mmap=True).values():
            os.write(descriptor, tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    os.fsync(descriptor)
    os.close(descriptor)


def timed(run: Callable[[], object], folder: Path) -> float:
    """Seconds of one turn, after what the turn before wrote is removed, and the disk has nothing left to do."""
    (folder / "plain.bin").unlink(missing_ok=True)
    shutil.rmtree(folder / "run.trajectory", ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Compare, and write ``results/packing.md``."""
    arguments = parse(__doc__, small={"files": 4, "turns": 2}, files=47, megabytes=42.0, turns=5)
    rows = [["", "seconds", "÷ map, write, fsync", "memory of its own, MB"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        paths = write_checkpoints(folder / "files", arguments.files, arguments.megabytes)
        ways: dict[str, Callable[[], object]] = {
            "map, write, fsync": lambda: write_plainly(paths, folder / "plain.bin"),
            "pack": lambda: pack(str(folder / "files"), folder / "run.trajectory"),
        }
        measured: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.turns):
            for way, run in ways.items():
                measured[way].append(timed(run, folder))
            print(*(f"{way} {seconds[-1]:.2f} s" for way, seconds in measured.items()), sep=", ", flush=True)
        for way, run in ways.items():
            ratios = np.divide(measured[way], measured["map, write, fsync"]).tolist()
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            megabytes = watched(functools.partial(timed, run, folder))["anonymous"]  # once more: to watch takes time
            rows.append([way, f"{median(measured[way]):.2f}", f"{median(ratios):.2f} ({spread})", f"{megabytes:.0f}"])
    text = [f"# Packing {arguments.files} files of {arguments.megabytes:.0f} MB\n", f"{machine()}\n", *markdown(rows)]
    print(*text, sep="\n")
    if not arguments.quick:
        (RESULTS / "packing.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
