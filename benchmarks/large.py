"""A large model: the memory and the time of packing and merging its checkpoints.

    python benchmarks/large.py [--folder .] [--checkpoints 20] [--layers 20] [--quick]

Makes checkpoints of a transformer in bfloat16, of 303 M weights with the defaults, in a folder that takes twice their
size and is removed at the end. Then it packs them, and merges them once as a search does, each in a process of its own.
Run it under a limit of memory, as in a control group with ``memory.limit_in_bytes`` of 3 GiB: pages of files count
there, too, and the system takes them back.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import machine, parse, watched_apart, write_json
from safetensors.torch import save_file

from lcsc_opt.trajectory import Trajectory, pack

WIDTH, WORDS = 1024, 50_000
BLOCK = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}


def main() -> None:
    """Make the checkpoints, and print a line for each of the two."""
    small = {"checkpoints": 3, "layers": 1}
    given = parse(__doc__, checkpoints=20, layers=20, folder=".", small=small)
    shapes = {"embedding": (WORDS, WIDTH)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(given.layers) for name, shape in BLOCK.items()}
    weights = sum(a * b for a, b in shapes.values())
    print(f"{machine()}\n{given.checkpoints} checkpoints of {weights:,} weights", flush=True)
    found = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for step in range(1, given.checkpoints + 1):
            generator = torch.Generator().manual_seed(step)
            drawn = {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in shapes.items()}
            save_file(drawn, Path(folder) / f"model_{step}.safetensors")
        for what in (packed, merged):
            found[what.__name__] = watched_apart(functools.partial(what, Path(folder)))
            print(what.__name__, {name: round(value, 1) for name, value in found[what.__name__].items()}, flush=True)
    if not given.quick:
        print(write_json("large", {"checkpoints": given.checkpoints, "weights": weights, **found}))


def packed(folder: Path) -> None:
    """Pack the files."""
    pack(sorted(folder.glob("*.safetensors")), folder / "run.trajectory")


def merged(folder: Path) -> None:
    """Merge the checkpoints with coefficients of both signs."""
    trajectory = Trajectory.open(folder / "run.trajectory")
    signed = np.random.default_rng(0).normal(1 / len(trajectory), 0.1, len(trajectory))
    trajectory.merge(signed / signed.sum())


if __name__ == "__main__":
    main()
