"""Packing checkpoints against the least that it could do: mapping each file, writing its weights and ``fsync``.

    python benchmarks/packing.py [--files 24] [--turns 5] [--quick]

That is done in turns, for few large tensors and for many small ones, and a third way that does what packing promises in
the fewest lines: it also looks for NaN and hashes each row, one after the other. The files are *at rest*, when the disk
has nothing left to do, or *just written*, when the system still has all of them to write, as at the end of a copy.
Nothing that this process knows of a file from the turn before is used again. What is printed is the median of the
ratios of each turn, with their range.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from common import RESULTS, machine, markdown, parse, watched

from lcsc_opt.trajectory.packing import pack

PLAIN = "map, write, fsync"
CHECKED = "with check and hash"
PACK = "pack"


class Setting(NamedTuple):
    """The checkpoints of one comparison: how large each is, in MB, and how many tensors it has."""

    megabytes: float
    tensors: int


SETTINGS = (Setting(42.0, 8), Setting(42.0, 270), Setting(10.7, 264))


def write_checkpoints(folder: Path, files: int, setting: Setting) -> list[Path]:
    """State dicts of a walk; half of the tensors are biases of 64 numbers."""
    paths = []
    layers = setting.tensors // 2
    scalars = int(setting.megabytes * 1e6 / 4 / layers)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(layers):
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


def write_checked(paths: Sequence[Path], out: Path) -> None:
    """The same, with what packing promises of each row, one after the other."""
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for path in paths:
        row = torch.cat([tensor.view(-1) for tensor in torch.load(path, weights_only=True, mmap=True).values()])
        assert torch.stack(torch.aminmax(row)).isfinite().all()
        content = row.view(torch.uint8).numpy().data
        hashlib.sha256(content).hexdigest()
        os.write(descriptor, content)
    os.fsync(descriptor)
    os.close(descriptor)


def write_again(paths: Sequence[Path]) -> None:
    """Replace files by copies, which the system has not written to the disk yet."""
    for path in paths:
        copy = path.with_suffix(".copy")
        shutil.copyfile(path, copy)
        copy.replace(path)


def timed(run: Callable[[], object], folder: Path, paths: Sequence[Path], *, just_written: bool) -> float:
    """Seconds of one turn, without what the turn before wrote, which is removed.

    Args:
        run: what is timed.
        folder: of the outputs.
        paths: of the checkpoints.
        just_written: whether they are written right before.
    """
    (folder / "plain.bin").unlink(missing_ok=True)
    shutil.rmtree(folder / "run.trajectory", ignore_errors=True)
    os.sync()
    if just_written:
        write_again(paths)
    for path in paths:
        path.touch()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(files: int, setting: Setting, turns: int) -> list[list[str]]:
    """The rows of the table for one setting: files at rest, and files just written."""
    rows = []
    with tempfile.TemporaryDirectory(dir=Path()) as name:
        folder = Path(name)
        (folder / "files").mkdir()
        paths = write_checkpoints(folder / "files", files, setting)
        ways: dict[str, Callable[[], object]] = {
            PLAIN: lambda: write_plainly(paths, folder / "plain.bin"),
            CHECKED: lambda: write_checked(paths, folder / "plain.bin"),
            PACK: lambda: pack(str(folder / "files"), folder / "run.trajectory"),
        }
        for just_written in (False, True):
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(turns):
                for way, run in ways.items():
                    seconds[way].append(timed(run, folder, paths, just_written=just_written))
                print(*(f"{way} {times[-1]:.2f} s" for way, times in seconds.items()), sep=", ", flush=True)
            run = functools.partial(timed, ways[PACK], folder, paths, just_written=just_written)
            megabytes = watched(run)["anonymous"]  # in a turn of its own: to watch takes time
            rows.append(
                [
                    f"{files} × {setting.megabytes:g} MB",
                    str(setting.tensors),
                    "just written" if just_written else "at rest",
                    f"{median(seconds[PLAIN]):.2f}",
                    ratio(seconds[CHECKED], seconds[PLAIN]),
                    ratio(seconds[PACK], seconds[PLAIN]),
                    f"{megabytes:.0f}",
                ]
            )
    return rows


def ratio(seconds: Sequence[float], plain: Sequence[float]) -> str:
    """The median of the ratios of each turn, and their range."""
    ratios = [mine / least for mine, least in zip(seconds, plain, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Compare, and write ``results/packing.md``."""
    arguments = parse(__doc__, small={"files": 4, "turns": 2}, files=24, turns=5)
    table = [
        ["files", "tensors", "they are", f"{PLAIN}, s", f"÷ that: {CHECKED}", "÷ that: pack", "memory of its own, MB"]
    ]
    for setting in SETTINGS:
        table += compare(arguments.files, setting, arguments.turns)
    text = ["# Packing, and the least that it could do\n", f"{machine()}\n", *markdown(table)]
    print(*text, sep="\n")
    if not arguments.quick:
        (RESULTS / "packing.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
