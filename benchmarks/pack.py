"""Packing of checkpoints: its speed against a plain copy of the same bytes to the same disk, and its memory.

    python benchmarks/pack.py [--checkpoints 24] [--megabytes 60] [--rounds 5] [--quick]

Makes a folder of checkpoints of one model in each format. A round copies them (``shutil.copyfile`` and ``fsync``, file
by file) and packs them in a process of its own, in turns. Before each, the system is asked to drop the files from its
cache. Both read and write the same bytes, and end with them on the disk. Memory is how much more the packing process
holds than after its imports, sampled every 20 ms: ``anonymous`` is memory that it asked for, ``mapped`` are pages of
files, which the system can take back at any time. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, memory, parse, watched, write_csv
from safetensors.torch import save_file

FORMATS = ("safetensors", "pt")
LEAST_RATIO, MOST_MEMORY = 0.7, 2.0  # our own targets
WIDTHS = (64, 128, 256, 512)


def main() -> None:
    """Measure and print one line for each format."""
    child = {"nargs": 2, "type": Path, "help": argparse.SUPPRESS}
    small = {"checkpoints": 6, "megabytes": 20, "rounds": 2}
    arguments = parse(
        __doc__,
        checkpoints=24,
        rounds=5,
        child=child,
        small=small,
        megabytes={"type": int, "default": 60, "help": "the size of one checkpoint"},
    )
    if arguments.child:
        print(json.dumps(pack_watched(arguments.child[0], arguments.child[1])))
        return
    print(machine())
    print(f"{arguments.checkpoints} checkpoints of {arguments.megabytes} MB, median of {arguments.rounds} rounds")
    print("format       copy MB/s  pack MB/s  ratio (least to most)  memory in checkpoints: anonymous  mapped")
    rows = [measure(kind, arguments.checkpoints, arguments.megabytes, arguments.rounds) for kind in FORMATS]
    if not arguments.quick:
        header = ("format", "copy_mb_s", "pack_mb_s", "ratio", "ratio_least", "ratio_most", "anonymous", "mapped")
        print(write_csv("pack", header, rows))
    if any(row[3] < LEAST_RATIO or row[6] >= MOST_MEMORY for row in rows):
        sys.exit(f"missed: a ratio of {LEAST_RATIO}, and less than {MOST_MEMORY:g} checkpoints of memory")


def measure(kind: str, checkpoints: int, megabytes: int, rounds: int) -> list[Any]:
    """One row of the results: medians over the rounds."""
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        source = Path(folder) / "source"
        source.mkdir()
        for step in range(checkpoints):
            save(state_dict(step, megabytes), source / f"model{step:06d}.{kind}")
        files = sorted(source.iterdir())
        size = sum(path.stat().st_size for path in files) / 1e6
        packed, copied = [], []
        for turn in range(rounds):
            for what in (turn, turn + 1):
                if what % 2:
                    packed.append(pack_in_child(source, Path(folder) / "t.trajectory"))
                else:
                    copied.append(copy(files, Path(folder) / "copy"))
    ratios = [seconds / answer["seconds"] for seconds, answer in zip(copied, packed, strict=True)]
    anonymous, mapped = (
        max(answer[name] for answer in packed) / (size / checkpoints) for name in ("anonymous", "mapped")
    )
    speeds = size / statistics.median(copied), size / statistics.median(answer["seconds"] for answer in packed)
    ratio = statistics.median(ratios)
    print(
        f"{kind:11s} {speeds[0]:10.0f} {speeds[1]:10.0f}  {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        f" {anonymous:37.2f} {mapped:7.2f}",
        flush=True,
    )
    return [kind, *(round(n, 3) for n in (*speeds, ratio, min(ratios), max(ratios), anonymous, mapped))]


def state_dict(step: int, megabytes: int) -> dict[str, torch.Tensor]:
    """Blocks of a convolution, its bias and two norms, as in a U-Net, until the size is reached."""
    generator = torch.Generator().manual_seed(step)
    tensors: dict[str, torch.Tensor] = {}
    left = megabytes * 10**6 // 4
    while left > 0:
        block = len(tensors) // 4
        width = WIDTHS[block % len(WIDTHS)]
        weight = torch.randn(width, min(width, -(-left // (9 * width))), 3, 3, generator=generator)
        tensors[f"blocks.{block}.conv.weight"] = weight
        for name in ("conv.bias", "norm.weight", "norm.bias"):
            tensors[f"blocks.{block}.{name}"] = torch.randn(width, generator=generator)
        left -= weight.numel() + 3 * width
    return tensors


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one checkpoint, and sync it to the disk."""
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def forget(files: list[Path]) -> None:
    """Ask the system to drop the pages of these files from its cache, so that they are read from the disk."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(files: list[Path], out: Path) -> float:
    """The seconds of copying the files, until they are on the disk."""
    forget(files)
    out.mkdir()
    start = time.perf_counter()
    for path in files:
        shutil.copyfile(path, out / path.name)
        with (out / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def pack_in_child(source: Path, out: Path) -> dict[str, float]:
    """Pack in a fresh process; gives ``seconds`` and peaks in megabytes."""
    forget(sorted(source.iterdir()))
    command = [sys.executable, __file__, "--child", str(source), str(out)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    shutil.rmtree(out)
    return dict(json.loads(answer.stdout))


def pack_watched(source: Path, out: Path) -> dict[str, float]:
    """Pack, in this process, while another thread watches the memory."""
    from lcsc_opt.trajectory import pack

    torch.aminmax(torch.zeros(1))  # the memory that torch takes at its first call does not count
    before, found = memory(), watched(lambda: pack(sorted(source.iterdir()), out))
    return {"seconds": found["seconds"], **{name: found[name] - before[name] for name in before}}


if __name__ == "__main__":
    main()
