"""A large model: the memory and the time of packing, merging and exporting its checkpoints.

    python benchmarks/large.py [--folder .] [--checkpoints 20] [--layers 20] [--quick]

Makes checkpoints of a transformer in bfloat16, of 303 M weights with the defaults, in a folder that takes twice their
size and is removed at the end. Then it packs them, merges them once as a search does, and exports a signed combination,
each in a process of its own. Run it under a limit of memory, as in a control group with ``memory.limit_in_bytes`` of
3 GiB: pages of files count there, too, and the system takes them back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import machine, parse, watched, write_json
from safetensors.torch import save_file

from lcsc_opt.cli import run as lcsc
from lcsc_opt.exports import Recipe
from lcsc_opt.trajectory import Trajectory, pack

WIDTH, WORDS = 1024, 50_000
BLOCK = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}


def main() -> None:
    """Make the checkpoints, and print a line for each of the three."""
    small = {"checkpoints": 3, "layers": 1}
    given = parse(__doc__, checkpoints=20, layers=20, folder=".", child="", small=small)
    if given.child:
        print(json.dumps(measure(given.child, Path(given.folder))))
        return
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
        signed = np.random.default_rng(0).normal(1 / given.checkpoints, 0.1, given.checkpoints)
        (Path(folder) / "c.json").write_text(json.dumps((signed / signed.sum()).tolist()))
        for what in ("pack", "merge", "export"):
            command = [sys.executable, __file__, "--child", what, "--folder", folder]
            found[what] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
            print(what, {name: round(value, 1) for name, value in found[what].items()}, flush=True)
    if not given.quick:
        print(write_json("large", {"checkpoints": given.checkpoints, "weights": weights, **found}))


def measure(what: str, folder: Path) -> dict[str, float]:
    """One of the three, in this process."""
    packed = folder / "run.trajectory"
    if what == "pack":
        return watched(lambda: pack(sorted(folder.glob("*.safetensors")), packed))
    coefficients = np.array(json.loads((folder / "c.json").read_text()))
    if what == "merge":
        return watched(lambda: Trajectory.open(packed).merge(coefficients))
    recipe = folder / "recipe.json"
    recipe.write_text(Recipe.of(Trajectory.open(packed), coefficients, study="large").as_text())
    return watched(lambda: lcsc(["apply", str(recipe), str(packed), "-o", str(folder / "best.safetensors")]))


if __name__ == "__main__":
    main()
