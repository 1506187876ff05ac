"""Checkpoints that are stored in fewer bits: bytes, errors and speed of merges, and FID of searches on them.

    python benchmarks/stored.py [--images 4000] [--seeds 1] [--training 0] [--rounds 5]

Merges and projections are those of ``merge.py``, of 50 checkpoints of 16 MB, in turns. FID is on noise that no search
saw.

The training and the halves of the real images are those of ``rows.py`` for digits, and the search is ``LCSCGradient``
with a row of coefficients for each layer. The same search runs on the checkpoints as they are, and in bfloat16.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, parse, write_json
from fidelity import REPORTED, answer_of, objective_of
from merge import make, measure
from rows import DIGITS, metrics_of

from lcsc_opt.base.paths import DEFAULT_FILES
from lcsc_opt.base.records import HELD_OUT
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.packing import pack

STORED = ("exact", "bfloat16")
METRICS = ("fid A", "fid B", "precision A")


def main() -> None:
    """Search on each, and print."""
    arguments = parse(__doc__, images=4_000, seeds=1, training=0, rounds=5)
    print(machine())
    results: dict[str, Any] = {"machine": machine(), "images": arguments.images, "seeds": arguments.seeds}
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        results["merges"] = measure(make(Path(folder), 50, 16), arguments.rounds)["stored"]
    for stored in STORED:
        objective = objective_of("digits.py", **DIGITS, training_seed=arguments.training)
        exact = objective.trajectory
        assert isinstance(exact, Trajectory)
        size = exact.nbytes
        packed = exact
        if stored != "exact":
            path = DEFAULT_FILES / "stored" / f"{exact.path.stem}-{stored}.trajectory"
            path.parent.mkdir(exist_ok=True)
            packed = pack(exact.path, path, dtype=stored, overwrite=True)
        share = packed.nbytes / size
        objective.trajectory = packed
        objective.merge_in_rows("layers")
        found = []
        for seed in range(arguments.seeds):
            answer = answer_of(objective, "LCSCGradient", seed, arguments.images, selected_on=3_000)
            found.append(metrics_of(objective.images(np.asarray(answer), HELD_OUT, REPORTED), METRICS, "digits"))
        means = dict(zip(METRICS, np.mean(found, axis=0).round(4).tolist(), strict=True))
        results[stored] = {"bytes": round(share, 4), **means}
        print(stored, results[stored], flush=True)
    print(write_json("stored", results))


if __name__ == "__main__":
    main()
